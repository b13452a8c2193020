"""Models by name, new heads, and weights that are read without executing anything."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from secateurs.errors import ModelError, UnknownNameError
from secateurs.models import Architecture, VGGDigits, build, build_architecture, read_weights
from secateurs.models.heads import NewHead
from secateurs.models.sources import rename_published
from secateurs.models.weights import fit_weights

SMALL = (3, 32, 32)


def small(**settings: Any) -> nn.Module:
    return build("torchvision:mobilenet_v3_small", **{"num_classes": 3, "input_size": SMALL, **settings})


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("resnet18", ModelError, "'resnet18' does not say where the model comes from; did you mean torch"),
        ("my-model", ModelError, "'my-model' does not say where the model comes from$"),
        ("torchvision:", ModelError, "does not say where"),
        ("torchvision:resnet81", UnknownNameError, r"unknown torchvision model 'resnet81'; did you mean 're"),
        ("secateurs:vgg", UnknownNameError, r"unknown model of Secateurs 'vgg'"),
        ("no_such_package.nets:make", ModelError, r"there is no module 'no_such_package\.nets' to import"),
        ("torch.nn:Linaer", UnknownNameError, r"class of torch\.nn 'Linaer'; did you mean 'Linear'"),
        ("fractions:Fraction", ModelError, r"must give a torch\.nn\.Module, got Fraction"),
    ],
)
def test_names_that_lead_to_no_model(name: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"(?m){sentence}"):
        build(name, num_classes=2)


def test_missing_timm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"(?s)timm:resnet18 needs timm.*pip install 'secateurs\[timm\]'"):
        build("timm:resnet18", num_classes=2)


NETS = """
from torch import nn

class HeadDeclaredFirst(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.head = nn.Linear(8, num_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))

    def forward(self, images):
        return self.head(self.body(images))

def without_argument():
    return HeadDeclaredFirst()

def gives_maps():
    return nn.Conv2d(3, 4, 1)

def gives_two():
    class Two(nn.Module):
        def forward(self, images):
            return images, images
    return Two()

def fails():
    raise RuntimeError("the user's own mistake")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    (tmp_path / "nets_half_there.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_mine", raising=False)
    return "nets_of_mine"


def test_own_factory_is_found_in_the_working_directory(own_module: str, tmp_path: Path) -> None:
    before = list(sys.path)
    model = build(f"{own_module}:HeadDeclaredFirst", num_classes=5, input_size=SMALL)
    assert model(torch.zeros(2, *SMALL)).shape == (2, 5)
    assert sys.path == before


def test_linear_head_replaces_what_runs_last_not_what_is_declared_last(own_module: str) -> None:
    model = build(f"{own_module}:HeadDeclaredFirst", num_classes=5, head="linear", input_size=SMALL)
    assert model.get_submodule("head").out_features == 5
    assert model.get_submodule("body.1").out_features == 8


@pytest.mark.parametrize(
    ("factory", "error", "sentence"),
    [
        ("nets_of_mine:without_argument", ModelError, "(?s)gives 7 scores, but .* 2 classes.*head='linear'"),
        ("nets_of_mine:gives_maps", ModelError, r"must give a \(1, classes\) .* shape \(1, 4, 32, 32\)"),
        ("nets_of_mine:gives_two", ModelError, r"must give a \(1, classes\) tensor .* got tuple"),
        ("nets_of_mine:fails", RuntimeError, "the user's own mistake"),
        ("nets_half_there:make", ModuleNotFoundError, "no_such_dependency"),
    ],
)
def test_own_factories_that_do_not_fit(
    own_module: str, factory: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        build(factory, num_classes=2, input_size=SMALL)


def test_images_that_do_not_fit_the_model() -> None:
    with pytest.raises(ModelError, match=r"resnet18 does not run on images of 1 x 16 x 16: .*channels"):
        build("torchvision:resnet18", num_classes=10, input_size=(1, 16, 16))


# --- heads -------------------------------------------------------------------------------------------------


def test_linear_head_for_families_that_end_differently() -> None:
    ends = {
        "alexnet": ("classifier.6", (3, 64, 64)),
        "convnext_tiny": ("classifier.2", SMALL),
        "densenet121": ("classifier", SMALL),
        "googlenet": ("fc", SMALL),
        "shufflenet_v2_x0_5": ("fc", SMALL),
        "squeezenet1_1": ("classifier.1", SMALL),
    }
    for name, (place, size) in ends.items():
        model = build(f"torchvision:{name}", num_classes=3, head="linear", input_size=size)
        assert model.get_submodule(place).weight.shape[0] == 3, name
        assert model.train()(torch.zeros(2, *size)).shape == (2, 3), name
        assert all(parameter.requires_grad for parameter in model.parameters()), name


def test_article_head_is_three_layers_in_front_of_which_all_is_frozen() -> None:
    model = build("torchvision:alexnet", num_classes=2, head="article", input_size=(3, 64, 64))
    kinds = [type(layer).__name__ for layer in model.get_submodule("classifier")]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    shapes = [tuple(model.get_parameter(f"classifier.{index}.weight").shape) for index in (0, 3, 6)]
    assert shapes == [(4096, 9216), (4096, 4096), (2, 4096)]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"classifier.{index}.{kind}" for index in (0, 3, 6) for kind in ("weight", "bias")}


def test_article_head_keeps_the_norm_and_the_flattening_before_it() -> None:
    model = build("torchvision:convnext_tiny", num_classes=2, head="article", input_size=SMALL)
    kinds = [type(layer).__name__ for layer in model.get_submodule("classifier")]
    assert kinds[:3] == ["LayerNorm2d", "Flatten", "Linear"]
    assert not model.get_parameter("classifier.0.weight").requires_grad


def test_article_head_where_the_classifier_is_one_layer() -> None:
    model = build("torchvision:resnet18", num_classes=2, head="article", input_size=SMALL)
    assert model.get_submodule("fc.0").in_features == 512


@pytest.mark.parametrize(("head", "error"), [("article", ModelError), ("new", UnknownNameError)])
def test_heads_that_cannot_be_had(head: str, error: type[Exception]) -> None:
    sentence = "does not end in a linear layer|unknown head 'new'"
    with pytest.raises(error, match=sentence):
        build("torchvision:squeezenet1_1", num_classes=2, head=head, input_size=SMALL)


def test_building_leaves_no_hooks_and_ends_in_training_mode() -> None:
    model = small(head="linear")
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "wrapped"])
def test_weights_from_a_file(tmp_path: Path, suffix: str, wrap: bool) -> None:
    source = small()
    state = {f"module.{name}" if wrap else name: value for name, value in source.state_dict().items()}
    file = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrap else state, file)
    model = small(weights=str(file))
    assert all(same(value, model.state_dict()[name]) for name, value in source.state_dict().items())


def test_head_of_a_thousand_classes_is_left_out_as_a_whole(tmp_path: Path) -> None:
    source = small(num_classes=1000)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "imagenet.safetensors")
    model = small(head="linear", weights=str(tmp_path / "imagenet.safetensors"))
    for name, value in source.state_dict().items():
        assert same(value, model.state_dict()[name]) == (not name.startswith("classifier.3.")), name


def test_articles_head_stays_new_where_two_of_its_three_layers_would_fit() -> None:
    """As for VGG-16 of ImageNet, whose own classifier has the article's shape but for the classes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network = nn.ModuleDict({"body": nn.Linear(3, 3), "classifier": model})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    given = {name: torch.ones_like(value) for name, value in before.items()}
    given |= {"classifier.2.weight": torch.ones(9, 4), "classifier.2.bias": torch.ones(9)}
    new = tuple(name for name in before if name.startswith("classifier"))
    head = NewHead(place="classifier", parameters=new)
    fit_weights(network, given, name="network", where="file", head=head)
    assert all((value == 1).all() for name, value in network.state_dict().items() if name.startswith("body"))
    assert all(same(value, before[name]) for name, value in model.state_dict(prefix="classifier.").items())


def test_head_that_fits_is_used(tmp_path: Path) -> None:
    source = small(head="linear")
    torch.save(source.state_dict(), tmp_path / "mine.pth")
    model = small(head="linear", weights=str(tmp_path / "mine.pth"))
    assert same(model.get_submodule("classifier.3").weight, source.get_submodule("classifier.3").weight)


def test_batch_norm_counters_may_be_missing(tmp_path: Path) -> None:
    state = {name: value for name, value in small().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    model = small(weights=str(tmp_path / "old.pth"))
    assert same(model.get_submodule("features.0.0").weight, state["features.0.0.weight"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"features.0.0.weight": None}, r"1 missing \(features\.0\.0\.weight\)"),
        ({"extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
        ({"features.0.0.weight": torch.ones(1)}, r"1 of another shape \(features\.0\.0\.weight \(1,\) for"),
        ({f"x{n}": torch.ones(1) for n in range(9)}, r"9 unexpected \(x0, x1, x2 and 6 more\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], sentence: str) -> None:
    state = {**small().state_dict(), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "w.pth")
    for head in ("keep", "linear"):
        with pytest.raises(
            ModelError, match=f"weights do not fit torchvision:mobilenet_v3_small: .*{sentence}"
        ):
            small(weights=str(tmp_path / "w.pth"), head=head)


def test_weights_of_other_classes_with_the_old_head(tmp_path: Path) -> None:
    torch.save(small(num_classes=4).state_dict(), tmp_path / "four.pth")
    with pytest.raises(ModelError, match=r"(?s)3\.weight \(4, 1024\) for \(3, 1024\).*head='linear'"):
        small(weights=str(tmp_path / "four.pth"))


class RunsCodeWhenUnpickled:
    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_checkpoint_that_needs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    trap = RunsCodeWhenUnpickled()
    trap.marker = tmp_path / "executed"
    torch.save({"weight": trap}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match=r"trap\.pth can only be read by executing code"):
        read_weights(tmp_path / "trap.pth")
    assert not trap.marker.exists()


def test_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(VGGDigits(10), tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"(?s)executing code .*torch\.save\(model\.state_dict\(\)"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pth", b"", r"a\.pth is not a whole PyTorch checkpoint"),
        ("a.pth", b"PK\x03\x04 half an archive", r"a\.pth is not a whole PyTorch checkpoint"),
        ("a.pth", b"just text", r"a\.pth is not a whole PyTorch checkpoint"),
        ("a.safetensors", b"\x08\0\0\0\0\0\0\0{", r"a\.safetensors is not a whole safetensors file"),
        ("a.safetensors", b"", r"a\.safetensors is not a whole safetensors file"),
        ("nowhere.pth", None, "there is no weights file"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=sentence):
        read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds no weights by name"),
        ({}, "holds no weights by name"),
        ({"weight": torch.ones(1), "epoch": 3}, "holds more than tensors: epoch"),
    ],
)
def test_checkpoints_of_something_else(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=sentence):
        read_weights(tmp_path / "a.pth")


def test_published_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torchvision.models.mobilenet_v3_small()
    fetch = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(fetch, lambda *_, **__: source.state_dict())
    model = small(weights="IMAGENET1K_V1", head="linear")
    assert same(model.get_submodule("features.0.0").weight, source.features[0][0].weight)
    assert model.get_submodule("classifier.3").out_features == 3
    with pytest.raises(ModelError, match=r"(?s)gives 1000 scores, but there are 3 classes.*head='linear'"):
        small(weights="DEFAULT")


def test_published_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ModelError, match=r"(?s)could not be fetched: .*no route.*pass its path"):
        small(weights="DEFAULT", head="linear")
    with pytest.raises(UnknownNameError, match="'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'"):
        small(weights="IMAGENET1K_V9", head="linear")
    with pytest.raises(ModelError, match="secateurs:vgg-digits has no published weights 'DEFAULT'"):
        build("secateurs:vgg-digits", num_classes=10, weights="DEFAULT", input_size=(1, 16, 16))


def test_published_files_under_older_names_and_with_side_outputs() -> None:
    one = torch.ones(1)
    old = {"features.denseblock1.denselayer2.norm.1.weight": one, "features.norm0.weight": one}
    renamed = rename_published("torchvision:densenet121", old)
    assert set(renamed) == {"features.denseblock1.denselayer2.norm1.weight", "features.norm0.weight"}
    side = {"aux1.fc.weight": one, "fc.weight": one}
    assert set(rename_published("torchvision:googlenet", side)) == {"fc.weight"}
    assert set(rename_published("torchvision:resnet18", side)) == set(side)


# --- architectures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(name="secateurs:vgg-digits", num_classes=10, input_size=(1, 16, 16)),
        Architecture(name="torchvision:mobilenet_v3_small", num_classes=3, head="linear", input_size=SMALL),
        Architecture(name="torchvision:alexnet", num_classes=2, head="article", input_size=(3, 64, 64)),
    ],
    ids=lambda architecture: architecture.name,
)
def test_architecture_rebuilds_the_same_parameters(architecture: Architecture) -> None:
    given = Architecture.from_dict(architecture.to_dict())
    assert given == architecture
    first = build(given.name, num_classes=given.num_classes, head=given.head, input_size=given.input_size)
    again = build_architecture(given)
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (first, again)]
    assert shapes[0] == shapes[1]
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_classes": 1}, "got num_classes=1"),
        ({"num_classes": "2"}, "an architecture has two texts"),
        ({"head": "none"}, "unknown head 'none'"),
        ({"input_size": [3, 32]}, "an architecture has two texts"),
        ({"input_size": [0, 32, 32]}, "input_size must be"),
        ({"colour": "red"}, r"missing or unknown: \['colour'\]"),
    ],
)
def test_architectures_that_make_no_sense(change: dict[str, Any], sentence: str) -> None:
    values = Architecture(name="secateurs:vgg-digits", num_classes=10, input_size=(1, 16, 16)).to_dict()
    with pytest.raises((ModelError, UnknownNameError), match=sentence):
        Architecture.from_dict({**values, **change})


# --- the demo's network ------------------------------------------------------------------------------------


def test_demo_network_takes_images_of_any_size_and_a_gradient_reaches_all_of_it() -> None:
    model = VGGDigits(4, channels=3, stages=((4, 4), (6,)), hidden=5)
    model(torch.randn(3, 3, 24, 12)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_real_mobilenet_weights_fit(shared_data: Path) -> None:
    file = shared_data / "weights/mobilenet_v2_imagenet.safetensors"
    model = build(
        "torchvision:mobilenet_v2", num_classes=2, head="linear", weights=str(file), input_size=(3, 96, 96)
    )
    assert same(model.get_submodule("features.0.0").weight, read_weights(file)["features.0.0.weight"])
    assert model.get_submodule("classifier.1").out_features == 2

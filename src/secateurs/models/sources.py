"""Models by name: of torchvision, of timm, ours, and the user's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from secateurs.errors import ModelError, UnknownNameError
from secateurs.models.vgg_digits import VGGDigits

_USAGE = "write torchvision:NAME, timm:NAME, secateurs:vgg-digits, or package.module:factory for your own"
_SIDE_OUTPUTS = ("aux1.", "aux2.", "AuxLogits.")
_WITH_SIDE_OUTPUTS = ("googlenet", "inception_v3")  # in training these give a tuple unless told not to


def create(
    name: str, *, num_classes: int | None, published: str | None, input_size: tuple[int, int, int] | None
) -> nn.Module:
    """A model by name.

    Args:
        name: ``SOURCE:NAME``.
        num_classes: Scores that it is to give; ``None`` for what it gives by itself.
        published: The name of published weights to load.
        input_size: ``(C, H, W)`` of its images, for models that are built for one size.

    Returns:
        The model in training mode.

    Raises:
        ModelError: There is no such model, or its weights cannot be had.
    """
    source, colon, own_name = name.partition(":")
    if not colon or not source or not own_name:
        raise ModelError(f"{name!r} does not say where the model comes from{_guess(name)}", fix=_USAGE)
    if source == "torchvision":
        return _from_torchvision(own_name, num_classes, published)
    if source == "timm":
        return _from_timm(own_name, num_classes, published)
    if published is not None:
        fix = "give a .safetensors or .pth file, or 'none'"
        raise ModelError(f"{name} has no published weights {published!r}", fix=fix)
    if source == "secateurs":
        return _from_secateurs(own_name, num_classes, input_size)
    return _from_module(source, own_name, num_classes)


def _guess(name: str) -> str:
    return f"; did you mean torchvision:{name}?" if name in _torchvision_names() else ""


def _torchvision_names() -> list[str]:
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _from_torchvision(name: str, num_classes: int | None, published: str | None) -> nn.Module:
    if name not in _torchvision_names():
        raise UnknownNameError("torchvision model", name, _torchvision_names())
    settings: dict[str, Any] = {"aux_logits": False} if name in _WITH_SIDE_OUTPUTS else {}
    if published is not None:
        settings["weights"] = _published(name, published)
    else:
        if name in _WITH_SIDE_OUTPUTS:
            settings["init_weights"] = True
        if num_classes is not None:
            settings["num_classes"] = num_classes
    try:
        model: nn.Module = torchvision.models.get_model(name, **settings)
    except OSError as error:  # what urllib raises
        raise ModelError(
            f"the weights {published} of torchvision:{name} could not be fetched: {error}",
            fix="fetch the file on another machine and pass its path as the weights",
        ) from error
    return model


def rename_published(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they were published, under the names that the model has now.

    Files of torchvision's DenseNets have the names of an older release, and those of GoogLeNet and Inception
    hold the side outputs that are left out here. Other weights are given back as they are.

    Args:
        name: The model.
        tensors: Weights by name.

    Returns:
        The weights that the model has, by its names.
    """
    source, _, own_name = name.partition(":")
    if source == "torchvision" and own_name in _WITH_SIDE_OUTPUTS:
        return {key: value for key, value in tensors.items() if not key.startswith(_SIDE_OUTPUTS)}
    if source == "torchvision" and own_name.startswith("densenet"):
        return {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", key): value for key, value in tensors.items()}
    return dict(tensors)


def _published(name: str, weights: str) -> Any:
    choices = torchvision.models.get_model_weights(name)
    wanted = weights.rpartition(".")[2]
    if wanted != "DEFAULT" and wanted not in choices.__members__:
        raise UnknownNameError(f"weights of torchvision:{name}", weights, {"DEFAULT", *choices.__members__})
    return choices[wanted]


def _from_timm(name: str, num_classes: int | None, published: str | None) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(f"timm:{name} needs timm", fix="pip install 'secateurs[timm]'") from error
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ModelError(f"timm has no model {name!r}", fix=f"use one of: {close or 'timm.list_models()'}")
    if published not in (None, "DEFAULT"):
        raise UnknownNameError(f"weights of timm:{name}", str(published), {"DEFAULT"})
    settings = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model: nn.Module = timm.create_model(name, pretrained=published is not None, **settings)
    except OSError as error:  # what the hub's client raises
        raise ModelError(f"the weights of timm:{name} could not be fetched: {error}") from error
    return model


def _from_secateurs(name: str, num_classes: int | None, input_size: tuple[int, int, int] | None) -> nn.Module:
    if name != "vgg-digits":
        raise UnknownNameError("model of Secateurs", name, ["vgg-digits"])
    return VGGDigits(num_classes or 10, channels=input_size[0] if input_size else 1)


def _from_module(module_name: str, factory_name: str, num_classes: int | None) -> nn.Module:
    with _working_directory_importable():
        factory = _import_factory(module_name, factory_name)
        takes_classes = num_classes is not None and _takes(factory, "num_classes")
        settings = {"num_classes": num_classes} if takes_classes else {}
        try:
            model = factory(**settings)
        except Exception as error:
            error.add_note(f"while {module_name}:{factory_name} was called for a model")
            raise
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ModelError(f"{module_name}:{factory_name} must give a torch.nn.Module, got {kind}")
    return model


def _takes(factory: Callable[..., Any], argument: str) -> bool:
    try:
        return argument in inspect.signature(factory).parameters
    except ValueError:  # some callables written in C have no signature
        return False


def _import_factory(module_name: str, factory_name: str) -> Callable[..., Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise ModelError(
            f"there is no module {module_name!r} to import a model from",
            where=f"{Path.cwd()} and the installed packages",
            fix=_USAGE,
        ) from error
    callables: dict[str, Callable[..., Any]] = {
        name: value for name, value in vars(module).items() if callable(value)
    }
    if factory_name not in callables:
        public = [name for name in callables if not name.startswith("_")]
        raise UnknownNameError(f"function or class of {module_name}", factory_name, public)
    return callables[factory_name]


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)

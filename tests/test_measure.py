"""Every number in two independent ways, and models that are left as they were."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from secateurs.errors import DataError
from secateurs.measure import accuracy, compare_latency, file_bytes, latency_ms, macs, measure, parameters
from secateurs.models import VGGDigits


class SharedLinear(nn.Module):
    """One layer that runs twice: its parameters count once, its multiplications twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.layer(x)))


class FusedAttention(nn.Module):
    """In eval mode torch runs this layer as one operator that its own counter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class DropsInTraining(nn.Module):
    """Right in eval mode, useless in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)


class Fails(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the model's own mistake")


# --- size --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "by_hand"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 5, 7), 3 * 8 * 9 * 35),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 5, 5), 8 * 9 * 25),
        (nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2), (8, 6, 6), 4 * 4 * 9 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)), (3, 2, 2), 60),
        (SharedLinear(), (6,), 72),
        (FusedAttention(), (5, 8), 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8),
        (nn.LSTM(6, 5, batch_first=True), (7, 6), 7 * 20 * (6 + 5)),
        (
            nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
            (7, 6),
            7 * 2 * 20 * (6 + 5 + 10 + 5),
        ),
        (nn.GRU(6, 5, batch_first=True), (7, 6), 7 * 15 * (6 + 5)),
        (nn.RNN(6, 5, batch_first=True), (7, 6), 7 * 5 * (6 + 5)),
    ],
    ids=[
        *("plain", "depthwise", "grouped", "transposed", "linear", "shared", "attention"),
        *("LSTM", "LSTM of two levels and directions", "GRU", "RNN"),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_are_the_products_written_by_hand(
    model: nn.Module, shape: tuple[int, ...], by_hand: int, batch: int
) -> None:
    assert macs(model, torch.randn(batch, *shape)) == by_hand


def test_the_kernel_for_recurrent_layers_on_a_gpu_is_counted() -> None:
    class OnGpu(nn.Module):
        """What torch calls there for an LSTM."""

        def forward(self, x: Tensor) -> Tensor:
            weights = [torch.empty(shape, device="meta") for shape in ((20, 6), (20, 5), (20,), (20,))]
            state = torch.empty(1, 3, 5, device="meta")
            out: Tensor = torch.ops.aten._cudnn_rnn(
                x, weights, 4, None, state, state, 2, 5, 0, 1, True, 0.0, False, False, [], None
            )[0]
            return out

    assert macs(OnGpu(), torch.empty(3, 7, 6, device="meta")) == 7 * 20 * (6 + 5)


def test_counted_macs_are_those_of_the_graph() -> None:
    model, images = VGGDigits(10), torch.randn(2, 1, 16, 16)
    assert macs(model, images) == secateurs.trace(model, images).cost().macs


def test_parameters_that_are_shared_count_once_and_buffers_do_not() -> None:
    assert parameters(SharedLinear()) == 6 * 6 + 6
    assert parameters(nn.BatchNorm2d(5)) == 10


class EveryType(nn.Module):
    """Empty, scalar and many types of tensors under names that are not ASCII."""

    def __init__(self) -> None:
        super().__init__()
        types = (
            "uint64 int64 float64 complex64 float32 uint32 int32 bfloat16 float16 uint16 int16 float8_e4m3fn"
        )
        for number, name in enumerate(f"{types} float8_e5m2 float8_e4m3fnuz int8 uint8 bool".split()):
            self.register_buffer(f"größe_{number}", torch.zeros(7 + 13 * number).to(getattr(torch, name)))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.tensor(1.0))


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(3, 2),
        nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(12))),
        EveryType(),
        nn.ReLU(),
    ],
    ids=["small", "deep", "every type", "empty"],
)
def test_file_bytes_is_the_length_of_the_file(model: nn.Module) -> None:
    assert file_bytes(model) == len(save(model.state_dict()))


def test_tensors_that_share_their_memory_are_in_the_file_once() -> None:
    once = nn.ModuleDict({"again": nn.Linear(6, 6)})
    assert file_bytes(SharedLinear()) == len(save(once.state_dict()))


# --- accuracy ----------------------------------------------------------------------------------------------


def test_accuracy_and_loss_by_hand_with_a_smaller_last_batch() -> None:
    scores = torch.randn(10, 4)
    labels = scores.argmax(1)
    labels[7:] = (labels[7:] + 1) % 4
    batches = [(scores[:4], labels[:4]), (scores[4:8], labels[4:8]), (scores[8:], labels[8:])]
    measured = accuracy(DropsInTraining(), batches)
    assert measured.top1 == 0.7
    assert measured.count == 10
    assert measured.loss == pytest.approx(cross_entropy(scores, labels).item(), rel=1e-6)


def test_accuracy_of_nothing() -> None:
    with pytest.raises(DataError, match="accuracy needs at least one sample, but the data is empty"):
        accuracy(nn.Identity(), [])


# --- latency -----------------------------------------------------------------------------------------------


class Sleeps(nn.Module):
    """A layer that takes the time that it is told, and counts its runs."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.seconds = milliseconds / 1000
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        time.sleep(self.seconds)
        return x


def test_latency_is_in_milliseconds_and_runs_as_often_as_it_is_told() -> None:
    model = Sleeps(4)
    measured = latency_ms(model, torch.zeros(1), warmup=2, repeats=5)
    assert model.runs == 7
    assert 4 <= measured.median_ms < 40
    assert measured.p10_ms <= measured.median_ms <= measured.p90_ms
    assert (measured.repeats, measured.device, measured.threads) == (5, "cpu", torch.get_num_threads())


def test_threads_are_set_stated_and_put_back() -> None:
    before = torch.get_num_threads()
    assert latency_ms(nn.Identity(), torch.zeros(1), repeats=3, threads=2).threads == 2
    assert torch.get_num_threads() == before


class Recorder(nn.Module):
    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        return x


def test_compared_models_take_turns_so_that_drift_meets_both() -> None:
    log: list[str] = []
    models = {name: Recorder(name, log) for name in "ab"}
    compared = compare_latency(models, torch.zeros(1), warmup=1, repeats=3)
    assert "".join(log) == "abababab"
    assert list(compared) == ["a", "b"]


def test_no_repeats_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="got repeats=0"):
        latency_ms(nn.Identity(), torch.zeros(1), repeats=0)


# --- all of it ---------------------------------------------------------------------------------------------


def test_measure_gives_the_five_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images, labels = torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    numbers = measure(model, images[:1], [(images, labels)])
    assert list(numbers) == ["accuracy", "params", "macs", "file_bytes", "latency_ms"]
    assert (numbers["params"], numbers["macs"]) == (10, 8)
    assert all(value is not None and math.isfinite(value) for value in numbers.values())
    assert measure(model, images[:1])["accuracy"] is None


@pytest.mark.parametrize("kind", [dict, tuple, Tensor])
def test_inputs_of_any_form(kind: type) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, shift: float | Tensor = 0.0) -> Tensor:
            return self.layer(x + shift)

    x = torch.randn(2, 3)
    forms: dict[type, Any] = {
        dict: {"x": x, "shift": torch.ones(2, 3)},
        tuple: (x, torch.ones(2, 3)),
        Tensor: x,
    }
    assert measure(Adds(), forms[kind])["macs"] == 6


@pytest.mark.parametrize("call", [macs, latency_ms, measure], ids=lambda call: call.__name__)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_modes_hooks_threads_and_random_state_are_as_before(call: Any, training: bool, fails: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), Fails(4, 4) if fails else nn.Linear(4, 4))
    model.train(training)
    model[1].train(not training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random, fast_path = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    if fails:
        with pytest.raises(RuntimeError, match="the model's own mistake"):
            call(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    else:
        call(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model] == [training, not training, training]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path

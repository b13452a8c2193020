"""What surrounds a training loop: devices and processes, random numbers, modes, and leaving no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import DataLoader, RandomSampler

from secateurs.errors import TrainingError
from secateurs.graph.running import modes_kept
from secateurs.recovery.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextlib.contextmanager
def prepared(
    model: nn.Module, accelerator: Accelerator | None, precision: str | None
) -> Iterator[tuple[Accelerator, nn.Module]]:
    """The model as accelerate runs it, and afterwards as it was, where it was."""
    with _engine(accelerator, precision) as engine:
        device = next(model.parameters()).device
        attributes = set(vars(model))
        try:
            yield engine, engine.prepare_model(model)
        finally:
            engine.unwrap_model(model, keep_fp32_wrapper=False)
            for name in set(vars(model)) - attributes:
                delattr(model, name)
            model.to(device)


@contextlib.contextmanager
def _engine(accelerator: Accelerator | None, precision: str | None) -> Iterator[Accelerator]:
    """The caller's engine, or one of our own, for which accelerate's global state is put back afterwards.

    Raises:
        TrainingError: The caller's engine, or this machine, does not do the precision that was asked for.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if accelerator is not None:
        if precision not in (None, accelerator.mixed_precision):
            message = f"the recipe asks for precision={precision!r}, the accelerator is for "
            raise TrainingError(
                f"{message}{accelerator.mixed_precision!r}", fix=f"Accelerator(mixed_precision={precision!r})"
            )
        yield accelerator
        return
    shared = AcceleratorState._shared_state  # one for the whole process, and one precision in it
    before = dict(shared)
    shared.clear()
    try:
        try:
            engine = Accelerator(mixed_precision=precision)
        except ValueError as error:
            raise TrainingError(f"precision={precision!r} cannot be used here: {error}") from error
        yield engine
    finally:
        shared.clear()
        shared.update(before)


@contextlib.contextmanager
def nothing_else_changed(model: nn.Module, batches: object) -> Iterator[None]:
    """Put back the mode of every module, all random states, and take away the gradients."""
    kept = [(generator, generator.get_state()) for generator in _generators(batches)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with modes_kept(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for generator, state in kept:
            generator.set_state(state)
        for parameter in model.parameters():
            parameter.grad = None


def seed_everything(seed: int, batches: object) -> None:
    """Torch's random numbers, and those of a loader that has a generator of its own."""
    torch.manual_seed(seed)
    for generator in _generators(batches):
        generator.manual_seed(seed)


def _generators(batches: object) -> list[torch.Generator]:
    """Those of a loader and of its sampler, if they have any."""
    holders = (batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def training_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode, but for batch norms that are frozen."""
    model.train()
    for module in model.modules():
        if is_batch_norm(module):
            own = list(module.parameters(recurse=False))
            if recipe.freeze_bn or (own and not any(parameter.requires_grad for parameter in own)):
                module.eval()


def is_batch_norm(module: nn.Module) -> bool:
    """One of torch's, or another that keeps a running mean and is not of single samples."""
    keeps = module._buffers.get("running_mean") is not None and not isinstance(module, _InstanceNorm)
    return keeps or isinstance(module, _BatchNorm)


def on_device(data: Iterable[Any], engine: Accelerator) -> Generator[Any, None, None]:
    """The batches where the model is; a loader is shared out among the processes."""
    if isinstance(data, DataLoader):
        sampler: Any = data.sampler
        own = getattr(sampler, "generator", None)
        if isinstance(sampler, RandomSampler) and own is None:  # one order however many processes there are
            seed = int(torch.empty((), dtype=torch.int64).random_())
            sampler.generator = torch.Generator().manual_seed(seed)
        prepared = engine.prepare_data_loader(data)
        try:
            yield from prepared
        finally:
            prepared.end()  # else accelerate's global state would keep a loader that was left early
            if isinstance(sampler, RandomSampler):
                sampler.generator = own
        return
    from accelerate.utils import send_to_device

    for batch in data:
        yield send_to_device(batch, engine.device)


def summed(numbers: list[float], engine: Accelerator) -> list[float]:
    """Each number added up over all processes."""
    if engine.num_processes == 1:
        return numbers
    both = engine.reduce(torch.tensor(numbers, dtype=torch.float64, device=engine.device), "sum")
    return [float(number) for number in both]


def agree(model: nn.Module, engine: Accelerator) -> None:
    """All processes take over the running statistics of the first."""
    if engine.num_processes > 1:
        from accelerate.utils import broadcast

        for buffer in model.buffers():
            broadcast(buffer)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

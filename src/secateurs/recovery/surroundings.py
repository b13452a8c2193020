"""What surrounds a training loop: devices and processes, random numbers, modes, and leaving no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from secateurs.graph.running import modes_kept
from secateurs.recovery.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextlib.contextmanager
def prepared(model: nn.Module, accelerator: Accelerator | None) -> Iterator[tuple[Accelerator, nn.Module]]:
    """The model as accelerate runs it, and afterwards as it was, where it was."""
    from accelerate import Accelerator

    engine = accelerator or Accelerator()
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
def nothing_else_changed(model: nn.Module, batches: object) -> Iterator[None]:
    """Put back the mode of every module, all random states, and take away the gradients."""
    generator = getattr(batches, "generator", None)
    kept = generator.get_state() if generator is not None else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with modes_kept(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        if generator is not None and kept is not None:
            generator.set_state(kept)
        for parameter in model.parameters():
            parameter.grad = None


def seed_everything(seed: int, batches: object) -> None:
    """Torch's random numbers, and those of a loader that has a generator of its own."""
    torch.manual_seed(seed)
    generator = getattr(batches, "generator", None)
    if generator is not None:
        generator.manual_seed(seed)


def training_mode(model: nn.Module, recipe: Recipe) -> None:
    """Training mode, but for batch norms that are frozen."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            own = list(module.parameters(recurse=False))
            if recipe.freeze_bn or (own and not any(parameter.requires_grad for parameter in own)):
                module.eval()


def on_device(data: Iterable[Any], engine: Accelerator) -> Generator[Any, None, None]:
    """The batches where the model is; a loader is shared out among the processes."""
    if isinstance(data, DataLoader):
        prepared = engine.prepare_data_loader(data)
        try:
            yield from prepared
        finally:
            prepared.end()  # else accelerate's global state would keep a loader that was left early
        return
    from accelerate.utils import send_to_device

    for batch in data:
        yield send_to_device(batch, engine.device)


def agreed(total: float, samples: int, model: nn.Module, engine: Accelerator) -> float:
    """The mean loss over all processes, which also take over the first one's running statistics."""
    if engine.num_processes == 1:
        return total / samples
    from accelerate.utils import broadcast

    for buffer in model.buffers():
        broadcast(buffer)
    both = engine.reduce(torch.tensor([total, samples], dtype=torch.float64, device=engine.device), "sum")
    return float(both[0] / both[1])

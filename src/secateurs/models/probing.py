"""One trial run of a model on a blank image: what it gives, and in which order its layers run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.errors import ModelError
from secateurs.graph.running import modes_kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What a trial run showed.

    Attributes:
        classes: Scores that the model gives for an image.
        layer_names: Its linear layers and convolutions in the order in which they ran.
    """

    classes: int
    layer_names: tuple[str, ...]


def try_model(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> Trial:
    """Run a model once, in eval mode, and leave its modes, hooks and the random state as they were.

    Args:
        model: The model.
        name: What to call it in an error.
        input_size: ``(C, H, W)`` of the blank image that it is given.

    Returns:
        What was seen.

    Raises:
        ModelError: It does not run on such an image, or does not give a row of scores for it.
    """
    ran: list[str] = []
    hooks = []
    for own_name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda *_, own_name=own_name: ran.append(own_name)))
    size = " x ".join(map(str, input_size))
    try:
        with modes_kept(model), torch.random.fork_rng(devices=[]), torch.no_grad():
            output = model.eval()(torch.zeros(1, *input_size))
    except Exception as error:  # a foreign forward raises anything
        raise ModelError(
            f"{name} does not run on images of {size}: {' '.join(str(error).split())[:300]}",
            fix="give it data whose images have the channels and the size that it was written for",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(f"{name} must give a (1, classes) tensor for one image of {size}, got {got}")
    return Trial(classes=output.shape[1], layer_names=tuple(ran))

"""Torch's attention layers exchanged for ours and back, in place: the parameters stay the same objects.

Torch's own layer runs as one opaque function that derives its sizes from each other. Ours takes its place
where the sizes must be seen (the trace, the dry run, the scores), and where torch's own cannot express what
a cut left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from secateurs.attention import MultiheadAttention, packed_weight
from secateurs.graph.copying import modules_of


def write_out(model: nn.Module) -> list[MultiheadAttention]:
    """Exchange every attention layer of torch's own in a model; subclasses of others keep their forward.

    Returns:
        The exchanged layers.
    """
    found = []
    for _, module in modules_of(model):
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
            assert isinstance(module, MultiheadAttention)
            module.scale = module.head_dim**-0.5
            module._qkv_same_embed_dim = False
            found.append(module)
    return found


def fold(layer: MultiheadAttention) -> None:
    """Make a layer torch's own again; its sizes must allow it."""
    del layer.scale
    layer._qkv_same_embed_dim = layer.in_proj_weight is not None
    layer.__class__ = nn.MultiheadAttention  # type: ignore[assignment]


@contextmanager
def attention_written_out(model: nn.Module) -> Iterator[None]:
    """The layers of torch's own run in steps meanwhile, as they did in the trace."""
    layers = write_out(model)
    try:
        yield
    finally:
        for layer in layers:
            fold(layer)


def attention_layers(model: nn.Module) -> list[MultiheadAttention]:
    """The layers of ours in a model."""
    return [module for _, module in modules_of(model) if isinstance(module, MultiheadAttention)]


def fold_where_possible(model: nn.Module, heads_before: dict[MultiheadAttention, int]) -> None:
    """Make torch's own of every layer whose sizes torch's own can express.

    An odd number of heads that a cut left stays ours: torch's encoder layers take no odd number on their fast
    path, and torch's own layer takes no nested tensor off it.

    Args:
        model: The model after a cut, with sizes restated.
        heads_before: Number of heads of the layers that were torch's own before the cut.
    """
    for layer in attention_layers(model):
        plain = layer.num_heads % 2 == 0 or layer.num_heads == heads_before.get(layer)
        if plain and _is_expressible(layer):
            fold(layer)


def _is_expressible(layer: MultiheadAttention) -> bool:
    """Whether stream, all heads together and output have one width, and the scale is that of the heads."""
    width = layer.embed_dim
    packed = packed_weight(layer)
    if packed is not None:
        rows = {int(packed.shape[0]) // 3}
    else:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        rows = {int(weight.shape[0]) for weight in weights}
    same_width = {*rows, *layer.out_proj.weight.shape, layer.num_heads * layer.head_dim} == {width}
    return same_width and layer.scale == layer.head_dim**-0.5

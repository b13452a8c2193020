"""The same levels for Torch-Pruning, with the recipe of its documentation.

Half of every layer by magnitude (p=2), the last classifier left alone. For attention, the layers that make
queries, keys and values are given with their number of heads, and the attributes that its examples rewrite
after the cut are rewritten. Level 5 is left open: it has no check of its own, and its cut cannot be silenced
in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.zoo.example import Case, tensors_in
from benchmarks.zoo.levels import Record, after_cut, build, call, gradients, size, trains

_JOINED = ("qkv", "qkv_proj")
_SEPARATE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
_HEADS = ("num_heads", "num_attention_heads", "n_heads")


def check(case: Case, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Cut a model to half its width with Torch-Pruning and see how far it gets.

    Args:
        case: Builds the model.
        tell: Receives the facts at each stage.

    Returns:
        The facts, as JSON can hold them.
    """
    record = Record(tell)
    with record.stage("build"):
        example = build(case)
        before = size(record, example, call(example.model, example.inputs), "before")
        wanted = gradients(record, example, example.model)
        example = build(case)  # it cuts in place, and the step above moved the statistics
    if not record.went_well("build"):
        return record.done()
    with record.stage("prune"):
        _prune(example.model, example.inputs, before["shapes"])
    record.level(1, record.went_well("prune"))
    if not record.went_well("prune"):
        return record.done()
    cut = after_cut(record, example, example.model, before)
    trains(record, example.model, cut, wanted)
    return record.done()


def _prune(model: nn.Module, inputs: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    heads = dict(_heads(model))
    pruner = tp.pruner.MetaPruner(
        model,
        inputs if isinstance(inputs, Tensor | dict) else list(inputs),
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=_classifiers(model, shapes),
        num_heads=heads,
        output_transform=lambda outputs: sum(t.float().sum() for _, t in tensors_in(outputs)),
    )
    pruner.step()
    for module in model.modules():
        _restate(module, pruner.num_heads)


def _classifiers(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[nn.Module]:
    """Layers as wide as an output, as its examples leave out those with as many outputs as classes."""
    widths = {shape[-1] for shape in shapes.values() if shape}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in widths]
    channels = {shape[1] for shape in shapes.values() if len(shape) == 4}
    maps = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in channels]
    return layers + maps[-2:]


def _heads(model: nn.Module) -> Iterable[tuple[nn.Module, int]]:
    """The layers that make queries, keys and values, with their numbers of heads."""
    for module in model.modules():
        number = _number(module)
        if number is None:
            continue
        for name in _JOINED:
            if isinstance(getattr(module, name, None), nn.Module):
                yield getattr(module, name), number
        for names in _SEPARATE:
            if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
                groups = _key_heads(module, number)
                yield from zip(
                    (getattr(module, name) for name in names), (number, groups, groups), strict=True
                )


def _number(module: nn.Module) -> int | None:
    """The number of heads that a module states, or that its configuration does."""
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            number = getattr(holder, name, None)
            if isinstance(number, int):
                return number
    return None


def _key_heads(module: nn.Module, number: int) -> int:
    for holder in (module, getattr(module, "config", None)):
        found = getattr(holder, "num_key_value_heads", None)
        if isinstance(found, int):
            return found
    return number


def _restate(module: nn.Module, heads: Mapping[nn.Module, int]) -> None:
    """Rewrite the attributes of an attention layer, as its examples do after the cut."""
    for name in _JOINED:
        layer = getattr(module, name, None)
        if layer in heads and isinstance(layer, nn.Linear):
            module.num_heads = heads[layer]
            module.head_dim = layer.out_features // (3 * heads[layer])
    for names in _SEPARATE:
        layer = getattr(module, names[0], None)
        if layer not in heads or not isinstance(layer, nn.Linear):
            continue
        size = layer.out_features // heads[layer]
        values: dict[str, int] = {
            "attention_head_size": size,
            "head_dim": size,
            "all_head_size": layer.out_features,
            "embed_dim": layer.out_features,
        }
        for attribute, value in values.items():
            if isinstance(getattr(module, attribute, None), int):
                setattr(module, attribute, value)
    if hasattr(module, "hidden_dim") and isinstance(getattr(module, "conv_proj", None), nn.Conv2d):
        module.hidden_dim = module.conv_proj.out_channels  # torchvision's vision transformer


torch.set_num_threads(1)

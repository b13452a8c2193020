"""Copies of a model that exchange or share its tensors instead of copying them."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_SHARED_TYPES = frozenset(
    (int, float, str, bool, type(None), torch.dtype, torch.device, type, BuiltinFunctionType, FunctionType)
)
_TABLES = frozenset((OrderedDict, dict))


def copy_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    share: bool = False,
    held: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of a model in which some tensors are exchanged.

    Much quicker than ``copy.deepcopy``, and it never copies a tensor that is exchanged or shared: modules are
    rebuilt by hand, everything else they hold is copied as Python would.

    Args:
        model: The model; it is read only.
        tensors: New tensors for parameters and buffers, by name; a parameter keeps its class,
            and its ``requires_grad``.
        share: Share the tensors that are not exchanged with the model, instead of copying them.
        held: The model's own tensors by name, where they are known already.

    Returns:
        The copy. Tensors that the model shares between names are shared in the copy.
    """
    memo: dict[int, Any] = {}
    for name, old in (tensors_of(model) if held is None else held).items():
        new = (tensors or {}).get(name)
        if new is not None:
            memo[id(old)] = _dressed(new, old)
        elif share:
            memo[id(old)] = old
    return _copy_module(model, memo)


def drop_foreign_hooks(model: nn.Module) -> None:
    """Remove the hooks that are not part of what a private copy of a model computes.

    The hooks of torch (weight norm) and of the installed library that a module's class comes from (hidden
    states that are captured) belong to it. All others are the user's, who does not expect them to be called.
    """
    modules = [module for _, module in modules_of(model)]
    hooked = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks) if hooks]
    if hooked:
        classes = {_package(type(module)) for module in modules}
        packages = {"torch", *(package for package in classes if _is_installed(package))}
        for hooks in hooked:
            for key, hook in list(hooks.items()):
                if _package(hook) not in packages:
                    del hooks[key]


def _package(thing: Any) -> str:
    """The top-level package that a class, function, method or callable object comes from."""
    origin = getattr(thing, "__module__", None) or type(thing).__module__
    return str(origin).partition(".")[0]


def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and constants by name; one under several names appears under its first.

    A constant is a tensor that a module holds as a plain attribute, such as a table of positions. It is cut
    as a buffer is, but is no part of the ``state_dict``, and may be made by the first forward pass only.
    """
    modules = modules_of(model)
    found = _registered(modules)
    known = set(map(id, found.values()))
    for path, module in modules:
        for name, value in module.__dict__.items():
            if type(value) is Tensor and _is_constant(value) and id(value) not in known:
                known.add(id(value))
                found.setdefault(f"{path}.{name}" if path else name, value)
    return found


def _is_constant(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and tensor.is_leaf and tensor.is_floating_point()


def registered_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that the ``state_dict`` leaves out."""
    return _registered(modules_of(model))


def unsaved_buffers(model: nn.Module) -> set[str]:
    """Names of the buffers that the ``state_dict`` leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, module in modules_of(model)
        for name in module._non_persistent_buffers_set
    }


def _registered(modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    named: dict[int, tuple[str, Tensor]] = {}
    for held in ("_parameters", "_buffers"):
        for path, module in modules:
            for name, tensor in getattr(module, held).items():
                if tensor is not None and id(tensor) not in named:
                    named[id(tensor)] = (f"{path}.{name}" if path else name, tensor)
    return dict(named.values())


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter; asking torch takes ten times as long for the usual classes."""
    kind = type(tensor)
    return kind is nn.Parameter or (kind is not Tensor and isinstance(tensor, nn.Parameter))


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, but quicker: that nests generators."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        children = module._modules
        if children:
            prefix = f"{path}." if path else ""
            pending += [
                (prefix + name, child) for name, child in reversed(children.items()) if child is not None
            ]
    return found


def _dressed(new: Tensor, old: Tensor) -> Tensor:
    if not is_parameter(old) or is_parameter(new):
        return new
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    if "__deepcopy__" in type(module).__dict__ or isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module, memo)
    duplicate = module.__class__.__new__(module.__class__)
    memo[id(module)] = duplicate
    held = module.__dict__.copy()
    for name, value in held.items():  # most are switches and empty tables of hooks
        kind = type(value)
        if kind in _SHARED_TYPES:
            continue
        held[name] = kind() if kind in _TABLES and not value else _copy_value(value, memo)
    duplicate.__dict__ = held
    return duplicate


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _TABLES:
        return _copy_dict(value, memo) if value else kind()
    if kind in _SHARED_TYPES or (kind is tuple and _SHARED_TYPES.issuperset(map(type, value))):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind is set and _SHARED_TYPES.issuperset(map(type, value)):
        return memo.setdefault(id(value), set(value))
    if (
        isinstance(value, Tensor) and not value.is_leaf
    ):  # left by a forward pass, as the weight of weight norm
        return memo.setdefault(id(value), value.detach().clone())
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    try:
        return copy.deepcopy(value, memo)
    except TypeError:  # what Python cannot copy, such as an operator or a lock, is shared
        return value


def _copy_dict(value: dict[Any, Any], memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = fresh = type(value)()
    for key, item in value.items():
        fresh[key] = _copy_value(item, memo)
    return fresh

"""Copies of a model that exchange or share its tensors instead of copying them."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_SHARED_TYPES = frozenset(
    (int, float, str, bool, type(None), torch.dtype, torch.device, type, BuiltinFunctionType)
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
    rebuilt by hand, functions that read the model itself read the copy, and everything else that modules hold
    is copied as Python would.

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
    return _Copying([module for _, module in modules_of(model)], memo).module(model)


def drop_foreign_hooks(model: nn.Module) -> None:
    """Remove the hooks that are not part of what a private copy of a model computes.

    The hooks of torch (weight norm) and of the installed library that a module's class comes from (hidden
    states that are captured) belong to it. All others are the user's, who does not expect them to be called.
    """
    for hooks, key in _foreign_hooks(model):
        del hooks[key]


@contextlib.contextmanager
def foreign_hooks_unseen(*models: nn.Module) -> Iterator[None]:
    """The user's hooks run as ever, but torch functions that they call show in no torch function mode.

    A trace runs without them, so that its numbers of calls count the model's own calls alone.
    """
    found = [(hooks, key, hooks[key]) for model in models for hooks, key in _foreign_hooks(model)]
    try:
        for hooks, key, hook in found:
            hooks[key] = _unseen(hook)
        yield
    finally:
        for hooks, key, hook in found:
            if key in hooks:  # a hook may remove itself
                hooks[key] = hook


def _unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return call


def _foreign_hooks(model: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The tables of hooks that hold hooks of the user, each with a key of one."""
    modules = [module for _, module in modules_of(model)]
    hooked = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks) if hooks]
    if not hooked:
        return []
    classes = {_package(type(module)) for module in modules}
    packages = {"torch", *(package for package in classes if _is_installed(package))}
    return [(hooks, key) for hooks in hooked for key, hook in hooks.items() if _package(hook) not in packages]


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


def saved_widths(model: nn.Module) -> dict[str, int]:
    """For each tensor that the ``state_dict`` holds the bytes of one of its numbers."""
    unsaved = unsaved_buffers(model)
    found = registered_tensors(model).items()
    return {name: tensor.element_size() for name, tensor in found if name not in unsaved}


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


class _Copying:
    """One copy in the making.

    Args:
        own: The modules of the model.
        memo: What is copied already, by the ``id`` of what it was copied from.
    """

    def __init__(self, own: Sequence[nn.Module], memo: dict[int, Any]) -> None:
        self._own, self._memo = {id(module) for module in own}, memo

    def module(self, module: nn.Module) -> nn.Module:
        """A copy of a module and of what it holds."""
        if id(module) in self._memo:
            known: nn.Module = self._memo[id(module)]
            return known
        if "__deepcopy__" in type(module).__dict__ or isinstance(module, torch.jit.ScriptModule):
            return copy.deepcopy(module, self._memo)
        duplicate: nn.Module = object.__new__(type(module))  # torch.fx would make a class without `forward`
        self._memo[id(module)] = duplicate
        held = module.__dict__.copy()
        for name, value in held.items():  # most are switches and empty tables of hooks
            kind = type(value)
            if kind in _SHARED_TYPES:
                continue
            held[name] = kind() if kind in _TABLES and not value else self._value(value)
        duplicate.__dict__ = held
        return duplicate

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind in _TABLES:
            return self._table(value) if value else kind()
        if kind in _SHARED_TYPES or (kind is tuple and _SHARED_TYPES.issuperset(map(type, value))):
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if kind is FunctionType:
            return self._function(value)
        if kind is set and _SHARED_TYPES.issuperset(map(type, value)):
            return self._memo.setdefault(id(value), set(value))
        if (
            isinstance(value, Tensor) and not value.is_leaf
        ):  # left by a forward pass, as the weight of weight norm
            return self._memo.setdefault(id(value), value.detach().clone())
        if isinstance(value, nn.Module):
            return self.module(value)
        try:
            return copy.deepcopy(value, self._memo)
        except TypeError:  # what Python cannot copy, such as an operator or a lock, is shared
            return value

    def _table(self, value: dict[Any, Any]) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        self._memo[id(value)] = fresh = type(value)()
        for key, item in value.items():
            fresh[key] = self._value(item)
        return fresh

    def _function(self, function: FunctionType) -> FunctionType:
        """The function; one of the copy, where it reads the model itself as a lambda does that says ``self``.

        ``copy.deepcopy`` would leave it to compute with the weights of the original.
        """
        if id(function) in self._memo:
            known: FunctionType = self._memo[id(function)]
            return known
        cells = function.__closure__ or ()
        new = tuple(self._cell(cell) for cell in cells)
        if all(one is other for one, other in zip(cells, new, strict=True)):
            return function
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, new
        )
        made.__kwdefaults__, made.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        self._memo[id(function)] = made
        return made

    def _known(self, held: Any) -> Any:
        """What a function knows, or what stands for it in the copy, where that is of the model."""
        if id(held) in self._own:
            return self.module(held)
        if isinstance(held, Tensor):
            return self._memo.get(id(held), held)
        if isinstance(held, MethodType) and id(held.__self__) in self._own:
            return MethodType(held.__func__, self.module(held.__self__))  # type: ignore[arg-type]
        return self._function(held) if type(held) is FunctionType else held

    def _cell(self, cell: CellType) -> CellType:
        if id(cell) not in self._memo:
            try:
                held = cell.cell_contents
            except ValueError:  # not filled yet
                return cell
            self._memo[id(cell)] = cell  # a function may know itself
            new = self._known(held)
            if new is not held:
                self._memo[id(cell)] = CellType(new)
        known: CellType = self._memo.get(id(cell), cell)
        return known

"""The lists of models by name, and those of a file of the user's own."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.zoo.example import Case, Example
from secateurs.errors import UnknownNameError
from secateurs.graph import Inputs

_HOMES = {  # list -> module and function, imported when asked for
    "torchvision": ("torchvision_models", "cases"),
    "timm-families": ("timm_models", "families"),
    "timm-all": ("timm_models", "everything"),
    "transformers": ("transformers_models", "cases"),
    "others": ("others", "cases"),
}


def cases_of(name: str) -> dict[str, Case]:
    """The cases of a list.

    Args:
        name: A list, or the path of a Python file with a mapping ``MODELS`` from names to functions that
            return a model and its inputs, or an `Example`.

    Raises:
        UnknownNameError: There is neither such a list nor such a file.
    """
    if name.endswith(".py") and Path(name).is_file():
        makers: dict[str, Callable[[], Example | tuple[nn.Module, Inputs]]] = runpy.run_path(name)["MODELS"]
        return {model: partial(_of_user, make) for model, make in makers.items()}
    if name not in _HOMES:
        raise UnknownNameError("list of models", name, _HOMES)
    module, function = _HOMES[name]
    cases: dict[str, Case] = getattr(importlib.import_module(f"benchmarks.zoo.{module}"), function)()
    return cases


def _of_user(make: Callable[[], Example | tuple[nn.Module, Inputs]]) -> Example:
    made = make()
    if isinstance(made, Example):
        return made
    model, inputs = made
    return Example(model=model, inputs=inputs)

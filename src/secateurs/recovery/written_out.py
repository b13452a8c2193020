"""Calls that hold several steps, run one by one, so that the products among them can be seen and refitted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateurs.recovery.grouped_products import GROUPED, grouped_steps
from secateurs.recovery.recurrence import RECURRENT, steps_of
from secateurs.recovery.spelled import ADDED, MULTIPLIED, SPELLED, SUMMED, Product
from secateurs.recovery.wide_products import BILINEAR, WideProduct, bilinear_steps

_IN_STEPS = RECURRENT | GROUPED | SPELLED | SUMMED | BILINEAR | ADDED.keys()


class WrittenOut(TorchFunctionMode):
    """Recurrent layers, and products that are no layers as they stand, run in steps that other modes see.

    These are entered before this one. Outputs are the same to rounding. Recurrent layers that drop out
    between their levels, in training, run as they are.

    Example:
        >>> layer, x = torch.nn.GRU(3, 4, num_layers=2, bidirectional=True).eval(), torch.randn(5, 2, 3)
        >>> with torch.no_grad(), WrittenOut():
        ...     outputs, state = layer(x)
        >>> torch.allclose(outputs, layer(x)[0], atol=1e-6), torch.allclose(state, layer(x)[1], atol=1e-6)
        (True, True)

    Attributes:
        runs: How many such calls have begun.
        is_inside: Whether the steps of one of them run.
        units: Of a product that is no layer, while it runs; see `WideProduct.units`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.is_inside = 0, False
        self.units: Mapping[int, tuple[int, int]] = {}
        self._products: dict[int, tuple[weakref.ref[Tensor], Product, tuple[int, int]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = self._steps(func, args, kwargs or {})
        if run is None:
            out = func(*args, **(kwargs or {}))
            if func in MULTIPLIED:
                self._note(args, out)
            return out
        self.runs, self.is_inside = self.runs + 1, True
        try:
            return run()
        finally:
            self.is_inside, self.units = False, {}

    def _steps(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What runs a call in steps, if there are any."""
        if func not in _IN_STEPS or (kwargs and func in RECURRENT):
            return None
        with torch._C.DisableTorchFunction():  # looking at what is given is no step
            if func in RECURRENT:
                return steps_of(func, args)
            if func in BILINEAR:
                return bilinear_steps(args, kwargs)
            if func in GROUPED:
                steps = grouped_steps(args, kwargs)
                self.units = {} if steps is None else steps[1]
                return None if steps is None else steps[0]
            if func in SUMMED:
                factors = self._factors(args)
                product = None if factors is None else WideProduct.of_sum(factors, args, kwargs)
            elif func in ADDED:
                product = None if kwargs or len(args) != 3 else WideProduct.of(ADDED[func], args[1:], kwargs)
            else:
                product = WideProduct.of(func, args, kwargs)
        if product is None:
            return None
        self.units, run = product.units, product.run
        return run if func not in ADDED else lambda: args[0] + run()

    def _note(self, args: tuple[Any, ...], out: Any) -> None:
        """Remember what a product by elements was made of, for as long as it is there."""
        with torch._C.DisableTorchFunction():
            product = Product.of(args, out)
        if product is None:
            return
        key, made = id(out), weakref.ref(out, lambda gone: self._forget(key, gone))
        self._products[key] = made, product, (out._version, product.x._version)

    def _forget(self, key: int, gone: weakref.ref[Tensor]) -> None:
        if key in self._products and self._products[key][0] is gone:
            del self._products[key]

    def _factors(self, args: tuple[Any, ...]) -> Product | None:
        """What the product by elements that is summed over was made of, if that is as it was."""
        made, product, versions = self._products.get(id(args[0]), (None, None, None)) if args else (None,) * 3
        given = None if made is None else made()
        if given is None or given is not args[0] or product is None:
            return None
        return product if versions == (given._version, product.x._version) else None

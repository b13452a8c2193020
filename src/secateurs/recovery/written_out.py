"""Calls that hold several steps, run one by one, so that the products among them can be seen and refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from secateurs.recovery.recurrence import RECURRENT, steps_of
from secateurs.recovery.wide_products import WITH_WIDE_WEIGHTS, WideProduct


class WrittenOut(TorchFunctionMode):
    """Recurrent layers, and products with weights of more dimensions, run in steps that other modes see.

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
        units: Of a product with a weight of more dimensions, while it runs; see `WideProduct.units`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.is_inside = 0, False
        self.units: Mapping[int, tuple[int, int]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = self._steps(func, args, kwargs or {})
        if run is None:
            return func(*args, **(kwargs or {}))
        self.runs, self.is_inside = self.runs + 1, True
        try:
            return run()
        finally:
            self.is_inside, self.units = False, {}

    def _steps(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What runs a call in steps, if there are any."""
        if func not in WITH_WIDE_WEIGHTS and (func not in RECURRENT or kwargs):
            return None
        with torch._C.DisableTorchFunction():  # looking at what is given is no step
            if func in RECURRENT:
                return steps_of(func, args)
            product = WideProduct.of(func, args, kwargs)
        self.units = {} if product is None else product.units
        return None if product is None else product.run

"""Complex numbers and Fourier transforms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateurs.graph.labels import Dim
from secateurs.graph.rules.common import fixed
from secateurs.graph.rules.registry import aten, rule
from secateurs.graph.tracing import Tracer


@rule(aten.view_as_real)
def view_as_real(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Real and imaginary part as a new last dimension."""
    t.set(out, [*t.dims(args[0]), Dim(2)])


@rule(aten.view_as_complex)
def view_as_complex(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A last dimension of real and imaginary part vanishes."""
    *dims, parts = t.dims(args[0])
    t.lock(parts, "it is a real and an imaginary part")
    t.set(out, dims)


@rule(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def fourier(t: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Transformed dimensions keep their size, the others pass."""
    dims = list(t.dims(args[0]))
    for place in args[1]:
        t.lock(dims[place], "it is transformed as a whole")
        dims[place] = fixed(out)[place]
    t.set(out, dims)

"""How much is to remain, or how many units are to leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateurs.errors import BudgetError

QUANTITIES = ("units", "params", "macs", "bytes", "latency")
LIMITS = ("params", "macs", "bytes", "latency_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The share of one quantity that remains.

    Args:
        units: Share of the units of the groups that may be cut.
        params: Share of the model's parameters.
        macs: Share of its multiply-accumulates.
        bytes: Share of the bytes of its tensors, parameters and buffers, each in its own type: of the file.
        latency: Share of the time of a forward pass. `secateurs.plan` forecasts it with a
            `secateurs.LatencyModel`; `secateurs.prune_steps` measures as well, and cuts until it is met.

    Raises:
        BudgetError: Not exactly one share is given, or it is not in (0, 1].

    Example:
        >>> Budget(macs=0.5).quantity, Budget(macs=0.5).share
        ('macs', 0.5)
    """

    units: float | None = None
    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        name, share = _only(self, QUANTITIES, "a budget states", "Budget(macs=0.5)")
        if not 0 < share <= 1:
            fix = f"Budget({name}=0.5)"
            if share > 1 and name != "units":
                limit = "latency_ms" if name == "latency" else name
                fix += f", or AtMost({limit}={share:g}) for a number"
            raise BudgetError(f"0 < {name} <= 1 must hold, got {name}={share}", fix=fix)

    @property
    def quantity(self) -> str:
        """What is budgeted: ``units``, ``params``, ``macs``, ``bytes`` or ``latency``."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    @property
    def share(self) -> float:
        """The share that remains, in (0, 1]."""
        return float(getattr(self, self.quantity))


@dataclass(frozen=True, slots=True, kw_only=True)
class AtMost:
    """What a model may have, in numbers: a limit of the place where it must run.

    Args:
        params: Parameters.
        macs: Multiply-accumulates of one example.
        bytes: Bytes of its tensors, parameters and buffers; the header of a file adds some kilobytes.
        latency_ms: Milliseconds of a forward pass. `secateurs.plan` takes them by its `LatencyModel`,
            `secateurs.prune_steps` as they are measured here and now.

    Raises:
        BudgetError: Not exactly one limit is given, or it is not positive.

    Example:
        >>> AtMost(bytes=4_000_000).of(16_000_000)
        Budget(units=None, params=None, macs=None, bytes=0.25, latency=None)
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        name, amount = _only(self, LIMITS, "a limit is on", "AtMost(bytes=4e6)")
        if not amount > 0:
            raise BudgetError(f"{name} > 0 must hold, got {name}={amount}", fix="AtMost(bytes=4e6)")

    @property
    def limited(self) -> str:
        """What is limited: ``params``, ``macs``, ``bytes`` or ``latency_ms``."""
        return next(name for name in LIMITS if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """How much there may be of it."""
        return float(getattr(self, self.limited))

    def of(self, whole: float) -> Budget:
        """The share that remains of a model which has so much of it; all where that is within the limit."""
        return Budget(**{self.limited.removesuffix("_ms"): min(1.0, self.amount / max(whole, 1e-30))})


def _only(stated: Budget | AtMost, names: Sequence[str], what: str, fix: str) -> tuple[str, float]:
    """The one of some names that something is stated of, and what."""
    given = {name: getattr(stated, name) for name in names if getattr(stated, name) is not None}
    if len(given) != 1:
        raise BudgetError(f"{what} exactly one of {', '.join(names)}; got {given}", fix=fix)
    return next(iter(given.items()))


@dataclass(frozen=True, slots=True)
class Remove:
    """A number of units that leave, whatever that saves: the article's 512 filters a step.

    Args:
        units: How many.

    Raises:
        BudgetError: The number is negative.
    """

    units: int

    def __post_init__(self) -> None:
        if self.units < 0:
            raise BudgetError(f"units >= 0 must hold, got units={self.units}", fix="Remove(512)")


def nothing_said() -> BudgetError:
    """The error where neither a budget nor single groups say how much is to leave."""
    return BudgetError("say how much is to leave: a budget, shares or an allocation", fix="Budget(macs=0.5)")

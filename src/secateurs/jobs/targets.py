"""Targets of a pruning job: a share of a quantity, or a number of which there may be no more."""

from __future__ import annotations

from collections.abc import Mapping

from secateurs.errors import BudgetError
from secateurs.planning.budgets import LIMITS, QUANTITIES, AtMost


def check_target(target: tuple[str, float]) -> None:
    """Refuse a target that is neither a share nor a limit.

    Raises:
        BudgetError: It is none.
    """
    quantity, amount = target
    is_share = quantity in QUANTITIES and 0 < amount <= 1
    if not is_share and not (quantity in LIMITS and amount > 0):
        raise BudgetError(
            f"a target is one of {', '.join(QUANTITIES)} and a share in (0, 1], or at most so much of one, "
            f"as bytes=4MB or latency=20ms; got {quantity}={amount:g}",
            fix="--target macs=0.3",
        )


def limit_of(target: tuple[str, float] | None) -> AtMost | None:
    """The limit that a target is; None for a share.

    Example:
        >>> limit_of(("macs", 0.5)), limit_of(("latency_ms", 0.5)).limited
        (None, 'latency_ms')
    """
    if target is None or (target[0] in QUANTITIES and target[1] <= 1):
        return None
    return AtMost(**{target[0]: target[1]})


def as_share(
    target: tuple[str, float] | None, whole: Mapping[str, float], *, header: int = 0
) -> tuple[str, float] | None:
    """A target with a limit as a share.

    Args:
        target: The target. One of what `whole` lacks stays as it is.
        whole: What there is of each quantity before the first cut.
        header: Bytes of the file that hold no weights.

    Raises:
        BudgetError: There is no more than the limit, or the header alone is.

    Example:
        >>> as_share(("bytes", 4e6), {"bytes": 16_000_000})
        ('bytes', 0.25)
    """
    limit = limit_of(target)
    if limit is None or limit.limited not in whole:
        return target
    have, beside = whole[limit.limited], header if limit.bytes is not None else 0
    told = f"{limit.limited}={_number(limit.amount)} at most, where the model has {_number(have + beside)}"
    if limit.amount >= have + beside:
        raise BudgetError(f"{told}, leaves nothing to cut", fix="lower the target")
    if limit.amount <= beside:
        raise BudgetError(f"{told} and {beside:,} of them are the file's header", fix="raise the target")
    budget = AtMost(**{limit.limited: limit.amount - beside}).of(have)
    return budget.quantity, budget.share


def _number(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"

"""How fast a network gets smaller: what remains after each of several steps."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from secateurs.errors import BudgetError, UnknownNameError

Pace: TypeAlias = Literal["one-shot", "linear", "geometric", "cubic"]
PACES: tuple[str, ...] = tuple(sorted(get_args(Pace)))


def paced_share(pace: str, progress: float, share: float) -> float:
    """The share that remains a part of the way to ``share``.

    With ``t`` for ``progress``: ``geometric`` is ``share^t``, so that each step takes the same share of what
    is there; ``linear`` is ``1 - (1 - share) t``, the same amount in each step; ``cubic`` is
    ``1 - (1 - share) (1 - (1 - t)^3)``, much at first, when there is much to spare, and little at the end;
    ``one-shot`` is all in the first step.

    Args:
        pace: One of `PACES`.
        progress: 0 at the beginning, 1 at the end.
        share: What remains at the end, in (0, 1].

    Returns:
        A share in [``share``, 1].

    Raises:
        UnknownNameError: There is no such pace.
        BudgetError: ``progress`` is not in [0, 1].

    Example:
        >>> [round(paced_share("geometric", step / 2, 0.25), 2) for step in (0, 1, 2)]
        [1.0, 0.5, 0.25]
        >>> [round(paced_share(pace, 1 / 2, 0.2), 2) for pace in ("linear", "cubic", "one-shot")]
        [0.6, 0.3, 0.2]
    """
    if pace not in PACES:
        raise UnknownNameError("pace", pace, PACES)
    if not 0 <= progress <= 1:
        raise BudgetError(f"`0 <= progress <= 1` must hold, got progress={progress}")
    if pace == "geometric":
        return float(share**progress)
    gone = {"linear": progress, "cubic": 1 - (1 - progress) ** 3, "one-shot": float(progress > 0)}[pace]
    return 1 - (1 - share) * gone if gone < 1 else share

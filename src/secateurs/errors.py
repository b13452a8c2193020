"""The exceptions of Secateurs.

```
SecateursError
├── TraceError        the model could not be run or understood
├── ScoreError        a criterion could not be computed
│   └── UnrankedError a criterion has nothing to rank a group by; other groups have their scores
├── PlanError         a plan does not fit, or cannot be made
│   ├── BudgetError   no plan meets the budget
│   └── PatternError  a pattern matches no group of the model
├── ApplyError        the surgery was refused; the model is as it was
├── VerifyError       the smaller model does not compute what it should
├── DataError         a data set is missing, empty or inconsistent
├── ModelError        a model cannot be built or its weights do not fit
├── RunError          a run directory is missing, foreign or damaged
├── TrainingError     training was refused or diverged
│   └── TrainingStoppedError  it went wrong on the way; the model has its best weights
└── UnknownNameError  a name that nothing is registered under
```
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateurs.recovery.history import History


class SecateursError(Exception):
    """Base of every error that Secateurs raises on purpose.

    Args:
        message: What is wrong, with names and values, in one sentence.
        where: The place: a parameter, a file, a line of the model's source.
        fix: What to do about it, as code or a command that the reader can paste.
    """

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class TraceError(SecateursError):
    """The model could not be run on its example inputs, or its operators not be followed."""


class ScoreError(SecateursError):
    """A criterion could not be computed."""


class UnrankedError(ScoreError):
    """A group has nothing that a criterion could rank it by, such as a batch norm's scales."""


class PlanError(SecateursError):
    """A plan does not fit the model, or cannot be made."""


class BudgetError(PlanError):
    """No plan meets the budget; the message says how far one can go."""


class PatternError(PlanError):
    """A pattern of groups matches none of the model; the message has the nearest name."""


class ApplyError(SecateursError):
    """The surgery was refused; the model given is unchanged."""


class VerifyError(SecateursError):
    """The smaller model's output differs from the silenced original's."""


class DataError(SecateursError):
    """A data set is missing, empty or inconsistent."""


class ModelError(SecateursError):
    """A model cannot be built, or its weights do not fit it."""


class RunError(SecateursError):
    """A run directory is missing, foreign or damaged."""


class TrainingError(SecateursError):
    """Training diverged or could not go on."""


class TrainingStoppedError(TrainingError):
    """Training went wrong on the way: it diverged, or ran out of memory. The model has its best weights.

    Attributes:
        history: What happened until then, if anything was measured.
    """

    history: History | None = None


class UnknownNameError(SecateursError):
    """A name that nothing is registered under.

    Args:
        kind: What was looked up, such as ``"criterion"``.
        name: The name that was not found.
        known: Every name that would have been.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"unknown {kind} {name!r}{nearest(name, names)}", fix=f"use one of: {', '.join(names)}"
        )
        self.name = name


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the one that was meant, if any is close.

    Example:
        >>> nearest("tailor", ["l1", "taylor"])
        "; did you mean 'taylor'?"
    """
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are.

    Example:
        >>> some(["a", "b"]), some(["a", "b", "c", "d"])
        ('a, b', 'a, b, c and 1 more')
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

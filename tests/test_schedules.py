"""The paces: ends, order, and what each promises of its steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateurs
from secateurs.errors import BudgetError, SecateursError, UnknownNameError
from secateurs.planning.schedules import PACES, paced_share

STEPS = 8


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("pace", PACES)
def test_every_pace_begins_whole_ends_at_the_share_and_never_grows(pace: str, share: float) -> None:
    shares = [paced_share(pace, step / STEPS, share) for step in range(STEPS + 1)]
    assert shares[0] == 1.0
    assert shares[-1] == share  # to the bit: a budget must be met
    assert all(before >= after >= share for before, after in pairwise(shares))


def test_geometric_takes_the_same_share_and_linear_the_same_amount() -> None:
    geometric, linear = (
        [paced_share(pace, step / STEPS, 0.2) for step in range(STEPS + 1)]
        for pace in ("geometric", "linear")
    )
    ratios = [after / before for before, after in pairwise(geometric)]
    amounts = [before - after for before, after in pairwise(linear)]
    assert ratios == pytest.approx([0.2 ** (1 / STEPS)] * STEPS)
    assert amounts == pytest.approx([0.8 / STEPS] * STEPS)


def test_cubic_is_the_usual_formula_of_sparsities() -> None:
    """A sparsity ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3`` with ``s_i = 0``."""
    final = 1 - 0.3
    for step in range(STEPS + 1):
        sparsity = final + (0 - final) * (1 - step / STEPS) ** 3
        assert paced_share("cubic", step / STEPS, 0.3) == pytest.approx(1 - sparsity)


def test_mistakes_are_said() -> None:
    with pytest.raises(UnknownNameError, match="unknown pace 'cubix'; did you mean 'cubic'"):
        paced_share("cubix", 0.5, 0.5)
    with pytest.raises(BudgetError, match=r"got progress=1\.5"):
        paced_share("cubic", 1.5, 0.5)


@pytest.mark.parametrize(
    ("pace", "widths"), [("geometric", [40, 16]), ("linear", [58, 16]), ("cubic", [27, 16])]
)
def test_steps_of_a_network_keep_the_pace(pace: str, widths: list[int]) -> None:
    net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    steps = secateurs.prune_steps(
        net, torch.randn(1, 4), criterion="l2", budget=secateurs.Budget(units=0.16), steps=2, pace=pace
    )
    assert [step.model[0].out_features for step in steps] == pytest.approx(widths, abs=1)


def test_one_shot_is_one_step() -> None:
    net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    with pytest.raises(SecateursError, match="one-shot is one step, got steps=3"):
        next(
            secateurs.prune_steps(
                net, torch.randn(1, 4), budget=secateurs.Budget(units=0.5), steps=3, pace="one-shot"
            )
        )

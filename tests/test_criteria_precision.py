"""Scores in mixed precision, and of models in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

import secateurs
from models import PlainVgg, build
from secateurs.criteria import names

# zeros, bins, second differences and least squares do not survive eight bits of precision unchanged
ROUGH = {"apoz", "nonzero-count", "mutual-information", "obd", "hessian", "reconstruction"}


@pytest.mark.parametrize("criterion", sorted(set(names()) - {"random"}))
def test_under_autocast_ranks_stay_and_totals_are_precise(criterion: str) -> None:
    torch.manual_seed(0)
    model = build(PlainVgg)
    data = [(model.example(16), torch.randint(4, (16,))) for _ in range(2)]
    graph = secateurs.trace(model, model.example())
    call = {"data": data, "loss_fn": F.cross_entropy}
    full = secateurs.score(model, graph, criterion, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = secateurs.score(model, graph, criterion, **call)
    for name, values in full.items():
        assert low[name].dtype == torch.float64
        assert low[name].isfinite().all()
        if criterion not in ROUGH:
            assert spearmanr(low[name], values).statistic > 0.9
            assert torch.allclose(low[name], values, rtol=0.1, atol=0.12 * float(values.abs().max()))
    assert all(parameter.grad is None for parameter in model.parameters())

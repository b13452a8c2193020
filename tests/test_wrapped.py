"""Models that come wrapped, patched or converted: cut like any other, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.errors import ScoreError, TraceError, VerifyError

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6 * 25, 4)).eval()


def patched() -> nn.Module:
    """A forward of the instance, which calls the one it took the place of."""
    model = plain()

    def doubled(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: 2 * forward(x)

    model.forward = doubled(model.forward)  # type: ignore[method-assign]
    return model


WRAPPED: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "data parallel": lambda: nn.DataParallel(plain()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(plain()).eval(),
    "compiled": lambda: torch.compile(plain(), backend="eager"),
    "symbolically traced": lambda: torch.fx.symbolic_trace(plain()),
    "patched": patched,
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.filterwarnings("ignore")  # what torch says when it is compiled
def test_it_is_cut_like_any_other(name: str) -> None:
    model = WRAPPED[name]()
    before = model(X)
    graph = secateurs.trace(model, X)
    assert [group.size for group in graph.groups] == [8, 6]
    plan = secateurs.plan(
        graph, secateurs.score(model, graph, "l2"), secateurs.Budget(units=0.5), scope="local"
    )
    small = secateurs.apply(model, plan)
    assert secateurs.verify(model, small, plan, X).ok
    assert type(small) is type(model) and torch.equal(model(X), before)
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    after = small(X)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert after.any() and not small(X).any() and torch.equal(model(X), before)


class Hidden(nn.Module):
    """Layers in a plain list are no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: torch.jit.script(plain()), "is a TorchScript module, whose code and sizes are fixed"),
        (lambda: torch.jit.trace(plain(), X), "is a TorchScript module, whose code and sizes are fixed"),
        (lambda: torch.export.export(plain(), (X,)).module(), "an exported program has fixed sizes"),
        (Hidden, "Hidden registers no parameters, so nothing can be cut"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_what_cannot_be_cut_is_refused_with_the_reason(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        secateurs.trace(make(), X)


def test_weights_without_values_have_no_importance_and_prove_nothing() -> None:
    model = plain().to("meta")
    graph = secateurs.trace(model, X)
    with pytest.raises(ScoreError, match="l2 reads weights, and on the meta device they have no values"):
        secateurs.score(model, graph, "l2")
    with pytest.raises(ScoreError, match="apoz reads weights"):
        secateurs.score(model, graph, "apoz", data=[X])
    plan = secateurs.plan(graph, secateurs.score(model, graph, "random"), secateurs.Budget(units=0.5))
    with pytest.raises(VerifyError, match="on the meta device weights have no values"):
        secateurs.verify(model, secateurs.apply(model, plan), plan, X)

"""The conformance kit finds what is wrong: rules that lie, lock, fail or are missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import secateurs
import sequence_models
from models import build
from secateurs.graph.rules import registry
from secateurs.testing import Sandwich, check_model, check_rule, cuts, fitting


@torch.library.custom_op("secateurs_tests::neighbours", mutates_args=())
def neighbours(x: Tensor, shift: int = 1, *, scale: float = 1.0) -> Tensor:
    """Each channel plus the one before it: it computes across channels, and tells them apart."""
    return scale * (x + x.roll(shift, 1))


@neighbours.register_fake
def _(x: Tensor, shift: int = 1, *, scale: float = 1.0) -> Tensor:
    return torch.empty_like(x)


def _keeps(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.set(out, tracer.dims(args[0]))


def _mixes(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.mix(tracer.dims(args[0])[1], "neighbours")
    tracer.set(out, tracer.dims(args[0]))


def _locks(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.lock(tracer.dims(args[0])[1], "neighbours are told apart")
    tracer.set(out, tracer.dims(args[0]))


def _forgets_a_dimension(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    tracer.set(out, tracer.dims(args[0])[1:])


def _shifts(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
    dims = list(tracer.dims(args[0]))
    dims[1] = tracer.labels.take(dims[1], slice(None, None, -1))
    tracer.set(out, dims)


WRONG = {
    "a rule that claims too much": (_keeps, {}, "removing .* differ|moves inputs"),
    "labels in another order": (_shifts, {}, "removing .* differ|moves inputs"),
    "a rule that mixes, said to be exact": (_mixes, {}, "its rule mixes"),
    "a rule that does not mix, said to": (_keeps, {"exact": False}, "does not say so"),
    "a rule that locks": (_locks, {}, "none of the 12 units can be cut: neighbours are told apart"),
    "a rule that fails": (_forgets_a_dimension, {}, "the rule of secateurs_tests.neighbours.default failed"),
    "no rule": (None, {}, "secateurs_tests.neighbours.default has no rule"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kit_says_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, options, message = WRONG[name]
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_FOUND", {})
    if rule is not None:
        secateurs.rule(torch.ops.secateurs_tests.neighbours)(rule)
    with pytest.raises(AssertionError, match=message):
        check_rule(neighbours, torch.randn(3, 4, 8, 8), **options)


def test_a_rule_gets_every_argument_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_FOUND", {})
    seen: list[Any] = []

    @secateurs.rule("secateurs_tests::neighbours")
    def noting(tracer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        seen.append((args[1], args.get("shift"), args.get("scale", "none"), kwargs))
        _locks(tracer, args, kwargs, out)

    for call in (
        lambda x: neighbours(x),
        lambda x: neighbours(shift=2, x=x),
        lambda x: neighbours(x, 3, scale=2.0),
    ):
        secateurs.trace(Sandwich(call, torch.zeros(1, 3, 4, 4)), torch.zeros(1, 3, 4, 4))
    assert seen[0][:3] == (1, 1, "none") and seen[0][3] == {"scale": 1.0}
    assert (2, 2) in [each[:2] for each in seen]
    assert (3, 3, "none", {"scale": 2.0}) in seen


def test_the_kit_leaves_the_random_state_and_the_model_alone() -> None:
    model = build(models.PlainVgg)
    inputs = model.example()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model, inputs)
    check_rule(torch.relu, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_cuts_leave_a_unit_in_every_group() -> None:
    graph = secateurs.trace(build(models.PlainVgg), models.PlainVgg().example())
    found = cuts(graph)
    assert len(found) == 2 * len(graph.groups) + 1
    for removed in found:
        assert all(0 < len(places) < graph.by_name[name].size for name, places in removed.items())


def test_cuts_of_tied_counts_fit_together() -> None:
    model = build(sequence_models.AttentionWrittenOut)
    graph = check_model(model, model.example())
    every = [{g.name: g.size - len(removed.get(g.name, ())) for g in graph.groups} for removed in cuts(graph)]
    assert all(kept["embed"] == kept["qkv"] * kept["qkv#2"] for kept in every)
    assert fitting(graph, {"embed": [3, 4, 8, 9]}) != {}
    assert {3, 4, 8, 9} <= set(fitting(graph, {"embed": [3, 4, 8, 9], "qkv": [1]})["embed"])


def test_a_shape_that_no_layer_reads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 to 5 dimensions is needed, got shape \(3,\)"):
        check_rule(torch.relu, torch.randn(3))


def test_what_python_cannot_copy_is_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    model[0].operator = torch.ops.aten.relu  # type: ignore[assignment]
    check_model(model, torch.randn(1, 3, 4, 4))

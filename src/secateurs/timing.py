"""Measuring how the time of a forward pass follows from a cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateurs.errors import BudgetError
from secateurs.graph.cost import CallWork, kept_lengths
from secateurs.graph.groups import Graph
from secateurs.graph.running import Inputs, device_of, has_values
from secateurs.measure.calls import PassTime, call_ms
from secateurs.planning.fit import Fit
from secateurs.planning.latency import CallTime, LatencyModel, products
from secateurs.planning.limits import candidates
from secateurs.planning.plan import Plan
from secateurs.surgery.apply import apply

Numbers = npt.NDArray[np.float64]
_BLOCKS = (1, 8, 16, 32, 64, 128)
_BETTER = 0.9  # of the error that is left without blocks, for blocks to be believed
_USUAL = 0.75  # of the networks: those that a call's time fits best, as single ones may be disturbed
_LEAST = 1 / 8  # of a group's units, in the networks that are timed
_HELD_OUT = 3
_KERNELS = 800  # calls of all networks that take turns; oneDNN keeps 1,024 kernels


def latency_model(
    model: nn.Module, graph: Graph, inputs: Inputs, *, samples: int = 16, repeats: int = 5, seed: int = 0
) -> LatencyModel:
    """Time a model and random cuts of it, and fit the time of each call to its work.

    The time of a call is ``a + b x values + c x MACs`` with coefficients that are not negative, by least
    squares of relative errors. What lengths are rounded up to in the last is one of 1, 8, ..., 128 for all
    calls of one function on as many lengths, whichever explains their times best.

    Args:
        model: The model, where it is to run; it is not changed.
        graph: Its graph.
        inputs: What a forward pass is timed on, usually a batch of one.
        samples: Networks to time: the whole one, and physical cuts in which each group keeps a random number
            of units, an eighth or more of them.
        repeats: Passes of each, which take turns; the least time of a call counts.
        seed: Of the random numbers.

    Returns:
        The forecast of any cut's time on this machine.

    Raises:
        BudgetError: The model runs in other calls than its trace, or on the meta device.

    Example:
        >>> import secateurs
        >>> net, image = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 9)), torch.zeros(8, 64)
        >>> found = latency_model(net, secateurs.trace(net, image), image, samples=8)
        >>> found.ms({"0": range(256)}) <= found.ms()
        True
    """
    if not has_values(model):
        raise BudgetError("a model on the meta device takes no time", fix="model.to_empty(device='cpu')")
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device_of(model)), inputs)
    timed = _timed(model, graph, inputs, _random_cuts(graph, samples - 1, seed), repeats)
    rest = float(np.median([each.rest_ms for each in timed]))

    def fitted(some: Sequence[_Timed], error: float) -> LatencyModel:
        calls = _fitted(graph.work.calls, some)
        return LatencyModel(
            graph=graph,
            calls=calls,
            rest_ms=rest,
            error=error,
            device=str(device_of(model)),
            threads=torch.get_num_threads(),
        )

    held_out = timed[len(timed) - min(_HELD_OUT, len(timed) // 3) :]
    trial = fitted([each for each in timed if each not in held_out], 0.0)
    errors = [abs(trial.ms(each.removed) / (float(each.ms.sum()) + rest) - 1) for each in held_out]
    return fitted(timed, float(np.median(errors)) if errors else 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _Timed:
    """A network that was timed.

    Args:
        removed: Indices of the units that it lacks, by group name.
        lengths: ``(lengths,)`` what is kept of each length of the graph's work.
        ms: ``(calls,)`` milliseconds.
        rest_ms: Milliseconds between the calls.
    """

    removed: dict[str, range]
    lengths: Numbers
    ms: Numbers
    rest_ms: float


def _timed(
    model: nn.Module, graph: Graph, inputs: Inputs, cuts: Sequence[dict[str, range]], repeats: int
) -> list[_Timed]:
    """Time the whole model and cuts of it.

    Some cuts at a time take turns with the whole model, whose times say how fast the machine is meanwhile.
    They are few, as libraries keep a limited number of prepared kernels: where all networks take turns, each
    is prepared anew in every pass.
    """
    calls = len(graph.work.calls)
    some = max(_KERNELS // max(calls, 1) - 1, 1)
    wholes, found = [], []
    for start in range(0, max(len(cuts), 1), some):
        chosen = cuts[start : start + some]
        models = [apply(model, Plan.of(graph, removed)) for removed in chosen]
        whole, *others = call_ms([model, *models], inputs, repeats=repeats)
        if len(whole.ms) != calls:
            raise BudgetError(
                f"{type(model).__name__} makes {len(whole.ms)} calls of torch functions on these inputs and "
                f"{calls} in its trace, so their times cannot be told",
                fix="trace with these inputs, or state the budget in macs",
            )
        wholes.append(whole)
        found += [
            (removed, each, float(whole.ms.sum())) for removed, each in zip(chosen, others, strict=True)
        ]
    usual = float(np.median([whole.ms.sum() for whole in wholes]))
    typical = PassTime(
        np.median([whole.ms * usual / whole.ms.sum() for whole in wholes], axis=0),
        float(np.median([whole.rest_ms for whole in wholes])),
    )
    return [
        _Timed(
            removed,
            kept_lengths(graph.work.lengths, graph.mask(removed)),
            each.ms * usual / meanwhile,
            each.rest_ms * usual / meanwhile,
        )
        for removed, each, meanwhile in [({}, typical, usual), *found]
    ]


def _random_cuts(graph: Graph, count: int, seed: int) -> list[dict[str, range]]:
    chance = np.random.default_rng(seed)
    groups = candidates(graph)
    fit = Fit(graph, groups, 1)
    sizes = np.array([group.size for group in groups])
    cuts = []
    for _ in range(count):
        counts = fit((sizes * chance.uniform(0, 1 - _LEAST, len(groups))).astype(int).tolist())
        cuts.append({g.name: range(g.size - counts[g.name], g.size) for g in groups if counts[g.name]})
    return cuts


def _fitted(work: Sequence[CallWork], timed: Sequence[_Timed]) -> list[CallTime]:
    """A time for each call, with one block for all calls of a kind."""
    places: dict[tuple[str, int], list[int]] = {}
    for place, call in enumerate(work):  # a depthwise convolution runs in other kernels than a dense one
        places.setdefault((call.name, max((len(term[1]) for term in call.macs), default=0)), []).append(place)
    found: dict[int, CallTime] = {}
    for members in places.values():
        trials = []
        for block in _BLOCKS if any(_can_shrink(work[place].macs) for place in members) else (1,):
            fits = [_fit(work[place], place, timed, block) for place in members]
            trials.append((sum(error for _, error in fits), [call for call, _ in fits]))
        plain = trials[0]
        best = min(trials, key=lambda trial: trial[0])
        chosen = best if best[0] < _BETTER * plain[0] else plain
        found |= dict(zip(members, chosen[1], strict=True))
    return [found[place] for place in range(len(work))]


def _fit(call: CallWork, place: int, timed: Sequence[_Timed], block: int) -> tuple[CallTime, float]:
    """The time of one call, and how far it usually is from what was measured, in milliseconds."""
    ms = np.array([each.ms[place] for each in timed])
    columns: list[tuple[str, Callable[[Numbers], float]]] = []
    if _can_shrink(call.values):
        columns.append(("value_ms", lambda lengths: products(call.values, lengths)))
    if _can_shrink(call.macs):
        columns.append(("mac_ms", lambda lengths: products(call.macs, lengths, block)))
    if not columns:
        return CallTime(name=call.name, fixed_ms=float(np.median(ms))), 0.0
    table = np.array([[1.0, *(read(each.lengths) for _, read in columns)] for each in timed])
    scale = np.maximum(table.max(0), np.finfo(np.float64).tiny)
    weights = 1 / np.maximum(ms, np.finfo(np.float64).tiny)
    found = nnls(table / scale * weights[:, None], ms * weights)[0] / scale
    errors = np.sort(np.abs(table @ found - ms) * weights)[: max(round(_USUAL * len(ms)), 1)]
    error = float(np.sqrt((errors**2).mean()) * ms.max())
    rates = dict(zip((name for name, _ in columns), map(float, found[1:]), strict=True))
    return CallTime(
        name=call.name, fixed_ms=float(found[0]), block=block if rates.get("mac_ms") else 1, **rates
    ), error


def _can_shrink(terms: Sequence[tuple[float, tuple[int, ...]]]) -> bool:
    return any(places for _, places in terms)

"""A particle filter over masks, in the spirit of Anwar, Hwang and Sung.

What is reported of the paper, whose full text was not at hand: particles are masks, the weight of each
follows from the misclassification rate with it, and resampling deletes those of low weight. The rest here is
a reconstruction: the likelihood, the process noise, when to resample, and the evolutionary variant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from secateurs.errors import PlanError
from secateurs.planning.exact import Mask, MaskBudget
from secateurs.progress import Event, Observer, ignore

Weights: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterSettings:
    """How the filter runs.

    Args:
        particles: Masks at a time.
        generations: Rounds of move, weigh and resample after the first weighing.
        noise: Chance of each unit to be flipped between two rounds, before the budget is mended.
        temperature: The likelihood is ``exp(-error / temperature)``, of the misclassification rate in [0, 1];
            None for ``1 - error``, which hardly tells good masks from better ones.
        evolve: Whether copies are crossed and mutated, so that the particles stay different.
        crossover: With `evolve`: the chance of a copy to be crossed with another particle.
        mutation: With `evolve`: the chance of each unit of a copy to be flipped.
        seed: What every random number follows from.

    Raises:
        PlanError: A number is out of range.

    Example:
        >>> FilterSettings(particles=0)
        Traceback (most recent call last):
        secateurs.errors.PlanError: `particles >= 2` must hold, got particles=0
    """

    particles: int = 24
    generations: int = 12
    noise: float = 0.01
    temperature: float | None = 0.01
    evolve: bool = False
    crossover: float = 0.5
    mutation: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("particles", 2), ("generations", 0)):
            if getattr(self, name) < least:
                raise PlanError(f"`{name} >= {least}` must hold, got {name}={getattr(self, name)}")
        for name in ("noise", "crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"`0 <= {name} <= 1` must hold, got {name}={getattr(self, name)}")
        if self.temperature is not None and not self.temperature > 0:
            raise PlanError(f"`temperature > 0` must hold, got temperature={self.temperature}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One round.

    Args:
        best: The least error of any mask so far.
        mean: The mean error of the particles, weighted.
        effective: The effective number of particles, ``1 / sum w^2``.
        resampled: Whether they were resampled afterwards.
    """

    best: float
    mean: float
    effective: float
    resampled: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posterior:
    """What the filter ends with.

    Args:
        masks: ``(particles, units)`` True where a unit is kept.
        weights: ``(particles,)`` summing to one.
        best: The mask with the least error of all that were tried: the most likely one.
        error: Its misclassification rate.
        tried: Masks that were evaluated; one that comes up again is not evaluated again.
        history: The rounds.
    """

    masks: npt.NDArray[np.bool_]
    weights: Weights
    best: Mask
    error: float
    tried: int
    history: tuple[Generation, ...]

    def marginal(self) -> Weights:
        """For each unit the probability that it is kept: ``sum_i w_i x_i``; ``(units,)``."""
        found: Weights = self.weights @ self.masks.astype(np.float64)
        return found


def run_filter(
    error: Callable[[Mask], float],
    budget: MaskBudget,
    settings: FilterSettings,
    *,
    start: Mask | None = None,
    observer: Observer = ignore,
) -> Posterior:
    """Sample masks that meet a budget, the more often the fewer samples are misclassified with them.

    Args:
        error: The misclassification rate with a mask, in [0, 1].
        budget: What every mask meets, exactly.
        settings: How the filter runs.
        start: A mask to begin near to; particles are drawn at random without.
        observer: Told of each round as a ``"generation"`` event.

    Returns:
        The particles, and the best mask of all.

    Example:
        >>> from secateurs.planning.exact import ExactCounts, Stratum
        >>> budget = ExactCounts(np.zeros(8, np.int64), [1], [Stratum(np.arange(8), 4)])
        >>> wrong = lambda mask: mask[4:].mean()  # the first four units are the ones to keep
        >>> found = run_filter(wrong, budget, FilterSettings(noise=0.1, temperature=0.1))
        >>> found.best.astype(int).tolist(), found.error
        ([1, 1, 1, 1, 0, 0, 0, 0], 0.0)

    References:
        Anwar, Hwang, Sung, Structured Pruning of Deep Convolutional Neural Networks,
        https://arxiv.org/abs/1512.08571: this is a reconstruction in its spirit. Crossover and mutation in
        place of plain copies: Kwok et al., Evolutionary particle filter: re-sampling from the genetic
        algorithm perspective (2005).
    """
    chance = np.random.default_rng(settings.seed)
    known: dict[bytes, float] = {}

    def errors_of(masks: Sequence[Mask]) -> Weights:
        for mask in masks:
            key = mask.tobytes()
            if key not in known:
                known[key] = float(error(mask))
        return np.array([known[mask.tobytes()] for mask in masks])

    # the first particles: from the prior, or about the mask to start with
    if start is None:
        masks = [budget.draw(chance) for _ in range(settings.particles)]
    else:
        centre = budget.mend(start, chance)
        masks = [
            centre,
            *(_moved(centre, settings.noise, budget, chance) for _ in range(settings.particles - 1)),
        ]
    errors = errors_of(masks)
    weights = _reweighed(np.full(len(masks), 1 / len(masks)), errors, settings.temperature)
    best, least = masks[int(errors.argmin())], float(errors.min())
    history: list[Generation] = []
    for number in range(settings.generations + 1):
        # degenerate weights are made even by copying particles in proportion to them
        effective = effective_size(weights)
        last = number == settings.generations
        resampled = effective < settings.particles / 2 and not last
        history.append(
            Generation(best=least, mean=float(weights @ errors), effective=effective, resampled=resampled)
        )
        facts = {
            "number": number,
            "generations": settings.generations,
            "error": least,
            "effective": effective,
        }
        observer(Event("generation", facts))
        if last:
            break
        if resampled:
            places = systematic(weights, settings.particles, chance)
            masks = _copies(masks, places, weights, settings, budget, chance)
            weights = np.full(len(masks), 1 / len(masks))
        # the state moves, and what the validation images say weighs it
        masks = [_moved(mask, settings.noise, budget, chance) for mask in masks]
        errors = errors_of(masks)
        weights = _reweighed(weights, errors, settings.temperature)
        if errors.min() < least:
            best, least = masks[int(errors.argmin())], float(errors.min())
    return Posterior(
        masks=np.array(masks),
        weights=weights,
        best=best,
        error=least,
        tried=len(known),
        history=tuple(history),
    )


def effective_size(weights: Weights) -> float:
    """``1 / sum w^2`` of weights that sum to one: from 1 (one particle has all) to their number (all alike).

    Example:
        >>> effective_size(np.array([0.5, 0.5, 0.0]))
        2.0
    """
    return float(1 / np.square(weights).sum())


def systematic(weights: Weights, count: int, chance: np.random.Generator) -> npt.NDArray[np.int64]:
    """Places in proportion to weights, by one random number: each comes within one of ``count * w`` times.

    Args:
        weights: They sum to one.
        count: How many are drawn.
        chance: Where the random number comes from.

    Returns:
        ``(count,)`` ascending places.

    Example:
        >>> systematic(np.array([0.5, 0.25, 0.25]), 4, np.random.default_rng(0)).tolist()
        [0, 0, 1, 2]
    """
    points = (np.arange(count) + chance.random()) / count
    bounds = np.cumsum(weights)
    bounds[-1] = 1.0  # rounding must not leave the last point without a place
    return np.searchsorted(bounds, points, side="right").clip(max=len(weights) - 1).astype(np.int64)


def _reweighed(weights: Weights, errors: Weights, temperature: float | None) -> Weights:
    """Weights times likelihood; all alike where every likelihood is zero."""
    logs = np.log(weights.clip(min=1e-300))
    with np.errstate(divide="ignore"):
        logs = logs + (np.log(1 - errors) if temperature is None else -errors / temperature)
    if not np.isfinite(logs).any():
        return np.full(len(weights), 1 / len(weights))
    scaled = np.exp(logs - logs.max())
    found: Weights = scaled / scaled.sum()
    return found


def _moved(mask: Mask, chance_of_flip: float, budget: MaskBudget, chance: np.random.Generator) -> Mask:
    """Process noise: some units flipped, the budget mended."""
    return budget.mend(mask ^ (chance.random(budget.size) < chance_of_flip), chance)


def _copies(
    masks: Sequence[Mask],
    places: npt.NDArray[np.int64],
    weights: Weights,
    settings: FilterSettings,
    budget: MaskBudget,
    chance: np.random.Generator,
) -> list[Mask]:
    """The particles drawn; in the evolutionary variant all but the first copy of each are varied."""
    copies = []
    for number, place in enumerate(places):
        mask = masks[place]
        if settings.evolve and number and places[number - 1] == place:
            if chance.random() < settings.crossover:
                other = masks[int(chance.choice(len(masks), p=weights))]
                mask = np.where(chance.random(budget.size) < 0.5, mask, other)
            mask = _moved(mask, settings.mutation, budget, chance)
        copies.append(mask)
    return copies

"""How well a criterion ranks units in the order of the oracle: Spearman's correlation with its confidence.

Ties get the mean of their ranks, as in `scipy.stats.spearmanr`. Where one side is constant a correlation does
not exist: it is None, and such a layer does not count in the mean over layers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from secateurs.progress import derive_seed

Values: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
LEAST_UNITS = (
    3  # of a layer that counts in the mean; the correlation of two units is 1 or -1 whatever they are
)
_CHUNK = 2_000_000  # numbers that are ranked at once
_CONFIDENCE = 95.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """A correlation in [-1, 1] and the 95 % confidence interval around it; None where it does not exist.

    Args:
        value: The correlation.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How well one set of scores agrees with one oracle.

    Args:
        per_layer: Mean over the layers of the correlation within each.
        spread: Standard deviation over the layers; None for fewer than two.
        layers: The correlation within each layer.
        all_layers: The correlation over the units of all layers in one ranking.
        all_layers_l2: The same, with the scores of each layer divided by their l2 norm before.
    """

    per_layer: Correlation
    spread: float | None
    layers: Mapping[str, float | None]
    all_layers: Correlation
    all_layers_l2: Correlation


def spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation; None where one side is constant, or there are fewer than two values.

    Example:
        >>> spearman(np.array([1., 2., 3., 4.]), np.array([1., 8., 27., 1e9]))
        1.0
        >>> spearman(np.ones(4), np.arange(4.)) is None
        True
    """
    if len(a) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of a constant side; it answers with not a number
        value = float(spearmanr(a, b).statistic)
    return None if math.isnan(value) else value


def agree(
    scores: Values, normalised: Values, truth: Values, *, resamples: int = 500, seed: int = 0
) -> Agreement:
    """Correlate scores with the truth: in each layer, over all layers, and over all after normalisation.

    The confidence intervals are percentiles over resamples of the units, drawn with replacement: within each
    layer for the mean over layers, from all units for the other two. The same seed draws the same units for
    every criterion.

    Args:
        scores: For each layer the scores of its measured units.
        normalised: The same with each layer's scores normalised.
        truth: What the oracle says of these units.
        resamples: Number of resamples.
        seed: What they follow from.

    Returns:
        The correlations.
    """
    layers = {
        name: spearman(scores[name], truth[name]) if len(truth[name]) >= LEAST_UNITS else None
        for name in truth
    }
    counted = [value for value in layers.values() if value is not None]
    mean = float(np.mean(counted)) if counted else None
    spread = float(np.std(counted, ddof=1)) if len(counted) > 1 else None
    means = _means_resampled(scores, truth, [n for n in layers if layers[n] is not None], resamples, seed)
    return Agreement(
        per_layer=_around(mean, means),
        spread=spread,
        layers=layers,
        all_layers=_overall(scores, truth, resamples, seed),
        all_layers_l2=_overall(normalised, truth, resamples, seed),
    )


def _overall(scores: Values, truth: Values, resamples: int, seed: int) -> Correlation:
    a, b = (np.concatenate([values[name] for name in truth]) for values in (scores, truth))
    return _around(spearman(a, b), _resampled(a, b, resamples, derive_seed(seed, "all layers")))


def _means_resampled(
    scores: Values, truth: Values, names: Sequence[str], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """The mean over layers in each resample; a layer that comes out constant there does not count."""
    if not names:
        return np.empty(0)
    found = np.stack([_resampled(scores[n], truth[n], resamples, derive_seed(seed, n)) for n in names])
    counted = np.isfinite(found)
    sums = np.where(counted, found, 0).sum(0)
    means: npt.NDArray[np.float64] = sums / np.maximum(counted.sum(0), 1)
    return means[counted.any(0)]


def _resampled(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Spearman's correlation in each resample of the pairs; not a number where one side is constant."""
    chance = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(len(a), 1))
    parts = [np.empty(0)]
    for start in range(0, resamples, rows):
        chosen = chance.integers(len(a), size=(min(rows, resamples - start), len(a)))
        parts.append(_correlated(rankdata(a[chosen], axis=1), rankdata(b[chosen], axis=1)))
    return np.concatenate(parts)


def _correlated(a: Any, b: Any) -> npt.NDArray[np.float64]:
    """Pearson's correlation of each row of ranks."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: npt.NDArray[np.float64] = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return found


def _around(value: float | None, resampled: npt.NDArray[np.float64]) -> Correlation:
    known = resampled[np.isfinite(resampled)]
    if value is None or not len(known):
        return Correlation(value=value, low=None, high=None)
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return Correlation(value=value, low=float(low), high=float(high))

"""`repair`: heal a cut in closed form, on unlabelled data."""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateurs.errors import TrainingError, UnknownNameError
from secateurs.graph.copying import foreign_hooks_unseen, tensors_of
from secateurs.graph.exchange import attention_written_out
from secateurs.graph.inference import outside_inference_mode
from secateurs.graph.memos import memos_left_out
from secateurs.graph.paths import CallPath
from secateurs.graph.running import Inputs, attention_as_written, device_of, modes_kept
from secateurs.planning.plan import Plan
from secateurs.recovery.batch_norm import reestimate
from secateurs.recovery.both import Both
from secateurs.recovery.combining import can_be_refitted, combinations, exchangeable, have_combinations
from secateurs.recovery.fitting import Equations, Fit, Solution
from secateurs.recovery.layout import Layout, lay_out
from secateurs.recovery.pairs import Pairs, examples_of
from secateurs.recovery.streams import Stream
from secateurs.recovery.surroundings import on_device, summed
from secateurs.recovery.writing import write
from secateurs.recovery.written_out import WrittenOut

if TYPE_CHECKING:
    from accelerate import Accelerator

WAYS = ("none", "batch-norm", "compensate", "reconstruct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What was done to one layer.

    Args:
        name: Its weight, or its running mean where only statistics were taken anew.
        what: ``"weights"``, ``"constant"`` or ``"statistics"``; or ``"combinations"``: weights for other
            combinations of its outputs than single units.
        before: The share of the variance of the original's values, or of combinations of them, that was
            missed where its outputs matter; None for statistics.
        after: The same after the repair.
    """

    name: str
    what: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """What a repair did.

    Args:
        how: The way that was asked for.
        layers: What was done, in the order of the forward pass.
        left: Weights that read what left and stay as they are, with the reason.
        images: Images that were used, by all processes.
        seconds: How long it took.
        peak_bytes: The most that statistics took at once, and that was held of activations.
    """

    how: str
    layers: tuple[Repaired, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __str__(self) -> str:
        text = f"{self.how}: {len(self.layers)} layers on {self.images} images in {self.seconds:.1f} s"
        missed = [(each.before, each.after) for each in self.layers if each.before is not None]
        if missed:
            before, after = (
                sum(float(each or 0) for each in side) / len(missed) for side in zip(*missed, strict=True)
            )
            text += f"; missed of their variance, on average, {before:.1%} -> {after:.1%}"
        if self.left:
            name, reason = next(iter(self.left.items()))
            more = f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
            text += f"; left are {name!r}{more}: {reason}"
        elif not self.layers and self.how != "batch-norm":
            text += "; no weights behind the cut read what left"
        return text


@outside_inference_mode
def repair(
    model: nn.Module,
    smaller: nn.Module,
    plan: Plan,
    batches: Iterable[Any],
    *,
    how: str = "reconstruct",
    ridge: float | None = None,
    seed: int = 0,
    memory: int = 2 << 30,
    accelerator: Accelerator | None = None,
) -> Repair:
    """Heal ``smaller`` in place, from what ``model`` gives on unlabelled inputs, without training.

    * ``"batch-norm"``: the batch norms behind the cut get the mean and variance of what they see now.
    * ``"compensate"``: what is missing on average where a layer's outputs matter goes into its bias, or the
      running mean of the norm behind it. Exact where the removed units were constant.
    * ``"reconstruct"``: the layers that read what left, or values that changed with it, are refitted by ridge
      regression with a bias, one after another: from their inputs in the smaller network to the values of the
      original where their outputs matter, behind the residual sum where there is one. Fitted batch norms get
      the statistics of what they see. Queries and keys, and values, give the combinations of all that they
      gave that leave the least error, where nothing but their products, or averages, is read. So do the
      layers that write into a linear stream, which others read without an activation in between.

    Args:
        model: The network before the cut; it is not changed.
        smaller: What :func:`secateurs.apply` made of it with `plan`.
        plan: The cut between the two.
        batches: Inputs, or pairs of inputs and targets, which are not used; several inputs are
            ``((one, other), None)``. Images as they were trained on, without augmentation, a few hundred to a
            few thousand; gone through once and kept meanwhile.
        how: ``"none"``, ``"batch-norm"``, ``"compensate"`` or ``"reconstruct"``.
        ridge: The pull towards the weights as they are, relative to the mean variance of what they read. It
            grows where there are fewer than 16 positions for each value that an output reads. None is 1e-3,
            and then more where generalized cross-validation says so, up to weights as they are.
        seed: Which positions of large maps are read.
        memory: Bytes that activations may take while passes wait for a fit, and as many for the threads that
            wait. Batches beyond it join as soon as there is room: early layers of large images, where one
            image has thousands of positions, see fewer images than late ones. One batch takes part in any
            case. More than 64 batches are put together, where they differ in their first dimension alone and
            the model gives the same for two at once.
        accelerator: Processes that share the data; each gives its own batches, or all the same loader, and
            all end with the same weights.

    Returns:
        What was done for each layer, on how many images at the end, in what time and memory, and what was
        left and why.

    Raises:
        UnknownNameError: There is no such way.
        TrainingError: There is no batch, the ridge is not positive, or the networks do not belong together.
            The smaller network is then as it was.

    Example:
        >>> import secateurs
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))  # two outputs: eight units are too many
        >>> cut = secateurs.Plan.of(secateurs.trace(net, torch.zeros(1, 3)), {"0": [0, 2, 4, 6]})
        >>> small, inputs = secateurs.apply(net, cut), torch.randn(64, 3)
        >>> done = repair(net, small, cut, [inputs], ridge=1e-9)
        >>> [(layer.name, layer.what) for layer in done.layers], done.images
        ([('0.weight', 'combinations'), ('1.weight', 'weights')], 64)
        >>> bool((net(inputs) - small(inputs)).abs().max() < 1e-4)
        True
    """
    if how not in WAYS:
        raise UnknownNameError("way to repair", how, WAYS)
    if ridge is not None and not ridge > 0:
        raise TrainingError(f"`0 < ridge` must hold, got ridge={ridge}", fix="repair(..., ridge=1e-3)")
    if how == "none":
        return Repair(how=how)
    started = time.perf_counter()
    inputs = _inputs(batches, device_of(smaller), accelerator)
    with _undisturbed(model, smaller), torch.no_grad():
        job = _Repairing(model, smaller, inputs, seed, memory, accelerator)
        layout = job.layout(plan, how)
        layers = job.statistics(layout) if how == "batch-norm" else job.fit(layout, ridge)
        images = job.of_all(job.examples)
    return Repair(
        how=how,
        layers=tuple(layers),
        left={} if how == "batch-norm" else {**layout.left, **job.left},
        images=images,
        seconds=round(time.perf_counter() - started, 3),
        peak_bytes=job.peak,
    )


class _Repairing:
    """One call of :func:`repair`, once everything is in its place."""

    def __init__(
        self,
        model: nn.Module,
        smaller: nn.Module,
        inputs: deque[Inputs],
        seed: int,
        memory: int,
        accelerator: Accelerator | None,
    ) -> None:
        self.model, self.smaller, self.inputs = model, smaller, inputs
        self.seed, self.memory, self.accelerator = seed, memory, accelerator
        self.peak = self.examples = 0
        self.left: dict[str, str] = {}

    def layout(self, plan: Plan, how: str) -> Layout:
        """What there is to do; layers that feed products are given the combinations that are best."""
        first = self.inputs[0]
        both = Both.of(self.model, self.smaller, first)
        if both.whole.choices:  # where each expert has a token, all of them are seen
            first = max(self.inputs, key=lambda inputs: len(CallPath(self.model, inputs, WrittenOut()).calls))
            both = Both.of(self.model, self.smaller, first)
        if how == "batch-norm":
            return lay_out(both, plan, weights=False)
        found = exchangeable(
            self.model, plan, first, both.whole, both.before, agree=lambda here: not self.of_all(not here)
        )
        if how == "compensate":  # a repair before this one may have given them other combinations
            mixed = [left for left in found.values() if have_combinations(both, left, plan)]
            spared = {call for left in mixed for call, is_weight in left if not is_weight}
            return lay_out(both, plan, weights=False, spared=spared)
        found = {each: left for each, left in found.items() if can_be_refitted(both, each, left)}
        mixes, self.peak = combinations(self.model, found, self.inputs, both.whole, self._added_up)
        into_streams = {call for each in found if isinstance(each, Stream) for call in each.writers}
        return lay_out(both, plan, weights=True, mixes=mixes, into_streams=into_streams)

    def _added_up(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.accelerator is None:
            return tensor
        added: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return added

    def statistics(self, layout: Layout) -> list[Repaired]:
        """Batch-norm re-estimation."""
        self.examples = sum(map(examples_of, self.inputs))
        means = reestimate(self.smaller, layout.norms, self.inputs, self.accelerator)
        self.peak = sum(2 * 8 * len(mean) for mean in means)
        names = {id(tensor): name for name, tensor in tensors_of(self.smaller).items()}
        return [Repaired(name=names[id(mean)], what="statistics") for mean in means]

    def fit(self, layout: Layout, ridge: float | None) -> list[Repaired]:
        """Fit after fit, in the order of the forward pass; every pass waits until the next is written."""
        processes = self.accelerator.num_processes if self.accelerator is not None else 1
        names = zlib.crc32(repr([link.name for fit in layout.fits for link in fit.links]).encode()) & 0xFFFF
        if self.of_all(names) != processes * names:
            raise TrainingError(
                "the batches of one process take another path through the model than those of another",
                fix="give each process more batches, or repair in a single process",
            )
        pairs = Pairs(self.model, self.smaller, layout, self.inputs, memory=self.memory, seed=self.seed)
        done = []
        try:
            for place, fit in enumerate(layout.fits):
                pairs.join(place)
                positions = self.of_all(pairs.batches * fit.positions)
                equations = Equations(fit, device_of(self.smaller), pairs.batches * processes, positions)
                for pair in pairs:
                    pair.show(equations, layout.fits[place:])
                if self.accelerator is not None:
                    equations.reduce(self.accelerator)
                if not equations.count:
                    self.left |= {link.name: "no input comes to it" for link in fit.links}
                    for pair in pairs:
                        pair.forget(fit)
                    continue
                solution = equations.solve(ridge)
                write(equations, solution)
                for pair in pairs:
                    pair.correct(equations, solution)
                ahead = (
                    pairs.largest if fit.others else 0
                )  # a shared weight is looked at in passes of its own
                waiting = pairs.batches + ahead
                self.peak = max(self.peak, equations.nbytes + layout.held[place] * waiting)
                done += [_told(link.name, fit, solution) for link in fit.links]
        finally:
            pairs.close()
        self.examples = pairs.examples
        return done

    def of_all(self, count: int) -> int:
        """A number added up over all processes."""
        return count if self.accelerator is None else int(summed([count], self.accelerator)[0])


def _told(name: str, fit: Fit, solution: Solution) -> Repaired:
    what = "weights" if fit.weights else "constant"
    what = what if fit.aim.mix is None else "combinations"
    return Repaired(name=name, what=what, before=solution.before, after=solution.after)


def _inputs(batches: Iterable[Any], device: torch.device, accelerator: Accelerator | None) -> deque[Inputs]:
    """The inputs of all batches, where the model is."""
    data = batches if accelerator is None else on_device(batches, accelerator)
    found = deque(
        tree_map_only(
            Tensor,
            lambda tensor: tensor.to(device),
            batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch,
        )
        for batch in data
    )
    if not found:
        raise TrainingError(
            "the data to repair on gave no batch", fix="pass batches of inputs, a few hundred images or more"
        )
    return found


@contextmanager
def _undisturbed(model: nn.Module, smaller: nn.Module) -> Iterator[None]:
    """Both evaluate, with attention in steps; modes are put back, and the weights where it fails."""
    kept = {name: tensor.detach().clone() for name, tensor in tensors_of(smaller).items()}
    with (
        modes_kept(model, smaller),
        foreign_hooks_unseen(model, smaller),
        attention_as_written(),
        attention_written_out(model),
        attention_written_out(smaller),
        memos_left_out(model),
    ):
        model.eval(), smaller.eval()
        try:
            yield
        except BaseException:
            for name, tensor in tensors_of(smaller).items():
                if name in kept:  # others are tables that a pass has made
                    tensor.data.copy_(kept[name])
            raise

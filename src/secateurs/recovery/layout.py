"""What is to be fitted after a cut, in which order, and what is left and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from secateurs.planning.plan import Plan
from secateurs.recovery.both import Both
from secateurs.recovery.fitting import Aim, Fit, Link
from secateurs.recovery.in_parameter import place_in
from secateurs.recovery.kept import inputs_kept, outputs_kept
from secateurs.recovery.moments import WIDEST
from secateurs.recovery.moves import positions_of
from secateurs.recovery.points import calls_behind, chain_of, feeds, norms_behind
from secateurs.recovery.readers import Reader
from secateurs.recovery.recording import Recorder
from secateurs.recovery.writing import begin

_NO_READER = "no linear layer, convolution or product with a matrix reads it as it is"
_UNUSED = "the batch that calls most does not come to it: larger batches may"
_SPARED = "its outputs may be combinations of the original's, which have other constants"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """The fits of a smaller network, in the order in which its forward pass comes to them.

    Args:
        fits: The fits.
        left: Weights that read what left and are not refitted, with the reason.
        copied: Calls whose inputs are overwritten before their outputs matter.
        held: For each fit the bytes that a pass of both networks over the first batch holds at most where it
            waits, from there to its end.
        norms: Running means of the batch norms that see other values than before the cut.
        record: The pass of the original whose calls are meant.
    """

    fits: tuple[Fit, ...]
    left: Mapping[str, str]
    copied: frozenset[int]
    held: tuple[int, ...]
    norms: tuple[Tensor, ...] = field(repr=False)
    record: Recorder = field(repr=False)


def lay_out(
    both: Both,
    plan: Plan,
    *,
    weights: bool,
    mixes: Mapping[tuple[int, bool], Tensor] | None = None,
    into_streams: Collection[int] = (),
    spared: Collection[int] = (),
) -> Layout:
    """Find the layers that read what left, or values that changed, and the points where their outputs matter.

    Args:
        both: A pass of both networks.
        plan: The cut.
        weights: Whether weights are refitted, or constants alone.
        mixes: The calls of layers that are to give combinations of the original's outputs, or to read such
            (then with True), and these. Their weights change here and now.
        into_streams: Those of them that give combinations of what there is at their point, and not of their
            own outputs alone.
        spared: The calls of layers that stay as they are.
    """
    consumers = {axis.parameter for axis in plan.axes if axis.silenced}
    mixed = any(group.mixed_by for group in plan.groups)
    changed = {axis.parameter for axis in plan.axes} if mixed else consumers
    behind = (
        calls_behind(both.small, changed) if weights else set()
    )  # what a constant can mend is behind the cut itself
    search = _Search(both, plan, behind, mixes or {}, into_streams, spared)
    found, whole, small = search.links(), both.whole, both.small
    assert search.begun == {call for call, _ in mixes or ()}, "both sides of a product change, or none"
    fits: list[Fit] = []
    for links in _together(found, small).values():
        fits += _fits(links, search, weights)
    for links in search.shared:
        fits += _shared_fit(links, search, weights)
    fits.sort(key=lambda fit: fit.point)
    return Layout(
        fits=tuple(fits),
        left=search.left,
        copied=frozenset(whole.living.overwritten | small.living.overwritten),
        held=_held(fits, whole, small),
        norms=tuple(norms_behind(small, changed)),
        record=whole,
    )


def _held(fits: Sequence[Fit], whole: Recorder, small: Recorder) -> tuple[int, ...]:
    """For each fit what both passes of the first batch hold, there or at a later one."""
    most, found = 0, []
    for fit in reversed(fits):
        kept = [
            link.chain.call
            for each in fits
            for link in (each.links if each.weights and not each.others else ())
            if link.chain.call <= fit.point <= each.point
        ]
        forced = [link.chain.call for link in fit.links if fit.is_of_original and not fit.others]
        most = max(most, whole.living.held_at(fit.point, forced) + small.living.held_at(fit.point, kept))
        found.append(most)
    return tuple(reversed(found))


def _together(links: list[Link], small: Recorder) -> dict[tuple[int, int, int], list[Link]]:
    """Layers whose results meet in one point; a convolution with groups stays alone."""
    found: dict[tuple[int, int, int], list[Link]] = {}
    for link in links:
        alone = link.chain.call if link.reader.groups > 1 else -1
        found.setdefault((link.chain.point, link.chain.channel, alone), []).append(link)
    return found


def _fits(links: list[Link], search: _Search, weights: bool) -> list[Fit]:
    """One fit; or one for each layer, where the equations of all together would be too wide."""
    if weights and len(links) > 1 and sum(link.reader.columns for link in links) > WIDEST:
        return [fit for link in links for fit in _fits([link], search, weights)]
    chain = links[0].chain
    positions = positions_of(search.small.shapes[chain.point], chain.channel)
    fit = Fit(links=tuple(links), aim=search.aims[links[0].name], weights=weights, positions=positions)
    if weights or fit.can_shift:
        return [fit]
    search.left |= {link.name: "nothing behind it can hold a constant" for link in links}
    return []


def _shared_fit(links: list[Link], search: _Search, weights: bool) -> list[Fit]:
    """The fit of a weight that several calls share, in terms of the weight itself."""
    gains = tuple(link.chain.scale for link in links)
    ones, bias = torch.ones_like(gains[0]), links[0].reader.bias
    is_own = bias is not None and search.small.uses(bias) == len(links)
    homes = ((bias, ones),) if bias is not None and is_own else ()
    first, *others = (
        replace(link, chain=replace(link.chain, scale=ones, norm=None, onward=ones, homes=homes))
        for link in links
    )
    chains = [link.chain for link in links]
    fit = Fit(
        links=(first,),
        others=tuple(others),
        gains=gains,
        aim=search.aims[first.name],
        weights=weights,
        positions=sum(positions_of(search.small.shapes[chain.point], chain.channel) for chain in chains),
    )
    if weights or fit.can_shift:
        return [fit]
    search.left[first.name] = "nothing behind it can hold a constant"
    return []


class _Search:
    """Finds the calls that read what left, and how their outputs compare with the original's."""

    def __init__(
        self,
        both: Both,
        plan: Plan,
        behind: set[int],
        mixes: Mapping[tuple[int, bool], Tensor],
        into_streams: Collection[int],
        spared: Collection[int],
    ) -> None:
        self.whole, self.small, self.before, self.after = both.whole, both.small, both.before, both.after
        self.plan, self.behind, self.mixes, self.spared = plan, behind, mixes, spared
        self.into_streams = into_streams
        self.cuts = {(axis.parameter, axis.dim): axis.removed for axis in plan.axes}
        self.left: dict[str, str] = {}
        self.known: set[str] = set()  # parameters that layers read with
        self.begun: set[int] = set()
        self.aims: dict[str, Aim] = {}
        self.shared: list[list[Link]] = []
        self._said: dict[int, str | None] = {}

    def links(self) -> list[Link]:
        """The layers that can be fitted; the others are noted with the reason."""
        found: list[Link] = []
        produced: set[tuple[str, int]] = set()
        for call, reader in self.small.readers.items():
            name = self.small.name_of(reader.weight)
            place = None if name is None else place_in(reader, self.after[name])
            if name is None or place is None:
                continue
            produced |= {(name, dim) for dim in place.outputs}
            is_cut = any(self.cuts.get((name, dim)) for dim in place.reading)
            is_changed = call in self.behind and call not in self.small.of_states
            is_mixed = (call, False) in self.mixes
            if is_cut or is_changed or is_mixed:
                is_spared = call in self.spared
                reason = _SPARED if is_spared else self._add(call, reader, name, found, is_cut=is_cut)
                if reason and is_cut:
                    self.left[name] = reason
        used = set[str]().union(*self.small.named)
        for axis in self.plan.axes:
            name = axis.parameter
            is_read = axis.silenced and len(self.before[name].shape) > 1
            if is_read and name not in self.known | {*self.left} and (name, axis.dim) not in produced:
                self.left[name] = _NO_READER if name in used else _UNUSED
        return found

    def _add(self, call: int, reader: Reader, name: str, found: list[Link], *, is_cut: bool) -> str | None:
        """Add a link; or say why there is none."""
        calls = self._sharing(reader)
        uses = max(len(calls), self.small.uses(reader.weight))
        if len(calls) < uses:
            return f"{uses} calls use it, and not all of them as the weight of a layer"
        if uses > 1:
            if calls[0] not in self._said:
                self._said[calls[0]] = self._add_shared(calls, name, is_cut=is_cut)
            return self._said[calls[0]]
        link = self._link(call, name)
        if isinstance(link, Link):
            found.append(link)
        return None if isinstance(link, Link) else link

    def _sharing(self, reader: Reader) -> list[int]:
        """The calls that read with this very weight, in their order."""
        weight = reader.weight
        place = weight.data_ptr(), weight.shape, weight.stride()
        return [
            call
            for call, other in self.small.readers.items()
            if (other.weight.data_ptr(), other.weight.shape, other.weight.stride()) == place
        ]

    def _add_shared(self, calls: list[int], name: str, *, is_cut: bool) -> str | None:
        """Add the links of a weight that several calls share; or say why they are none.

        All are looked at before the weight changes, when the network has come to the first point. So the
        others must be behind that point; where points lie otherwise, or a batch norm takes the outputs of a
        single call, the calls' own results are compared. Where some read what others give, as in a loop, all
        are fitted on what the original reads.
        """
        is_loop = any(feeds(self.small, one, other) for one, other in combinations(calls, 2))
        if is_loop and (self.small.readers[calls[0]].groups > 1 or not is_cut):
            return f"{len(calls)} calls use it, and read what others of them give"
        aims = dict(self.aims)
        for alone in (True,) if is_loop else (False, True):
            links: list[Link] = []
            self.aims = dict(aims)  # without the names that the first try has given
            for call in calls:
                link = self._link(call, name, alone=alone, in_loop=is_loop)
                if not isinstance(link, Link):
                    return link
                links.append(link)
            chains = [link.chain for link in links]
            points = {chain.point for chain in chains}
            are_apart = len(points) == len(chains) and chains[0].point < min(calls[1:])
            if alone or (are_apart and all(c.norm is None and bool((c.scale != 0).all()) for c in chains)):
                break
        self.shared.append(links)
        return None

    def _link(self, call: int, name: str, *, alone: bool = False, in_loop: bool = False) -> Link | str:
        """The link of a call; or why there is none."""
        reader, other = self.small.readers[call], self.whole.readers.get(call)
        place = place_in(reader, self.after[name])
        index = () if place is None else place.index
        if other is None:
            return "the original reads it in another way"
        given, read = (of(other, self.plan, name, self.before[name]) for of in (outputs_kept, inputs_kept))
        if given is None or read is None:
            return "the original reads it in another way"
        if len(given.indices) != reader.outputs:
            return "its outputs do not correspond to the original's"
        mix, columns = self.mixes.get((call, False)), self.mixes.get((call, True))
        is_mixed_alone = mix is not None and call not in self.into_streams
        is_alone = alone or is_mixed_alone or bool((given.factors != 1).any())
        chain = chain_of(self.small, call, alone=is_alone)
        before, after = list(self.whole.shapes[chain.point]), list(self.small.shapes[chain.point])
        if (before.pop(chain.channel), after.pop(chain.channel)) != (
            other.outputs,
            reader.outputs,
        ) or before != after:
            if columns is not None and chain.point != call:
                return self._link(call, name, alone=True, in_loop=in_loop)
            return "its outputs are cut along another dimension too"
        self.known.add(name)
        key = name + "".join(f"[{each}]" for each in index)
        key = key if key not in self.aims else f"{key} (call {call})"
        self.aims[key] = Aim(kept=given.indices, factors=given.factors, mix=mix)
        link = Link(
            name=key,
            reader=reader,
            chain=chain,
            inputs=read.indices if in_loop or call in self.small.of_states else None,
            made_of=self.small.made_of(reader.weight),
        )
        if mix is not None or columns is not None:
            self.begun.add(call)
            rows = given.matrix if mix is None else mix
            norm = chain_of(self.whole, call).norm if call in self.into_streams else None
            begin(link, other, norm, rows, read.matrix if columns is None else columns)
        return link

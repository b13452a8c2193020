"""Linear streams: what layers add up, and other layers read, with no activation between.

The linear bottlenecks of MobileNetV2 and its heirs (arXiv 1801.04381) are joined by such sums. Their channels
say nothing by themselves: with any invertible ``T`` all that writes ``x T`` and all that reads it with
``W inv(T)'`` give the same network. So a stream that is cut to ``r`` channels need not keep ``r`` of its own;
it can have the best combinations of all (`secateurs.recovery.low_rank`, with the mean products of what is
read for ``Q'Q`` and of the weights that read it for ``K'K``). SliceGPT (arXiv 2401.15024) turns the streams
of language models so, by the principal components of what flows there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateurs.graph.running import Inputs
from secateurs.recovery.factor_proof import Change, Proof, any_turns, mixed, own_layers
from secateurs.recovery.factors import Factor
from secateurs.recovery.low_rank import best_combinations, best_roots
from secateurs.recovery.points import chain_of, is_own
from secateurs.recovery.readers import Reader
from secateurs.recovery.recording import Recorder

_AT_ONCE = 1 << 16  # rows that are in float64 at once
_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stream:
    """A linear stream.

    Args:
        writers: The calls of the layers that write into it, each with the call whose result is added: its
            own, or that of the batch norm behind it.
        readers: For each call of a layer that reads it what its outputs are multiplied by until they matter,
            ``(C,)``, and whether a constant can be added there.
        depth: Number of channels.
        channel: The dimension of the channels, counted from the end.
    """

    writers: Mapping[int, int]
    readers: Mapping[int, tuple[Tensor, bool]]
    depth: int
    channel: int

    @property
    def places(self) -> tuple[tuple[int, bool], ...]:
        """The calls of all layers, and whether it is the columns of their weight that read the stream."""
        return *((call, False) for call in self.writers), *((call, True) for call in self.readers)

    def sides(self) -> Iterator[tuple[Factor, Tensor]]:
        """For each of these places all channels, as one head."""
        for call, _ in self.places:
            yield Factor(call, torch.arange(self.depth)[None]), torch.zeros(1, dtype=torch.long)


def streams_in(
    model: nn.Module,
    inputs: Inputs,
    record: Recorder,
    taken: Collection[tuple[int, bool]] = (),
    *,
    agree: Callable[[bool], bool] = bool,
) -> tuple[Stream, ...]:
    """The linear streams of a model: found from what its calls do, and proved by other channels instead.

    Args:
        model: The model, in evaluation mode.
        inputs: A batch.
        record: One pass of the model on it, with recurrent layers written out.
        taken: Places that are of no stream; see `Stream.places`.
        agree: Whether something holds in all processes, for what holds in this one.

    Example:
        >>> class Bottleneck(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.wide, self.narrow = nn.Linear(3, 4), nn.Linear(4, 9), nn.Linear(9, 4)
        ...         self.head = nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         x = self.stem(x)
        ...         return self.head(x + self.narrow(self.wide(x).relu())).relu()
        >>> net, x = Bottleneck().eval(), torch.randn(5, 3)
        >>> [stream] = streams_in(net, x, Recorder(net, x))
        >>> stream.writers, list(stream.readers), stream.depth
        ({0: 0, 3: 3}, [1, 5], 4)
    """
    with torch.no_grad():
        found = [each for each in _streams(record) if {*taken}.isdisjoint(each.places)]
        return tuple(Proof(model, inputs, record, agree).passed(found, _other_channels)) if found else ()


def _streams(record: Recorder) -> Iterator[Stream]:
    """What looks like a stream."""
    usable = own_layers(record)
    ends = {_end_of(record, call): call for call in usable}
    root = {value: value for value in ends}
    for call in range(len(record.names)):
        makers = record.makers[call]
        if _joins(record, call) and all(maker in root for maker in makers):
            root[call] = call
            for maker in makers:
                old, new = root[maker], root[call]
                root |= {value: new for value, each in root.items() if each == old}
    for name in dict.fromkeys(root.values()):
        values = [value for value, each in root.items() if each == name]
        writers = {ends[value]: value for value in values if value in ends}
        channels = {(record.readers[call].channel, record.readers[call].outputs) for call in writers}
        readers = [each for value in values for each in record.read_by.get(value, []) if each not in values]
        if len(channels) == 1 and readers and all(call in usable for call in readers):
            (channel, depth), *_ = channels
            if all(_reads(usable[call], channel, depth) for call in readers):
                chains = {call: chain_of(record, call) for call in readers}
                told = {call: (chain.scale, bool(chain.homes)) for call, chain in chains.items()}
                yield Stream(writers=writers, readers=told, depth=depth, channel=channel)


def _end_of(record: Recorder, call: int) -> int:
    """The batch norm that takes what a layer gives, and nothing else; or the layer itself."""
    readers = record.read_by.get(call, [])
    step = record.steps.get((readers[0], call)) if len(readers) == 1 else None
    reader = record.readers[call]
    if step is None or step.norm is None or not step.fits(reader.channel, reader.outputs):
        return call
    return readers[0] if step.norm.is_affine and is_own(record, step.norm) else call


def _joins(record: Recorder, call: int) -> bool:
    """Whether a call adds up values, or copies one."""
    steps = [record.steps.get((call, maker)) for maker in record.makers[call]]
    return bool(steps) and all(
        step is not None and (step.is_sum or (step.is_plain and step.move is None)) for step in steps
    )


def _reads(reader: Reader, channel: int, depth: int) -> bool:
    """Whether a layer reads the channels of a stream."""
    return (reader.source_dim, reader.columns) == (channel, depth * reader.kernel)


def _other_channels(stream: Stream, record: Recorder) -> Change:
    """Other channels of the same stream."""
    (turn,) = any_turns(1, stream.depth)

    back = torch.linalg.inv(turn).mT.contiguous()
    columns = {call: torch.kron(back, torch.eye(record.readers[call].kernel)) for call in stream.readers}
    return Change(dict.fromkeys(stream.writers.values(), mixed(turn, stream.channel)), columns)


class StreamRank:
    """Sums over all data of what is read of a stream, and its best combinations.

    Args:
        stream: The stream.
        device: Where sums are kept.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream = stream
        count, depth = len(stream.readers), stream.depth
        self._products = torch.zeros(count, depth, depth, dtype=torch.float64, device=device)
        self._sums = torch.zeros(count, depth, dtype=torch.float64, device=device)
        self._counts = torch.zeros(count, dtype=torch.float64, device=device)
        self._weights: dict[int, Tensor] = {}

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What is to be added up over processes."""
        return self._products, self._sums, self._counts

    def see(self, call: int, reader: Reader, result: Tensor) -> None:
        """Take in what a layer reads, if that is the stream."""
        if call not in self._stream.readers:
            return
        place = [*self._stream.readers].index(call)
        rows = reader.source.detach().movedim(self._stream.channel, -1).flatten(0, -2)
        self._counts[place] += len(rows)
        for some in rows.split(_AT_ONCE):
            wide = some.to(self._products)
            self._products[place] += wide.mT @ wide
            self._sums[place] += wide.sum(0)
        weight = reader.matrix()[0].detach().unflatten(1, (-1, reader.kernel))
        self._weights[call] = weight.to(self._products)

    def combinations(self, rank: int) -> list[Tensor]:
        """For each place of the stream what it is to hold, ``(1, depth, rank)``."""
        moments, weights = [], []
        for place, (call, (scale, has_bias)) in enumerate(self._stream.readers.items()):
            count = self._counts[place].clamp(min=1)
            mean = self._sums[place] / count if has_bias else torch.zeros_like(self._sums[place])
            moments.append(self._products[place] / count - mean[:, None] * mean)
            weights.append(scale[:, None, None].to(self._products) * self._weights[call])
        (first, second), whole = _best(moments, weights, rank), sum(moments, torch.zeros_like(moments[0]))
        own = torch.einsum("dr,de,er->r", first[0], whole, first[0]).mean()
        factor = (whole.diagonal().mean() / own.clamp(min=_TINY)).sqrt()  # values are as large as before
        return [*[first * factor] * len(self._stream.writers), *[second / factor] * len(moments)]


def _best(moments: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B``, ``(1, d, rank)``, for readers that all count the same.

    Args:
        moments: ``(d, d)`` mean products of what each of them reads.
        weights: ``(C, d, k)`` its weight, for ``k`` places of a window.
        rank: How many combinations.
    """
    products = moments[0].new_zeros(2, 1, *moments[0].shape)
    for own, weight in zip(moments, weights, strict=True):
        gram = torch.einsum("cdk,cek->de", weight, weight)
        products[0] += own / len(moments)
        products[1] += gram / (gram * own).sum().clamp(min=_TINY)
    return best_combinations(*best_roots(products), rank)

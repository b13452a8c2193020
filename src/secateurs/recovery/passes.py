"""Forward passes that stand still at a call and go on later, so that what they hold needs no second run.

A layer is refitted on what the layers before it give *after* they were refitted. Running the network anew for
each layer would cost its depth squared. So each pass runs in a thread of its own, one at a time, and waits in
the middle of the model's own ``forward`` until the layer it has come to is refitted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.errors import TrainingError
from secateurs.graph.calls import is_numbered
from secateurs.graph.packed import call_tensors
from secateurs.graph.paths import NOWHERE
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.choices import Chooser
from secateurs.recovery.moves import Move, move_of, origins
from secateurs.recovery.readers import Reader, reader_of
from secateurs.recovery.written_out import WrittenOut


@dataclass(slots=True, eq=False)
class Reading:
    """What weights read in one call of a pass, and the call itself with other weights.

    Args:
        reader: What is read.
        again: The result of the call for another weight, without its bias.
        shape: The shape of that result.
        moves: What moves the result on its way to the point where it matters.
    """

    reader: Reader
    again: Callable[[Tensor], Tensor]
    shape: torch.Size = field(default_factory=torch.Size)
    moves: list[Move] = field(default_factory=list)

    def rows(self, positions: Tensor) -> Tensor:
        """What the weights read for some positions of the point; ``(G, n, columns)``."""
        if self.moves:
            positions = origins(self.shape, self.reader.channel, self.moves)[positions]
        return self.reader.rows(positions)

    def at_point(self, weight: Tensor) -> Tensor:
        """What the call adds at the point with another weight, without its bias and but for the scale."""
        result = self.again(weight)
        for move in self.moves:
            result = move(result)
        return result


THREAD_BYTES = 3 << 19  # what a waiting thread itself takes: 1.3 MiB were measured


class _Left(BaseException):
    """Unwinds a pass that is not needed any more; no model may catch it."""


class SuspendedPass(TorchFunctionMode):
    """One forward pass that waits at chosen torch function calls.

    Args:
        model: The model, in evaluation mode.
        inputs: Its inputs, where the model is.
        stops: Numbers of the calls at which the pass waits, once their result is there.
        reads: Numbers of the calls of which to keep what weights read, until `forget`.
        copied: Those of them whose inputs are overwritten before the pass stops, so that a copy is kept.
        moves: Which of them the calls belong to that only move their results on.
        names: What the calls are named by whose numbers these are.
        numbers: Of the calls of this pass, where it makes others; see `numbers_along`.
        choose: Is told what each call gives, and says what it is to give; see `Choices`. It goes by the
            numbers of the calls in this pass.

    Attributes:
        value: The result of the call that the pass waits at; changes made to it in place count.
        readings: What was read, by the number of the call.

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> waiting = SuspendedPass(layers, torch.ones(3, 2), stops=[0], reads=[0])
        >>> waiting.advance(0).shape
        torch.Size([3, 2])
        >>> _ = waiting.value.zero_()  # the rest of the pass reads zeros
        >>> waiting.close()
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        stops: Collection[int],
        reads: Collection[int] = (),
        copied: Collection[int] = (),
        moves: Mapping[int, int] | None = None,
        names: Sequence[str] | None = None,
        numbers: Sequence[int] | None = None,
        choose: Chooser | None = None,
    ) -> None:
        super().__init__()
        self._names, self._numbers, self._choose = names, numbers, choose
        self._model, self._inputs = model, inputs
        self._stops, self._reads, self._copied = frozenset(stops), frozenset(reads), frozenset(copied)
        self._moves = moves or {}
        self.value = torch.empty(0)
        self.readings: dict[int, Reading] = {}
        self._call, self._at, self._is_closed = 0, -1, False
        self._error: BaseException | None = None
        self._go, self._here = threading.Semaphore(0), threading.Semaphore(0)
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, stop: int) -> Tensor:
        """Go on to a stop, if the pass is not there yet; the result of the call.

        Raises:
            TrainingError: The pass ended before it came there.
        """
        if self._at != stop:
            self.value = torch.empty(0)
            self._go.release()
            self._here.acquire()
        if self._error is not None:
            raise self._error
        if self._at != stop:
            raise _off_path(f"call {stop} of its forward pass is missing")
        return self.value

    def forget(self, calls: Collection[int]) -> None:
        """Give back the memory of what was read in some calls."""
        for call in calls:
            self.readings.pop(call, None)

    def close(self) -> None:
        """Leave the pass where it stands."""
        self._is_closed = True
        self._go.release()
        self._thread.join()
        self.readings.clear()
        self.value = torch.empty(0)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._is_closed:
                if self._cuda is not None:  # both belong to the thread
                    torch.cuda.set_device(self._cuda)
                with torch.no_grad(), self, WrittenOut():
                    call_model(self._model, self._inputs)
        except _Left:
            pass
        except BaseException as error:  # raised where the pass is asked to go on
            self._error = error
        finally:
            self._at = -1
            self._here.release()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_numbered(func):
            return func(*args, **kwargs)
        own = self._call
        self._call += 1
        number = own if self._numbers is None else self._numbers[own] if own < len(self._numbers) else NOWHERE
        if number in self._stops or number in self._reads:
            self._check(number, func)
        if number in self._reads:
            self._read(number, func, args, kwargs)
        if number in self._moves:
            self._move(self.readings.get(self._moves[number]), func, args, kwargs)
        out = func(*args, **kwargs)
        if self._choose is not None:
            out = self._choose(own, func, args, kwargs, out)
        if number in self.readings:
            self.readings[number].shape = out.shape
        if number in self._stops:
            self._wait(number, out)
        return out

    def _check(self, number: int, func: Any) -> None:
        name = getattr(func, "__name__", str(func))
        if self._names is not None and name != self._names[number]:
            raise _off_path(f"call {number} of its forward pass is {name}, and was {self._names[number]}")

    def _read(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reader = reader_of(func, args, kwargs)
        if reader is None:
            return
        swapped: dict[int, Tensor] = {}
        if number in self._copied:
            swapped[id(reader.source)] = reader.source.clone()
            reader = reader_of(func, *exchanged(args, kwargs, swapped))
            assert reader is not None
            args, kwargs = exchanged(args, kwargs, swapped)
        weight, bias = reader.weight, reader.bias

        def again(other: Tensor) -> Tensor:
            new = {id(weight): other} | ({id(bias): torch.zeros_like(bias)} if bias is not None else {})
            few, named = exchanged(args, kwargs, new)
            result: Tensor = func(*few, **named)
            return result

        self.readings[number] = Reading(reader, again)

    def _move(
        self, reading: Reading | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        (moved,) = call_tensors(args, kwargs)
        move = move_of(func, args, kwargs, moved)
        if reading is not None and move is not None:
            reading.moves.append(move)

    def _wait(self, number: int, out: Tensor) -> None:
        self.value, self._at = out, number
        self._here.release()
        self._go.acquire()
        if self._is_closed:
            raise _Left


def _off_path(what: str) -> TrainingError:
    return TrainingError(
        f"the model takes another path on some inputs: {what}",
        fix="repair with inputs of one shape, like those that were traced",
    )


def exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with some tensors exchanged for others.

    Args:
        args: Those by position.
        kwargs: Those by name.
        new: The others, by the ``id`` of those whose places they take.
    """
    return (
        tuple(new.get(id(each), each) for each in args),
        {name: new.get(id(each), each) for name, each in kwargs.items()},
    )

"""One forward pass, written down: which call reads the result of which, and what each does to it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateurs.graph.calls import is_numbered
from secateurs.graph.copying import tensors_of
from secateurs.graph.packed import call_tensors, first_tensor, results_of, tensors_in
from secateurs.graph.paths import CallPath, Signature, Signatures, numbers_along
from secateurs.graph.running import Inputs, call_model
from secateurs.recovery.chains import Norm, Step
from secateurs.recovery.choices import Chooser, is_told
from secateurs.recovery.computed import Call, Computed, Tape
from secateurs.recovery.derived import WeightNorm
from secateurs.recovery.living import Living, storage_of
from secateurs.recovery.picking import Picking
from secateurs.recovery.readers import Reader, reader_of
from secateurs.recovery.recurrence import RECURRENT, product_with_state
from secateurs.recovery.spelled import MULTIPLIED
from secateurs.recovery.steps import steps_of
from secateurs.recovery.written_out import WrittenOut

_OUTPUT = -1  # reads what the model gives
_NOTHING = -2  # made by no call


class Recorder(TorchFunctionMode):
    """Writes down one forward pass: which call reads the result of which.

    Attributes:
        names: The torch function of each numbered call.
        makers: For each numbered call the calls that made what it is given; negative for none.
        named: For each numbered call the parameters and buffers that it is given.
        read_by: For each call those that read its result; negative where it leaves the model.
        shapes: The shape of the result of each call that has one.
        steps: What a call does to the result of another, channel by channel, by both numbers.
        norms: The calls that are batch norms.
        readers: The calls in which weights read activations, without what was read.
        living: What the pass held after each call, and whether what was read stayed as it was.
        of_states: The products of recurrent layers with their states.
        plain: For each numbered call its number where nothing is written out: one for all calls of a layer.
        units: Of products with weights of more than two dimensions, see `WideProduct.units`.
        givers: For each module that was watched the calls that made what it gave, one for each time it ran.
            Those that ended first come first.
        calls: The signatures of all numbered calls; see `secateurs.graph.paths`.
        choices: The calls that choose by activations, such as the experts of a token; see `Picking`.
        origins: Of each call that picks rows of an activation the call that made it; see `Picking`.
        picks: Of each call that works on rows alone that a call has picked, that call; see `Picking`.

    Args:
        model: The model, in evaluation mode.
        inputs: What it is called with.
        watched: Modules by name.
        written_out: Whether products inside of recurrent layers and einsum are calls of their own.
        choose: Is told what each call gives, and says what it is to give; see `Choices`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        watched: Mapping[str, nn.Module] | None = None,
        *,
        written_out: bool = False,
        choose: Chooser | None = None,
    ) -> None:
        super().__init__()
        self.names: list[str] = []
        self.calls: list[Signature] = []
        self._picking, self._choose = Picking(), choose
        self.choices, self.origins, self.picks = (
            self._picking.choices, self._picking.origins, self._picking.picks,
        )  # fmt: skip
        self._signatures = Signatures(model)
        self.readers: dict[int, Reader] = {}
        self.of_states: set[int] = set()
        self.plain: list[int] = []
        self.units: dict[int, Mapping[int, tuple[int, int]]] = {}
        self.givers: dict[str, list[int]] = {}
        self._tensors = tensors_of(model)
        self._storages = {storage_of(tensor): name for name, tensor in self._tensors.items()}
        self.living = Living(self._storages)
        self._constants = {id(tensor) for tensor in self._tensors.values()}
        self._made: dict[int, tuple[weakref.ref[Tensor], int, bool]] = {}
        self.read_by: dict[int, list[int]] = {}
        self.steps: dict[tuple[int, int], Step] = {}
        self._uses: dict[int, list[tuple[int, int, int]]] = {}
        self.shapes: dict[int, torch.Size] = {}
        self.makers: list[list[int]] = []
        self.named: list[set[str]] = []
        self.norms: dict[int, Norm] = {}
        self._derived: dict[int, tuple[weakref.ref[Tensor], WeightNorm]] = {}
        self._tape = Tape()
        self._steps = WrittenOut()
        steps = self._steps if written_out else contextlib.nullcontext()
        self._products: set[int] = set()  # by elements
        self._run = 0  # that which was numbered last, of those that are written out
        with torch.no_grad(), self, steps, self._watching(watched or {}):
            outputs = call_model(model, inputs)
        for tensor in tensors_in(outputs):
            self.read_by.setdefault(self._maker(tensor), []).append(_OUTPUT)
        self._made.clear()

    # -- what was recorded ------------------------------------------------------------------------

    def numbers_in(self, model: nn.Module, inputs: Inputs) -> list[int] | None:
        """For each call of another pass the number of the same in this one; None where both are the same.

        Args:
            model: The model, in evaluation mode.
            inputs: What it is called with. Where nothing is chosen, no pass is needed to tell.
        """
        if not self.choices:
            return None
        return numbers_along(CallPath(model, inputs, WrittenOut()).calls, self.calls)

    def name_of(self, weight: Tensor) -> str | None:
        """The parameter or buffer that a tensor is, is a view of, or is computed from value by value."""
        made_of = self.made_of(weight)
        return self._storages.get(storage_of(weight if made_of is None else made_of.parameters[0]))

    def made_of(self, weight: Tensor) -> WeightNorm | Computed | None:
        """What a weight is computed from, where that can follow it."""
        normed = self._normed(weight)
        if normed is not None or storage_of(weight) in self._storages:
            return normed
        return self._tape.computed(weight, self._is_of)

    def _normed(self, tensor: Tensor) -> WeightNorm | None:
        ref, parts = self._derived.get(id(tensor), (None, None))
        return parts if ref is not None and ref() is tensor else None

    def _given(self, tensor: Tensor) -> str | None:
        """The parameter or buffer that an operand is, is a view of, or has its direction from."""
        normed = self._normed(tensor)
        return self._storages.get(storage_of(tensor if normed is None else normed.direction))

    def reads_inputs(self, call: int) -> bool:
        """Whether a reader inside of a recurrent layer reads the layer's inputs, and not its states."""
        maker = self.makers[call][0]
        is_within = maker >= 0 and self.plain[maker] == self.plain[call]  # a level above the first
        return not is_within and call not in self.of_states

    def uses(self, tensor: Tensor) -> int:
        """In how many calls any element of a parameter, or of this view of it, is used."""
        made_of = self.made_of(tensor)
        if isinstance(made_of, Computed):
            return len(self.read_by.get(made_of.number, ()))
        return len(self._users(tensor if made_of is None else made_of.direction))

    def _is_of(self, parameter: Tensor, calls: Sequence[Call]) -> bool:
        """Whether nothing but some calls, each for the next, makes use of a parameter."""
        numbers = {call.number for call in calls}
        read = [each for call in calls[:-1] if call.number is not None for each in self.read_by[call.number]]
        return numbers.issuperset(self._users(parameter)) and numbers.issuperset(read)

    def _users(self, tensor: Tensor) -> list[int]:
        """The calls that make use of it, without products that run as a part of the sum over them."""
        first, last = _span(tensor)
        found = self._uses.get(storage_of(tensor), ())
        calls = [call for start, end, call in found if first <= end and start <= last]
        return [call for call in calls if call in self.read_by or call not in self._products]

    @contextlib.contextmanager
    def _watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note which calls made what these modules give."""

        def noted(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: Any, output: Any) -> None:
                given = first_tensor(output)
                self.givers.setdefault(name, []).append(_NOTHING if given is None else self._maker(given))

            return hook

        handles = [module.register_forward_hook(noted(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- the run ----------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_numbered(func):  # such as the transpose of a tensor, read as an attribute
            out = func(*args, **kwargs)
            for tensor in call_tensors(args, kwargs) if isinstance(out, Tensor) else ():
                self.read_by.setdefault(self._maker(tensor), []).append(_OUTPUT)
                if id(out) not in self._constants:
                    is_data = self._is_data([tensor])
                    self._note(out, self._maker(tensor), is_data)
                    if not is_data:
                        self._tape.note(Call(func, args, kwargs, (out,), None), [tensor])
            return out
        number = len(self.names)
        self.names.append(getattr(func, "__name__", str(func)))
        self._note_number()
        operands = call_tensors(args, kwargs)
        self.calls.append(self._signatures.of(func, operands))
        makers = [self._maker(tensor) for tensor in operands]
        self.makers.append(makers)
        self.named.append({name for each in operands if (name := self._given(each)) is not None})
        reader = self._reader_of(func, args, kwargs)
        steps = dict(steps_of(func, args, kwargs, operands, makers, self._is_data))
        for step, _ in steps.values():
            if step.norm is not None:
                self.norms[number] = step.norm
        versions = [tensor._version for tensor in operands]
        out = func(*args, **kwargs)
        out = out if self._choose is None else self._choose(number, func, args, kwargs, out)
        results = results_of(out)
        depend = [self._is_data([tensor]) for tensor in operands]
        dealt_out = bool(self._steps.units) and self._steps.is_inside
        self._picking.note(number, func, operands, makers, depend, out, is_dealt_out=dealt_out)
        changed = [t for t, before in zip(operands, versions, strict=True) if t._version != before]
        self.living.changed(changed)
        is_constant = func is product_with_state and reader is None  # the state before the first step
        is_read = bool(results) or is_told(func)  # a shape is no value
        if is_read and func not in RECURRENT and not is_constant:  # a layer's are read in calls of their own
            self._use(operands, results, number)
        for maker in makers if is_read else ():
            self.read_by.setdefault(maker, []).append(number)
        if len(results) == 1:
            self.shapes[number] = results[0].shape
            for maker, (step, shape) in steps.items():
                if step.move is not None or results[0].shape == shape:
                    self.steps[number, maker] = step
        is_data = self._is_data(operands)
        if reader is not None:
            self._remember(number, reader)
            if self._steps.units:
                self.units[number] = self._steps.units
        if func in MULTIPLIED:
            self._products.add(number)
        if func is product_with_state:
            self.of_states.add(number)
        for tensor in changed if is_data and not results else ():  # `x[rows] = values` gives nothing
            self._note(tensor, number, True)
        for result in results:  # which expert's weight is picked depends on data, its values do not
            is_picked = not changed and storage_of(result) in self._storages
            self._note(result, number, is_data and not is_picked)
        if (parts := WeightNorm.of(func, args, kwargs)) is not None and not is_data:
            self._derived[id(out)] = weakref.ref(out), parts
        elif results and not is_data and not changed:
            self._tape.note(Call(func, args, kwargs, tuple(results), number), operands)
        self._note_living(number)
        return out

    def _note_number(self) -> None:
        """Note the number that the call has where recurrent layers run as they are."""
        run = self._steps.runs if self._steps.is_inside else 0
        last = self.plain[-1] if self.plain else -1
        self.plain.append(last if run and run == self._run else last + 1)
        self._run = run

    def _remember(self, number: int, reader: Reader) -> None:
        """Keep what is known of a reader, and see later whether its source is overwritten."""
        self.living.read(number, reader.source)
        blank = torch.empty(reader.source.shape, device="meta")
        self.readers[number] = replace(reader, source=blank)

    def _note_living(self, number: int) -> None:
        """Let go of the results that are gone after a call."""
        live = {key: tensor for key, (ref, *_) in self._made.items() if (tensor := ref()) is not None}
        self._made = {key: self._made[key] for key in live}
        self.living.note(number, [each for each in live.values() if each not in self._tape])

    def _maker(self, tensor: Tensor) -> int:
        """The call that gave the tensor its present value."""
        ref, maker, _ = self._made.get(id(tensor), (None, _NOTHING, False))
        return maker if ref is not None and ref() is tensor else _NOTHING

    def _is_data(self, tensors: list[Tensor]) -> bool:
        """Whether any of the tensors depends on the inputs, as far as is known."""
        for tensor in tensors:
            ref, _, is_data = self._made.get(id(tensor), (None, 0, True))
            known = ref is not None and ref() is tensor
            if is_data if known else id(tensor) not in self._constants:
                return True
        return False

    def _reader_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reader | None:
        """The reader that a call is; neither a product of two activations nor one of two weights."""
        reader = reader_of(func, args, kwargs)
        if reader is None or self._is_data([reader.weight]):
            return None
        weights = {id(reader.weight), id(reader.bias)}
        is_read = self._is_data([each for each in call_tensors(args, kwargs) if id(each) not in weights])
        return reader if is_read else None

    def _note(self, tensor: Tensor, maker: int, is_data: bool) -> None:
        self._made[id(tensor)] = (weakref.ref(tensor), maker, is_data)

    def _use(self, operands: list[Tensor], results: list[Tensor], number: int) -> None:
        views = {storage_of(result) for result in results}
        for tensor in operands:
            storage = storage_of(tensor)
            if storage in self._storages and storage not in views:
                self._uses.setdefault(storage, []).append((*_span(tensor), number))


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last element of the storage that the tensor can touch."""
    first = int(tensor.storage_offset())
    return first, first + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )

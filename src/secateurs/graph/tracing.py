"""Running a model once, on tensors without data, so that every operator can say what it does to labels.

`Tracer` is a dispatch mode around one ordinary call of the model's own ``forward``. Nothing has to be
scriptable or symbolically traceable: loops, branches, functional calls and raw parameters work because the
call is real. It runs on the meta device, where tensors have a shape and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secateurs.graph.calls import is_numbered, watched
from secateurs.graph.copying import is_parameter, modules_of, registered_tensors, tensors_of, unsaved_buffers
from secateurs.graph.expressions import Attribute
from secateurs.graph.integers import Statement, size_lists, traced_in, unflattened_sizes
from secateurs.graph.labels import Dim
from secateurs.graph.marks import LABELS, Marks
from secateurs.graph.operators import operator
from secateurs.graph.origins import attach_origins
from secateurs.graph.outputs import Returned
from secateurs.graph.packed import call_tensors, results_of, tensors_in
from secateurs.graph.paths import Signature, Signatures
from secateurs.graph.provenance import Places, Provenance, RowsNeededError
from secateurs.graph.records import CallRecord, Contraction, ParameterDim, Pass, Read, Record
from secateurs.graph.recurrent import call_in_few_steps, share_of_steps
from secateurs.graph.running import Inputs, call_model, numbers_of, source_line, without_data
from secateurs.graph.spread import tie_copies
from secateurs.graph.values import Answers, Everything, asks, value_of

Rule: TypeAlias = Callable[["Tracer", tuple[Any, ...], dict[str, Any], Any], None]
_OF_EVALUATION = (
    "contractions",
    "reads",
    "products",
    "mixed",
    "bare",
    "called",
)  # further passes add nothing to these


class Tracer(Marks):
    """Follows labels through one forward pass; the rules talk to it.

    Args:
        rules: A function that finds the rule of an operator, or None where there is none.
        call_rules: The same for torch functions, for what their operators no longer show.
        values: What the model's code was answered on the real example each time it asked for the value of a
            tensor; None where it has not been asked.
        follow_rows: Whether to follow which rows of parameters make a tensor; only what derives a scale from
            a length needs it.
        device: Where tensors say that they are.
    """

    def __init__(
        self,
        rules: Callable[[Any], Rule | None],
        call_rules: Callable[[Any], Any | None] = lambda function: None,
        *,
        values: Sequence[tuple[Any, Any]] | None = None,
        follow_rows: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.values = values
        self.device = device or torch.device("cpu")
        self.needs_rows = self.acts_on_calls = False
        self.rescalings: list[tuple[Dim, Places]] = []
        self._rows = Provenance(self.is_weight) if follow_rows else None
        self._derives_scale = False
        self._rules, self._call_rules = rules, call_rules
        self.parameter_dims: list[ParameterDim] = []
        self.buffers: set[str] = set()
        self.unsaved: set[str] = set()
        self.elsewhere: set[str] = set()
        self.passed_over: set[str] = set()
        self.passes: list[Pass] = []
        self._records: list[Record] = []
        self._used: set[int] = set()
        self.reads: list[Read] = []
        self.products: list[Read] = []
        self.unknown: dict[str, str] = {}
        self.example_only: dict[str, None] = {}
        self.own_state: dict[str, str] = {}
        self.calls = 0
        self.called: list[CallRecord] = []
        self._signature: Signature = ()
        self._first_contraction = 0

    # -- the run ----------------------------------------------------------------------------------

    def trace(self, model: nn.Module, inputs: Inputs) -> None:
        """Run the model (an empty copy) on example inputs and lock what enters and what leaves.

        Parameters that this pass does not use are looked for in further passes, so that what they read is cut
        in them too: in one where all is chosen that may be, as experts to which the example sends nothing;
        and in one in the other mode (training or evaluation), as an auxiliary head. What no pass uses is
        locked.
        """
        self.know(model)
        self._watch_plain_norms(model)
        registered = registered_tensors(model)
        self.unsaved = unsaved_buffers(model)
        for name, tensor in tensors_of(model).items():
            self._register(name, tensor)
            if not is_parameter(tensor):
                self.buffers.add(name)
        returned = self._one_pass(model, inputs)
        self._hand_back(model, inputs, returned.state)
        passed_over = {place.parameter for place in self._unused()}
        if self.example_only and not passed_over.isdisjoint(registered):
            with self._beside(), contextlib.suppress(Exception):  # it need not run: not all can be answered
                self._one_pass(model, inputs, takes_all=True)
        self.elsewhere = {place.parameter for place in self._unused()}
        self.passed_over = passed_over - self.elsewhere
        if not self.elsewhere.isdisjoint(registered):
            with self._beside(), contextlib.suppress(Exception):  # it need not run, on meta or at all
                self._one_pass(model.train(not model.training), inputs)
        for place in self._unused():
            self.labels.lock(place.labels, "the forward pass does not use it")
        tie_copies(self.labels, self.statements, self.spread, self.parameter_dims)
        if self._rows is not None:
            self.rescalings, left = self._rows.settle(self.labels)
            for call in left:
                self.labels.lock(call.length, "attention derives its scale from this length", call.where)

    def know(self, model: nn.Module) -> None:
        """Note which modules a private copy of a model has, and let their integers know their origin."""
        self._signatures = Signatures(model)
        self.paths = {id(module): path for path, module in modules_of(model)}
        attach_origins(model, self.book)

    def _watch_plain_norms(self, model: nn.Module) -> None:
        """Norms without a tensor of their own still state their size, and compare it with what comes in."""
        for path, module in modules_of(model):
            if isinstance(module, _NormBase) and not module.affine and not module.track_running_stats:

                def tie(norm: Any, args: Any, path: str = path) -> None:
                    channel = self.dims(args[0])[1]
                    stated = Attribute(path, "num_features", None, channel.size)
                    self.statements.append(Statement(stated, channel))

                module.register_forward_pre_hook(tie)

    def _hand_back(self, model: nn.Module, inputs: Inputs, state: Mapping[str, Any]) -> None:
        """Call the model again with the state that it returned: what reads it may not have run before.

        State with which it cannot be called is locked as outputs are.
        """
        before = tensors_in(state)
        try:
            with self._beside():
                if state:
                    self._one_pass(model, inputs, state)
        except Exception:  # whatever the model's own code raises
            for tensor in before:
                for dim in self.dims(tensor):
                    self.labels.lock(dim, "it is state with which the model cannot be called again")
                if self._rows is not None:
                    self._rows.fix(tensor)
        else:
            self.own_state = {name: type(value).__name__ for name, value in state.items()}

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """A further pass unifies labels, and adds nothing to costs and reads."""
        evaluation = {name: list(getattr(self, name)) for name in _OF_EVALUATION}
        try:
            yield
        finally:
            for name, kept in evaluation.items():
                setattr(self, name, kept)

    def _one_pass(
        self,
        model: nn.Module,
        inputs: Inputs,
        state: Mapping[str, Any] | None = None,
        *,
        takes_all: bool = False,
    ) -> Returned:
        self._records = []
        self.calls = 0
        training = model.training
        empty_inputs = without_data(inputs)
        self.answers = Everything() if takes_all else Answers(self.values)
        with watched(self, model):
            outputs = call_model(model, empty_inputs, state)
        self._followed = ""
        returned = Returned.by(model, outputs)
        self.lock_outputs(returned)
        records = tuple(self._records)
        self.passes.append(Pass(training, records, takes_state=state is not None, takes_all=takes_all))
        return returned

    def lock_outputs(self, returned: Returned) -> None:
        """What a caller reads keeps its lengths, however it is packed; the model's own state need not."""
        for tensor in returned.tensors:
            for dim in self.dims(tensor):
                self.labels.lock(dim, "it is an output of the model")
            if self._rows is not None:
                self._rows.fix(tensor)

    def _unused(self) -> list[ParameterDim]:
        return [place for number, place in enumerate(self.parameter_dims) if number not in self._used]

    def _register(self, name: str, tensor: Tensor) -> None:
        dims = []
        for axis, size in enumerate(tensor.shape):
            dim = self.labels.fresh(size, source=len(self.parameter_dims))
            self.parameter_dims.append(ParameterDim(name, axis, size, dim))
            dims.append(dim)
        setattr(tensor, LABELS, (tuple(dims), True))
        if self._rows is not None:
            self._rows.register(name, tensor)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out one operator and let its rule follow the labels."""
        operands = call_tensors(args, kwargs)
        incoming = tuple(dim for tensor in operands for dim in self.dims(tensor) if dim.factors)
        for tensor in operands:
            if self.is_weight(tensor):
                self._used.update(*(dim.sources for dim in self.dims(tensor)))
        # before the operator changes them in place
        numbers = None if self._derives_scale else numbers_of(func, args, kwargs)
        out = self.compute(func, args, kwargs)
        self._followed = str(func)
        self._all_weights = bool(operands) and all(self.is_weight(tensor) for tensor in operands)
        contractions = len(self.contractions)
        rule = self._rules(func)
        if rule is None:
            self._refuse(func, operands, results_of(out))
        else:
            rule(self, args, kwargs, out)
            if not self._all_weights:
                for tensor in operands:
                    if self.is_weight(tensor):
                        self.add_role(self.dims(tensor), "carrier")
        about = operator(func)
        if about.asks and asks(func, args) and any(value_of(tensor) is None for tensor in operands):
            self.example_only.setdefault(source_line(), None)
        if about.draws and len(self.contractions) == contractions:
            for result in results_of(out):  # fewer numbers drawn are other numbers
                for dim in self.dims(result):
                    self.mix(dim, "drawing random numbers")
        if self._rows is not None and not self._derives_scale:
            self._rows.follow(func, args, kwargs, out)
        if about.compared is None:
            return out
        results = results_of(out)
        dims = tuple(self.dims(result) for result in results)
        dtypes = tuple(result.dtype for result in results)
        self._records.append(Record(about.compared, numbers, dims, dtypes, isinstance(out, Tensor), incoming))
        return out

    def _refuse(
        self, func: Any, operands: Sequence[Tensor], results: Sequence[Tensor], reason: str = ""
    ) -> None:
        where = source_line()
        self.unknown.setdefault(str(func), where)
        known = {id(tensor) for tensor in operands}
        for tensor in results:
            if id(tensor) not in known:
                self.set(tensor, [self.labels.fresh(int(size)) for size in tensor.shape])
        for tensor in (*operands, *results):
            for dim in self.dims(tensor):
                self.labels.lock(dim, reason or f"{func} has no rule", where)

    def derive_scale(self, query: Tensor, key: Tensor, others: Sequence[Any]) -> None:
        """Attention without a stated scale: its queries or its keys are rescaled with the length of a head.

        Args:
            query: The queries.
            key: The keys.
            others: Everything else that the call is given.
        """
        length = self.dims(query)[-1]
        if not length.factors:
            return
        if self._rows is None:
            self.needs_rows = True
            raise RowsNeededError
        self._rows.attend(query, key, others, length, source_line())
        self._derives_scale = True

    # -- calls of torch functions -----------------------------------------------------------------

    def enter_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A torch function is about to run."""
        self._derives_scale = False
        self._first_contraction = len(self.contractions)
        rule = self._call_rules(func)
        if rule is not None:
            rule(self, args, kwargs)
        self._sizes = list(traced_in((*args, *kwargs.values())))
        of_call = unflattened_sizes if func in _UNFLATTEN else size_lists
        self._size_lists = of_call(args, kwargs) if self._sizes else []
        self._contracted, self._multiplied = [], []
        if func in _OF_NUMBERS:
            self.book.floats += [(size.expression, float(int(size))) for size, _ in self._sizes]

    def recur(self, func: Any, args: tuple[Any, ...], steps: float) -> Any:
        """A recurrent layer runs in few steps, which cost as much as all."""
        self.acts_on_calls = True
        before = len(self.contractions)
        out = call_in_few_steps(func, args, steps)
        share = share_of_steps(steps)
        self.contractions[before:] = [
            Contraction(share * each.multiplier, each.dims) for each in self.contractions[before:]
        ]
        return out

    def sign_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A torch function is about to run, by the name that the model calls it."""
        self._signature = self._signatures.of(func, call_tensors(args, kwargs))

    def leave_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """A torch function has run: note what it worked on, and where weights read activations."""
        if self._contracted:
            for place, tensor in enumerate(call_tensors(args, kwargs)):
                if not self.is_weight(tensor):
                    self.reads.append(Read(self.calls, place, self.dims(tensor), tuple(self._contracted)))
        if self._multiplied:
            for place, tensor in enumerate(call_tensors(args, kwargs)):
                self.products.append(Read(self.calls, place, self.dims(tensor), tuple(self._multiplied)))
        self._contracted, self._multiplied = [], []
        self._derives_scale = False
        if is_numbered(func):
            tensors = (*call_tensors(args, kwargs), *results_of(out))
            self.called.append(
                CallRecord(
                    getattr(func, "__name__", str(func)),
                    (self._first_contraction, len(self.contractions)),
                    tuple(self.dims(tensor) for tensor in tensors),
                    self._signature,
                )
            )
            self.calls += 1


_UNFLATTEN = frozenset((Tensor.unflatten, torch.unflatten))
_OF_NUMBERS = frozenset((torch.tensor, torch.as_tensor, torch.scalar_tensor, torch.full))

"""Torch's attention layers: ours computes the same, and what is cut keeps working."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from secateurs import Group, Plan
from secateurs.attention import MultiheadAttention
from secateurs.errors import ScoreError
from secateurs.graph.exchange import write_out
from secateurs.pruning import prune_steps
from secateurs.testing import fitting

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
INF = float("-inf")
N, L, S, E, H = 3, 5, 7, 12, 4

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "own keys": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "own and zero keys, batch first": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 10},
    "other widths, no bias, batch first": {"kdim": 6, "vdim": 10, "bias": False, "batch_first": True},
    "other widths, own and zero keys": {"kdim": 6, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
}


def causal(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns).triu(1).bool()


def padding(columns: int) -> Tensor:
    lengths = torch.tensor([columns, columns - 2, 2])
    return torch.arange(columns) >= lengths[:, None]  # (N, columns)


def floating(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, INF) + 0.1 * torch.rand(mask.shape)


CALLS: dict[str, Any] = {  # from the length of the keys to the options of a call
    "no mask": lambda s: {},
    "no weights": lambda s: {"need_weights": False},
    "weights of each head": lambda s: {"average_attn_weights": False},
    "boolean padding": lambda s: {"key_padding_mask": padding(s)},
    "boolean padding, no weights": lambda s: {"key_padding_mask": padding(s), "need_weights": False},
    "floating padding": lambda s: {"key_padding_mask": floating(padding(s))},
    "boolean mask": lambda s: {"attn_mask": causal(L, s)},
    "floating mask, no weights": lambda s: {"attn_mask": floating(causal(L, s)), "need_weights": False},
    "a mask for each head": lambda s: {"attn_mask": floating(causal(L, s).expand(N * H, L, s))},
    "a mask for each head, no weights": lambda s: {
        "attn_mask": causal(L, s).expand(N * H, L, s),
        "need_weights": False,
    },
    "both": lambda s: {"attn_mask": causal(L, s), "key_padding_mask": padding(s)},
    "both, no weights": lambda s: {
        "attn_mask": floating(causal(L, s).expand(N * H, L, s)),
        "key_padding_mask": floating(padding(s)),
        "need_weights": False,
    },
    "causal": lambda s: {"attn_mask": causal(L, s), "is_causal": True},
    "causal, no weights": lambda s: {"attn_mask": causal(L, s), "is_causal": True, "need_weights": False},
    "causal and padding, no weights": lambda s: {
        "attn_mask": causal(L, s),
        "key_padding_mask": padding(s),
        "is_causal": True,
        "need_weights": False,
    },
}


def layer_of(name: str) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(E, H, **LAYERS[name]).eval()
    for parameter in layer.parameters():  # biases too
        nn.init.normal_(parameter, std=0.5)
    return layer


def ours_of(layer: nn.MultiheadAttention) -> MultiheadAttention:
    (ours,) = write_out(copy.deepcopy(layer))
    return ours


def tensors_for(layer: nn.MultiheadAttention, *, is_self: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; one tensor thrice where the widths allow it and `is_self` asks."""
    query, key, value = torch.randn(N, L, E), torch.randn(N, S, layer.kdim), torch.randn(N, S, layer.vdim)
    if not layer.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return (query, query, query) if is_self else (query, key, value)


def check_equal(theirs: tuple[Any, ...], mine: tuple[Any, ...]) -> None:
    for a, b in zip(theirs, mine, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, equal_nan=True)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LAYERS)
def test_ours_computes_what_torchs_own_does(name: str, call: str) -> None:
    layer = layer_of(name)
    ours = ours_of(layer)
    for is_self in (False, True) if "kdim" not in LAYERS[name] else (False,):
        inputs = tensors_for(layer, is_self=is_self)
        options = CALLS[call](L if is_self else S)
        check_equal(layer(*inputs, **options), ours(*inputs, **options))
        with torch.no_grad():  # torch's fast path
            check_equal(layer(*inputs, **options), ours(*inputs, **options))


@pytest.mark.parametrize("name", LAYERS)
def test_keys_that_are_the_values_and_inputs_without_a_batch(name: str) -> None:
    layer = layer_of(name)
    ours = ours_of(layer)
    query, key, value = tensors_for(layer)
    if layer.kdim == layer.vdim:
        check_equal(layer(query, key, key), ours(query, key, key))
    one = [x.select(0 if layer.batch_first else 1, 1) for x in (query, key, value)]
    for options in (
        {},
        {"average_attn_weights": False, "key_padding_mask": padding(S)[1]},
        {"need_weights": False, "attn_mask": floating(causal(L, S).expand(H, L, S))},
    ):
        check_equal(layer(*one, **options), ours(*one, **options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_training_draws_the_same_dropout_and_gives_the_same_gradients(name: str, need_weights: bool) -> None:
    layer = layer_of(name).train().double()
    layer.dropout = 0.4
    ours = ours_of(layer)
    inputs = tuple(x.double() for x in tensors_for(layer))
    for each in (layer, ours):
        torch.manual_seed(1)
        each(*inputs, need_weights=need_weights)[0].square().sum().backward()
    for (path, a), b in zip(layer.named_parameters(), ours.parameters(), strict=True):
        assert a.grad is not None, path
        torch.testing.assert_close(b.grad, a.grad)


def test_bad_arguments_are_refused() -> None:
    ours = ours_of(layer_of("batch first"))
    x = torch.zeros(N, L, E)
    with pytest.raises(RuntimeError, match="pass attn_mask too"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"boolean or floating, got torch\.int64"):
        ours(x, x, x, key_padding_mask=padding(L).long())
    nested = torch.nested.nested_tensor([x[0], x[1, :2]])
    with pytest.raises(ValueError, match="self-attention without masks only"):
        ours(nested, nested, nested, key_padding_mask=padding(L)[:2])


def test_a_layer_of_ours_can_be_made_and_initialised_like_torchs_own() -> None:
    torch.manual_seed(3)
    layer = nn.MultiheadAttention(E, H)
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), ours.parameters(), strict=True))
    ours.load_state_dict(layer.state_dict())
    ours._reset_parameters()
    assert repr(ours).startswith("MultiheadAttention(\n  12, num_heads=4, head_dim=3")


class SelfAttention(nn.Module):
    """Attention in a residual stream; no norm, so that a cut can be proved to rounding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, E), nn.Linear(E, 5)
        self.attention = nn.MultiheadAttention(E, H, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])

    def example(self) -> Any:
        return torch.randn(N, L, 6)


class CrossAttention(nn.Module):
    """Queries, keys and values of three widths, and an output that no residual ties to the queries."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, E), nn.Linear(6, 6), nn.Linear(6, 10)
        self.attention = nn.MultiheadAttention(E, H, kdim=6, vdim=10, **options)
        self.out = nn.Linear(E, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(memory), self.value(memory)
        return self.out(self.attention(query, key, value, need_weights=False)[0])

    def example(self) -> Any:
        return torch.randn(L, N, 6), torch.randn(S, N, 6)


class PaddedEncoder(nn.Module):
    """Torch's encoder, which in evaluation makes nested tensors of padded sequences."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, **options)
        self.embed, self.out = nn.Linear(6, E), nn.Linear(E, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options.get("norm_first"))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(self.embed(x), src_key_padding_mask=padding))

    def example(self) -> Any:
        return torch.randn(N, L, 6), padding(L)


class Translator(nn.Module):
    """Torch's encoder and decoder with masks, whose values the decoder reads to see that it is causal."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, E), nn.Embedding(20, E)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without batch_first it makes no nested tensors
            self.both = nn.Transformer(E, H, 1, 1, 16, **options)
        self.out = nn.Linear(E, 20)

    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(L)
        return self.out(
            self.both(
                self.source(source),
                self.target(target),
                tgt_mask=mask,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )
        )

    def example(self) -> Any:
        source, target = torch.randint(20, (N, S)), torch.randint(20, (N, L))
        return (source, target, padding(S)) if self.both.batch_first else (source.T, target.T, padding(S))


def seasoned(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_k", "bias_v")):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def without(graph: secateurs.Graph, wanted: Callable[[Group], bool]) -> Plan:
    """The plan that takes the first half of each group that is wanted."""
    return Plan.of(graph, {group.name: range(group.size // 2) for group in graph.groups if wanted(group)})


def is_head(group: Group) -> bool:
    return group.kind == "head"


def is_head_dim(group: Group) -> bool:
    return group.kind == "head_dim"


def is_stream(group: Group) -> bool:
    return group.name in ("embed", "query", "key", "value", "attention.out_proj")


def sizes(layer: nn.MultiheadAttention) -> tuple[int, int, int, int, int]:
    return layer.embed_dim, layer.num_heads, layer.head_dim, layer.kdim, layer.vdim


Wanted = tuple[Callable[[Group], bool], ...]
CUTS: dict[
    str, tuple[Wanted, tuple[int, int, int], bool]
] = {  # which; stream, heads, head dims; torch's own?
    "nothing": ((), (12, 4, 3), True),
    "heads": ((is_head,), (12, 2, 3), False),
    "head dims": ((is_head_dim,), (12, 4, 2), False),
    "stream": ((is_stream,), (6, 4, 3), False),
    "heads and stream": ((is_head, is_stream), (6, 2, 3), True),
    "head dims and stream": ((is_head_dim, is_stream), (6, 4, 2), False),
    "heads and head dims": ((is_head, is_head_dim), (12, 2, 2), False),
    "everything": ((is_head, is_head_dim, is_stream), (6, 2, 2), False),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}, {"bias": False}])
def test_heads_head_dims_and_stream_are_cut_apart_and_together(cut: str, options: dict[str, Any]) -> None:
    model = seasoned(SelfAttention(**options))
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    assert {(g.kind, g.size) for g in graph.groups} == {("neuron", E), ("head", H), ("head_dim", E // H)}
    wanted, expected, torchs_own = CUTS[cut]
    plan = without(graph, lambda group: any(each(group) for each in wanted))
    small = secateurs.apply(model, plan)
    assert type(small.attention) is (nn.MultiheadAttention if torchs_own else MultiheadAttention)
    assert sizes(small.attention) == (*expected, expected[0], expected[0])
    assert type(model.attention) is nn.MultiheadAttention
    report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert report.exact_expected
    assert (report.effect > 0) == bool(wanted)
    assert plan.after.params == sum(p.numel() for p in small.parameters())


def test_sizes_that_fit_are_not_enough_where_the_scale_is_not_that_of_the_heads() -> None:
    model = seasoned(SelfAttention())
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    width = next(group.name for group in graph.groups if is_head_dim(group))
    plan = Plan.of(graph, {width: [0], "embed": range(4)})
    small = secateurs.apply(model, plan)
    assert sizes(small.attention)[:3] == (8, 4, 2)
    assert type(small.attention) is MultiheadAttention
    assert small.attention.scale == 3**-0.5
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True, "batch_first": False}])
def test_cross_attention_of_three_widths(options: dict[str, Any]) -> None:
    model = seasoned(CrossAttention(**options))
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    for wanted, expected, torchs_own in (
        (is_head, (12, 2, 3, 6, 10), False),
        (lambda group: group.name in ("key", "value"), (12, 4, 3, 3, 5), True),
        (lambda group: group.name == "attention.out_proj", (12, 4, 3, 6, 10), False),
        (lambda group: is_stream(group) or is_head(group), (6, 2, 3, 3, 5), True),
        (lambda group: True, (6, 2, 2, 3, 5), False),
    ):
        plan = without(graph, wanted)
        small = secateurs.apply(model, plan)
        assert sizes(small.attention) == expected
        assert (type(small.attention) is nn.MultiheadAttention) == torchs_own
        report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
        assert report.exact_expected
        assert report.effect > 0


def test_the_widths_of_values_and_keys_in_a_head_are_cut_apart_where_nothing_ties_them() -> None:
    model = seasoned(CrossAttention(bias=False))
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    widths = {g.name: g for g in graph.groups if "v_proj_weight" in g.name and g.size == E // H}
    (values,) = widths.values()
    plan = Plan.of(graph, {values.name: [0]})
    small = secateurs.apply(model, plan)
    assert small.attention.q_proj_weight.shape == (12, E)
    assert small.attention.v_proj_weight.shape == (8, 10)
    report = secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert report.exact_expected


MODELS: dict[str, Callable[[], nn.Module]] = {
    "self": SelfAttention,
    "cross": CrossAttention,
    "padded encoder": PaddedEncoder,
    "padded encoder, norm first": lambda: PaddedEncoder(norm_first=True),
    "translator": Translator,
    "translator, batch first": lambda: Translator(batch_first=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_hidden_neurons_are_proved_to_rounding(name: str) -> None:
    model = seasoned(MODELS[name]())
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    assert sum(is_head(group) for group in graph.groups) == sum(
        isinstance(module, nn.MultiheadAttention) for module in model.modules()
    )
    for wanted in (is_head, is_head_dim, lambda g: is_head(g) or g.name.endswith("linear1")):
        plan = without(graph, wanted)
        report = secateurs.verify(model, secateurs.apply(model, plan), plan, inputs).raise_if_failed()
        assert report.exact_expected
        assert report.effect > 0


def test_an_odd_number_of_heads_takes_nested_tensors() -> None:
    """Torch's own layer would be left with a nested tensor off its fast path, which it refuses."""
    model = seasoned(PaddedEncoder())
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    cut = {g.name: [0] if is_head(g) else [0, 1, 2] for g in graph.groups if is_head(g) or is_stream(g)}
    plan = Plan.of(graph, cut)
    small = secateurs.apply(model, plan)
    layer = small.encoder.layers[0].self_attn
    assert sizes(layer)[:3] == (9, 3, 3)
    assert type(layer) is MultiheadAttention
    with torch.no_grad():
        assert small(*inputs).isfinite().all()
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_masks_for_each_head_and_weights_of_each_head_keep_the_heads() -> None:
    class MaskedHeads(SelfAttention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.embed(x)
            return self.out(x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])

    class SeenHeads(SelfAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(x)
            out, weights = self.attention(x, x, x, average_attn_weights=False)
            return self.out(x + out), weights

    masked = secateurs.trace(MaskedHeads(), (torch.randn(N, L, 6), torch.zeros(N * H, L, L)))
    seen = secateurs.trace(SeenHeads(), torch.randn(N, L, 6))
    for graph in (masked, seen):
        assert {group.kind for group in graph.groups} == {"neuron", "head_dim"}


def test_averaged_weights_may_leave_the_model() -> None:
    class SeenAttention(SelfAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            x = self.embed(x)
            out, weights = self.attention(x, x, x)
            return self.out(x + out), weights

    model = SeenAttention().eval()
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = without(graph, is_head)
    small = secateurs.apply(model, plan)
    assert [out.shape for out in small(inputs)] == [out.shape for out in model(inputs)]
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_learned_queries_that_are_repeated_for_every_sample() -> None:
    class PoolingHead(SelfAttention):
        def __init__(self) -> None:
            super().__init__()
            self.probe = nn.Parameter(torch.randn(1, 2, E))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.out(self.attention(self.probe.repeat(len(x), 1, 1), x, x)[0])

    model = seasoned(PoolingHead())
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = without(graph, is_head)
    small = secateurs.apply(model, plan)
    assert sizes(small.attention)[:3] == (12, 2, 3)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_as_many_heads_as_head_dims_are_two_groups_all_the_same() -> None:
    class SquareHeads(SelfAttention):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(6, 4), nn.Linear(4, 5)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    model = seasoned(SquareHeads())
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    heads, dims = (next(g for g in graph.groups if each(g)) for each in (is_head, is_head_dim))
    assert (heads.size, dims.size, heads.crosses, dims.crosses) == (2, 2, (dims.name,), (heads.name,))
    for cut, expected in (({heads.name: [1]}, (4, 1, 2)), ({dims.name: [1]}, (4, 2, 1))):
        plan = Plan.of(graph, cut)
        small = secateurs.apply(model, plan)
        assert sizes(small.attention)[:3] == expected
        secateurs.verify(model, small, plan, inputs).raise_if_failed()


def test_a_shared_layer_is_cut_once() -> None:
    class SharedAttention(SelfAttention):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.attention

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.out(x + self.again(x, x, x, need_weights=False)[0])

    model = seasoned(SharedAttention())
    inputs = model.example()
    plan = without(secateurs.trace(model, inputs), lambda group: True)
    small = secateurs.apply(model, plan)
    assert small.again is small.attention
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


class Rescaled(nn.MultiheadAttention):
    """Somebody's subclass with a forward of its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        out, weights = super().forward(*args, **options)
        return 2 * out, weights


def test_subclasses_of_others_keep_their_forward() -> None:
    model = SelfAttention()
    model.attention = Rescaled(E, H, batch_first=True)
    seasoned(model)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    plan = Plan.of(graph, fitting(graph, {group.name: range(group.size // 2) for group in graph.groups}))
    small = secateurs.apply(model, plan)
    assert type(small.attention) is Rescaled
    assert small.attention.num_heads < H
    secateurs.verify(model, small, plan, inputs).raise_if_failed()


@pytest.mark.parametrize("name", ["self", "padded encoder"])
def test_in_place_copies_state_dicts_and_fresh_instances_agree(name: str) -> None:
    model = seasoned(MODELS[name]())
    inputs = model.example()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    plan = Plan.from_json(without(secateurs.trace(model, inputs), lambda group: True).to_json())
    small = secateurs.apply(model, plan)
    fresh = secateurs.apply(MODELS[name]().eval(), plan)
    fresh.load_state_dict(small.state_dict())
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    same = secateurs.apply(copy.deepcopy(model), plan, inplace=True)
    assert secateurs.apply(model, plan, inplace=True) is model
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept
    for other in (fresh, copy.deepcopy(small), same, model):
        assert repr(other) == repr(small)
        with torch.no_grad():
            torch.testing.assert_close(other(*inputs), small(*inputs), rtol=0, atol=0)


def test_a_cut_in_two_steps_is_the_cut_in_one() -> None:
    model = seasoned(PaddedEncoder())
    inputs = model.example()
    first = without(secateurs.trace(model, inputs), lambda g: is_head(g) or is_head_dim(g) or is_stream(g))
    middle = secateurs.apply(model, first)
    second = without(secateurs.trace(middle, inputs), lambda g: is_head_dim(g) or is_stream(g))
    steps, once = secateurs.apply(middle, second), secateurs.apply(model, first.then(second))
    assert sizes(once.encoder.layers[1].self_attn)[:3] == (3, 2, 1)
    assert repr(steps) == repr(once)
    assert steps.encoder.layers[0].self_attn.scale == once.encoder.layers[0].self_attn.scale == 3**-0.5
    with torch.no_grad():
        torch.testing.assert_close(steps(*inputs), once(*inputs), rtol=0, atol=0)


def test_torchs_own_comes_back_when_the_sizes_fit_again() -> None:
    model = seasoned(SelfAttention())
    inputs = model.example()
    first = without(secateurs.trace(model, inputs), is_head)
    middle = secateurs.apply(model, first)
    assert type(middle.attention) is MultiheadAttention
    second = without(secateurs.trace(middle, inputs), is_stream)
    small = secateurs.apply(middle, second)
    assert type(small.attention) is nn.MultiheadAttention
    assert small.attention._qkv_same_embed_dim
    assert repr(small) == repr(secateurs.apply(model, first.then(second)))
    secateurs.verify(middle, small, second, inputs).raise_if_failed()


def test_training_goes_on_after_the_cut_and_export_works() -> None:
    model = seasoned(PaddedEncoder())
    inputs = model.example()
    small = secateurs.apply(model, without(secateurs.trace(model, inputs), lambda group: True))
    small.train()(*inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
    exported = torch.export.export(small.eval(), (inputs[0],))
    torch.testing.assert_close(exported.module()(inputs[0]), small(inputs[0]))


# -- scores ------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    return [(path, type(module), dict(module.__dict__)) for path, module in model.named_modules()]


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_no_trace(training: bool) -> None:
    model = PaddedEncoder().train(training)
    inputs = model.example()
    graph = secateurs.trace(model, inputs)
    before = state(model)
    targets = torch.ones(N, L, 5)
    without_padding = (torch.randn(N, L, 6), None)
    for batch, loss_fn, words in (
        ((inputs, targets), nn.functional.mse_loss, ""),
        ((inputs, None), broken_loss, "no loss today"),
        ((without_padding, targets), nn.functional.mse_loss, "another path"),
    ):
        refused = pytest.raises((ScoreError, ArithmeticError), match=words) if words else nullcontext()
        with refused:
            secateurs.score(model, graph, "taylor", data=[batch], loss_fn=loss_fn)
        assert state(model) == before


def broken_loss(outputs: Tensor, targets: Any) -> Tensor:
    raise ArithmeticError("no loss today")


def test_taylor_scores_of_heads_are_the_loss_without_them_to_first_order() -> None:
    """Scaling what `out_proj` reads of a head by ``1 - t`` changes the loss by ``-t * sum(z dC/dz)``."""
    torch.manual_seed(0)
    model = seasoned(SelfAttention()).double()
    inputs, targets = torch.randn(8, L, 6).double(), torch.randn(8, L, 5).double()
    graph = secateurs.trace(model, inputs)
    head = next(group for group in graph.groups if is_head(group))
    scores = secateurs.score(
        model,
        graph,
        "taylor-signed",
        data=[(inputs[n : n + 1], targets[n : n + 1]) for n in range(8)],
        loss_fn=nn.functional.mse_loss,
        normalization="none",
    )
    step = 1e-6
    changes = []
    for number in range(H):
        nudged = copy.deepcopy(model)
        columns = slice(number * 3, number * 3 + 3)
        losses = []
        for factor in (1 + step, 1 - step):
            nudged.attention.out_proj.weight.data.copy_(model.attention.out_proj.weight)
            nudged.attention.out_proj.weight.data[:, columns] *= factor
            losses.append(nn.functional.mse_loss(nudged(inputs), targets).item())
        changes.append(abs(losses[0] - losses[1]) / (2 * step))
    got = scores[head.name]
    torch.testing.assert_close(
        got / got.sum(), torch.tensor(changes).double() / sum(changes), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("name", ["padded encoder", "translator, batch first"])
def test_pruning_in_steps_by_taylor(name: str) -> None:
    model = seasoned(MODELS[name]())
    inputs = model.example()
    shape = model(*inputs).shape
    steps = prune_steps(
        model,
        inputs,
        criterion="taylor",
        budget=secateurs.Budget(macs=0.4),
        steps=2,
        data=[(inputs, torch.randn(shape))],
        loss_fn=nn.functional.mse_loss,
    )
    for step in steps:
        assert step.model(*inputs).shape == shape
        assert step.verified.ok
    assert step.plan.after.macs < step.plan.before.macs


# -- a vision transformer ----------------------------------------------------------------------------


def test_a_vision_transformer_loses_heads_widths_and_neurons() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10).eval()
    nn.init.normal_(model.heads.head.weight)
    inputs = torch.randn(2, 3, 32, 32)
    graph = secateurs.trace(model, inputs)
    scores = secateurs.score(
        model, graph, "taylor", data=[(inputs, torch.tensor([1, 2]))], loss_fn=cross_entropy
    )
    kinds = {"channel", "neuron", "head"}
    plan = secateurs.plan(graph, scores, secateurs.Budget(units=0.5), scope="local", kinds=kinds)
    small = secateurs.apply(model, plan)
    layer = small.encoder.layers[0].self_attention
    assert type(layer) is nn.MultiheadAttention
    assert sizes(layer) == (32, 2, 16, 32, 32)
    assert small(inputs).shape == (2, 10)
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert plan.after.params == sum(p.numel() for p in small.parameters())
    plan = secateurs.plan(graph, scores, secateurs.Budget(units=0.5), scope="local", kinds={"head"})
    small = secateurs.apply(model, plan)
    assert type(small.encoder.layers[1].self_attention) is MultiheadAttention
    assert secateurs.verify(model, small, plan, inputs).raise_if_failed().exact_expected

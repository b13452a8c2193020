"""What a caller reads keeps its lengths; a cache that the model alone reads again shrinks with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateurs
from secateurs.surgery.silence import silenced
from secateurs.testing import check_model


class Cache:
    """Keys of all positions so far, as a class of its own."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, keys: Tensor) -> Tensor:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 1)
        return self.keys


@dataclass
class Record(Cache):
    """A cache that is a record, which people read."""

    keys: Tensor | None = None


class Decoder(nn.Module):
    """Each position reads the mean of the keys up to the end; the keys are kept for the next call."""

    KIND: type[Cache] = Cache

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.read = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def attend(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        cache = cache or self.KIND()
        keys = cache.update(self.key(x))
        return self.read(self.query(x) * keys.mean(1, keepdim=True)), cache


class ByName(Decoder):
    """The cache is returned under the name of the argument that takes it."""

    def forward(self, x: Tensor, cache: Any = None) -> dict[str, Any]:
        y, cache = self.attend(x, cache)
        return {"y": y, "cache": cache}


class ByAnnotation(Decoder):
    """The cache has no name in the tuple; an argument is annotated with its class."""

    def forward(self, x: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        return self.attend(x, past)


class KeysAreOutputToo(ByName):
    """The same tensor stands in the cache and among the outputs."""

    def forward(self, x: Tensor, cache: Any = None) -> dict[str, Any]:
        found = super().forward(x, cache)
        return {**found, "keys": found["cache"].keys.transpose(1, 2)}


class NotTakenBack(Decoder):
    """An object of a class of its own that `forward` has no argument for."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, cache = self.attend(x, None)
        return {"y": y, "seen": cache}


class NothingElse(Decoder):
    """The object is all that comes out, so it is what the call is about."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Cache:
        return self.attend(x, cache)[1]


class RecordOfKeys(ByName):
    """A dataclass is a way to pack outputs."""

    KIND = Record


class CannotBeCalledAgain(ByName):
    """The argument of that name wants something else."""

    def forward(self, x: Tensor, cache: Any = None) -> dict[str, Any]:
        y, made = self.attend(x, None)
        return {"y": y if cache is None else y + len(cache), "cache": made}


class ReadByTheNextCallAlone(nn.Module):
    """The first call fills the cache; `late`, which reads it, runs from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.late, self.now = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        y = self.now(x)
        if cache is not None:
            y = y + self.late(cache.keys)
        made = Cache()
        made.update(self.key(x))
        return y, made


def test_keys_are_cut_where_the_model_alone_reads_its_cache() -> None:
    for kind, argument in ((ByName, "cache"), (ByAnnotation, "past")):
        graph = check_model(kind().eval(), torch.randn(2, 4, 5))
        assert [(group.name, group.size) for group in graph.groups] == [("query", 6)]
        assert graph.state == {argument: "Cache"}


def test_a_cut_model_goes_on_from_its_own_cache() -> None:
    torch.manual_seed(0)
    model, x = ByName().eval(), torch.randn(2, 4, 5)
    graph = secateurs.trace(model, x)
    small = secateurs.apply(model, secateurs.Plan.of(graph, {"query": [1, 4]}))
    cache = small(x[:, :3])["cache"]
    assert cache.keys.shape == (2, 3, 4)
    torch.testing.assert_close(small(x[:, 3:], cache)["y"][:, -1], small(x)["y"][:, -1])


def test_costs_and_reads_count_the_first_call_alone() -> None:
    graph = secateurs.trace(ByName().eval(), torch.randn(1, 4, 5))
    assert graph.cost().macs == 4 * (2 * 5 * 6 + 6 * 3)
    assert len({read.call for read in graph.reads}) == 1


@pytest.mark.parametrize("kind", [KeysAreOutputToo, NotTakenBack, NothingElse, RecordOfKeys])
def test_what_a_caller_may_read_is_locked(kind: Callable[[], nn.Module]) -> None:
    graph = secateurs.trace(kind().eval(), torch.randn(2, 4, 5))
    reasons = {f"{lock.parameter}:{lock.dim}": lock.reason for lock in graph.locked}
    assert reasons["key.weight:0"] == "it is an output of the model"


def test_state_that_the_model_does_not_take_is_locked() -> None:
    graph = secateurs.trace(CannotBeCalledAgain().eval(), torch.randn(2, 4, 5))
    assert not graph.groups
    assert not graph.state
    assert "it is state with which the model cannot be called again" in {lock.reason for lock in graph.locked}


def test_what_the_next_call_reads_goes_with_the_state() -> None:
    torch.manual_seed(0)
    model, x = ReadByTheNextCallAlone().eval(), torch.randn(2, 4, 5)
    graph = secateurs.trace(model, x)
    (group,) = graph.groups
    parts = {(part.parameter, part.dim) for part in group.slices}
    assert parts == {("key.weight", 0), ("key.bias", 0), ("late.weight", 1)}
    small = secateurs.apply(model, secateurs.Plan.of(graph, {group.name: [0, 2]}))
    cache = small(x)[1]
    assert small(x, cache)[0].shape == (2, 4, 3)


def _llama(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=60, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.randint(3, 60, (2, 9))}


def _t5(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        d_model=32, d_kv=4, d_ff=48, num_layers=1, num_heads=8, vocab_size=60, decoder_start_token_id=0
    )
    ids = {name: torch.randint(3, 60, (2, 7)) for name in ("input_ids", "decoder_input_ids")}
    return transformers.T5ForConditionalGeneration(config), ids


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("made_by", [_llama, _t5])
def test_a_decoder_with_its_default_cache_loses_heads_and_still_generates(
    made_by: Callable[[Any], tuple[nn.Module, dict[str, Tensor]]], cache: str | None
) -> None:
    """Token by token from its cache, the smaller model says what it says without one."""
    torch.manual_seed(0)
    model, inputs = made_by(pytest.importorskip("transformers"))
    graph = secateurs.trace(model.eval(), inputs)
    assert graph.state
    heads = [
        group
        for group in graph.groups
        if any("q_proj" in p.parameter or ".q." in p.parameter for p in group.slices)
    ]
    assert heads
    plan = secateurs.Plan.of(graph, secateurs.testing.cuts(graph)[-1])
    small: Any = secateurs.apply(model, plan)
    assert secateurs.verify(model, small, plan, inputs).ok
    ids = inputs["input_ids"]
    options = _greedy(ids, 5)
    plain = small.generate(ids, use_cache=False, **options)
    torch.testing.assert_close(small.generate(ids, cache_implementation=cache, **options), plain)


def _greedy(ids: Tensor, tokens: int) -> dict[str, Any]:
    """How to generate a fixed number of tokens, each the likeliest."""
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return {"attention_mask": torch.ones_like(ids), "do_sample": False, **lengths}


class Slotted:
    """A cache without a dictionary: its keys lie in a slot."""

    __slots__ = ("keys",)
    __init__, update = Cache.__init__, Cache.update


@pytest.mark.parametrize("kind", [Cache, Slotted])
def test_a_cache_that_comes_with_the_example_is_left_as_it_was(kind: type[Any]) -> None:
    model, cache = ByName().eval(), kind()
    cache.update(torch.ones(2, 3, 6))
    inputs = {"x": torch.randn(2, 4, 5), "cache": cache}
    graph = secateurs.trace(model, inputs)
    assert not graph.groups, "the keys that come in have their length"
    assert model(**{**inputs, "cache": None})["y"].shape == (2, 4, 3)
    assert cache.keys is not None and torch.equal(cache.keys, torch.ones(2, 3, 6))


def test_an_empty_cache_with_the_example_binds_nothing() -> None:
    model, cache = ByName().eval(), Cache()
    inputs = {"x": torch.randn(2, 4, 5), "cache": cache}
    graph = secateurs.trace(model, inputs)
    plan = secateurs.plan(
        graph, secateurs.score(model, graph, "l1"), secateurs.Budget(units=0.5), scope="local"
    )
    small = secateurs.apply(model, plan)
    assert small.key.out_features == 3
    secateurs.verify(model, small, plan, inputs).raise_if_failed()
    assert cache.keys is None


@pytest.mark.slow
def test_a_llama_without_some_heads_says_what_the_silenced_original_says() -> None:
    """The same tokens, from a cache that grows, from one of a fixed size, and without one."""
    torch.manual_seed(0)
    model, inputs = _llama(pytest.importorskip("transformers"))
    graph = secateurs.trace(model.eval(), inputs)
    exact = [group for group in graph.groups if group.name not in graph.mixers]
    assert any(group.kind == "head" for group in exact)
    whole = [group for group in exact if group.kind == "head" or "mlp" in group.name]
    gone = {group.name: range(group.size // 2) for group in whole}
    plan = secateurs.Plan.of(graph, secateurs.testing.fitting(graph, gone))
    quiet: Any = silenced(model, plan)
    small: Any = secateurs.apply(model, plan)
    ids = inputs["input_ids"]
    options = _greedy(ids, 8)
    expected = quiet.generate(ids, use_cache=False, **options)
    assert not torch.equal(expected, model.generate(ids, use_cache=False, **options))
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        assert torch.equal(small.generate(ids, **cache, **options), expected), cache
    small.config.num_key_value_heads = 2  # which only a chunked prefill reads
    chunked = {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True}
    assert torch.equal(small.generate(ids, **chunked, **options), expected)

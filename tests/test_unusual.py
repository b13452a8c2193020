"""What is asked of designs that are seldom seen, beyond their groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import secateurs
from models import build
from secateurs.graph.running import attention_as_written
from unusual_models import AttentionAsFunction


def test_what_reads_heads_is_seen_inside_attention_called_as_a_function() -> None:
    model = build(AttentionAsFunction)
    x, targets = model.example(4), torch.randn(4, 5, 4)
    graph = secateurs.trace(model, x)
    singles = [(x[n : n + 1], targets[n : n + 1]) for n in range(4)]
    got = secateurs.score(
        model, graph, "taylor-signed", data=singles, loss_fn=F.mse_loss, normalization="none"
    )["query"]
    F.mse_loss(model(x), targets).backward()
    weight = model.proj.weight
    change = (weight * weight.grad).sum(0).reshape(3, 4).sum(1).abs().detach()  # (heads,)
    torch.testing.assert_close(got / got.sum(), (change / change.sum()).to(got.dtype), rtol=1e-4, atol=1e-7)


def test_the_function_is_put_back_whatever_happens() -> None:
    before = F.multi_head_attention_forward
    with pytest.raises(ValueError, match="of the model's own"), attention_as_written():
        assert F.multi_head_attention_forward is not before
        raise ValueError("an error of the model's own")
    assert F.multi_head_attention_forward is before

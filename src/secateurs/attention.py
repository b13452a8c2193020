"""Multi-head attention whose stream, heads and head dimension are three numbers of their own.

``torch.nn.MultiheadAttention`` ties them: ``embed_dim`` is the width of what comes in, of what goes out and
of all heads together, and the scale of the scores follows from it. A layer that lost a head, or whose stream
lost a channel, cannot say so. `MultiheadAttention` has the same parameters under the same names and computes
the same in steps, from the shapes of its weights, its number of heads and a stated scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class MultiheadAttention(nn.MultiheadAttention):
    """An attention layer that keeps working when it has fewer heads, smaller heads or a narrower stream.

    Where torch's own layer can express the sizes, both give the same to rounding, with every option. It does
    not take torch's fused fast path, but takes the nested tensors that belong to it.

    Args:
        args: Those of ``torch.nn.MultiheadAttention``.
        options: Those of ``torch.nn.MultiheadAttention``.

    Attributes:
        num_heads: Number of heads.
        scale: What the scores are multiplied with: one over the root of the head dimension that the layer was
            trained with.

    Example:
        >>> layer = MultiheadAttention(8, 2, batch_first=True)
        >>> out, weights = layer(*[torch.zeros(1, 5, 8)] * 3)
        >>> out.shape, weights.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 5, 5]))
    """

    scale: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scale = self.head_dim**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The same arguments and results as those of ``torch.nn.MultiheadAttention``.

        Raises:
            RuntimeError: `is_causal` is given without `attn_mask`.
            TypeError: A mask that is neither boolean nor floating.
            ValueError: A nested tensor with masks or as a part of cross-attention.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal only says what attn_mask is: pass attn_mask too")
        is_self = query is key and key is value
        if query.is_nested or key.is_nested or value.is_nested:
            if not is_self or key_padding_mask is not None or attn_mask is not None:
                raise ValueError("nested tensors are taken by self-attention without masks only")
            return self._forward_nested(query, need_weights, average_attn_weights)
        is_batched = query.dim() == 3
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        query = self._batch_first(query)  # (N, L, E)
        key, value = (query, query) if is_self else (self._batch_first(key), self._batch_first(value))
        q, k, v = self._project(query, key, value, is_self)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)  # (N, H, L or S, D)
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        is_causal = is_causal and key_padding_mask is None and not need_weights  # the kernel makes the mask
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, query.dtype)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            mixed, weights = self._attend(q, k, v, mask, dropout)  # (N, H, L, D), (N, H, L, S)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        else:
            weights = None
            mixed = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal, scale=self.scale
            )
        out = functional.linear(
            mixed.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias
        )  # (N, L, E)
        if not is_batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def extra_repr(self) -> str:
        """The sizes, which are no longer those of torch's own layer."""
        return f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None  # torch asks it which weights there are
        super()._reset_parameters()
        self._qkv_same_embed_dim = False  # and its encoder layers whether they may take the fast path

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, is_self: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each ``(N, L or S, H x D)``."""
        bias, weights = self.in_proj_bias, packed_weight(self)
        if is_self and weights is not None:
            q, k, v = functional.linear(query, weights, bias).chunk(3, -1)
            return q, k, v
        if weights is not None:
            w_q, w_k, w_v = weights.chunk(3)
        else:
            w_q, w_k, w_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        b_q, b_k, b_v = (None, None, None) if bias is None else bias.chunk(3)
        return (
            functional.linear(query, w_q, b_q),
            functional.linear(key, w_k, b_k),
            functional.linear(value, w_v, b_v),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one that is added to the scores and broadcasts to ``(N, H, L, S)``."""
        whole: Tensor | None = None
        if attention is not None:
            whole = _additive(attention, dtype, self._extra_keys)
            if whole.dim() == 3:  # (N x H, L, S)
                whole = whole.view(-1, self.num_heads, whole.shape[1], whole.shape[2])
        if padding is not None:
            added = _additive(padding, dtype, self._extra_keys)[:, None, None, :]
            whole = added if whole is None else whole + added
        return whole

    @property
    def _extra_keys(self) -> int:
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """The kernel in steps, for those who want to see the weights."""
        scores = (q * self.scale) @ k.transpose(-2, -1)
        weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout > 0.0:
            weights = functional.dropout(weights, dropout)
        return weights @ v, weights

    def _forward_nested(
        self, x: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences of several lengths: padded, attended with a mask, and as long as before."""
        lengths = [len(sequence) for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = places >= torch.tensor(lengths, device=padded.device)[:, None]  # (N, L)
        if not self.batch_first:
            padded = padded.transpose(0, 1)
        out, weights = self.forward(
            padded,
            padded,
            padded,
            padding,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
        )
        rows = out if self.batch_first else out.transpose(0, 1)
        kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return torch.nested.as_nested_tensor(kept), weights


def packed_weight(layer: nn.MultiheadAttention) -> Tensor | None:
    """The three projections in one weight; None where keys or values have a width of their own."""
    return layer.in_proj_weight


def _additive(mask: Tensor, dtype: torch.dtype, extra: int) -> Tensor:
    """A mask to add to the scores; keys that the layer adds itself are never masked."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    elif not mask.is_floating_point():
        raise TypeError(f"a mask is boolean or floating, got {mask.dtype}")
    return functional.pad(mask, (0, extra)) if extra else mask

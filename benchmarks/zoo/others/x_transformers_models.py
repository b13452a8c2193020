"""x-transformers: decoders, encoders, an image model and an encoder-decoder, with an option or two set."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import (
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
)

from benchmarks.zoo.example import Case, Example

_VOCABULARY, _LENGTH = 100, 12
_SIZES = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16, "ff_mult": 2}

LAYERS: dict[str, dict[str, Any]] = {  # options of a decoder's layers
    "plain": {},
    "alibi": {"alibi_pos_bias": True},
    "attention_gates_of_heads": {"attn_gate_value_heads": True},
    "attention_gates_of_values": {"attn_gate_values": True},
    "attention_head_scale": {"attn_head_scale": True},
    "attention_latent_kv": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 32},
    "attention_memory_kv": {"attn_num_mem_kv": 4},
    "attention_on_attention": {"attn_on_attn": True},
    "attention_sigmoid": {"attn_sigmoid": True},
    "attention_sparse_topk": {"attn_sparse_topk": 4},
    "attention_talking_heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "cope": {"attn_use_cope": True},
    "dynamic_pos_bias": {"dynamic_pos_bias": True},
    "dynamic_tanh": {"use_dynamic_tanh": True},
    "flash": {"attn_flash": True},
    "forgetting": {"attn_data_dependent_alibi": True},
    "gated_residual": {"gate_residual": True},
    "glu": {"ff_glu": True, "ff_swish": True},
    "grouped_query": {"attn_kv_heads": 2},
    "hyper_connections": {"num_residual_streams": 2},
    "layerscale": {"use_layerscale": True, "layerscale_init_value": 0.1},
    "macaron": {"macaron": True},
    "multi_query": {"attn_one_kv_head": True},
    "orthogonal_residual": {"orthog_residual": True},
    "parallel": {"par_ratio": 2},
    "polar": {"polar_pos_emb": True},
    "post_norm": {"pre_norm": False},
    "qk_norm": {"attn_qk_norm": True},
    "qk_rmsnorm": {"attn_qk_rmsnorm": True, "attn_qk_norm": True},
    "rel_pos_bias": {"rel_pos_bias": True},
    "relu_squared": {"ff_relu_squared": True, "ff_post_act_ln": True, "ff_no_bias": True},
    "residual_attention": {"residual_attn": True, "depth": 3},
    "rmsnorm": {"use_rmsnorm": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary_xpos": {"rotary_xpos": True},
    "sandwich": {"sandwich_coef": 1, "depth": 3},
    "sandwich_norm": {"sandwich_norm": True},
    "scale_residual": {"scale_residual": True},
    "scalenorm": {"use_scalenorm": True},
    "shared_layers": {"weight_tie_layers": True},
    "shifted_tokens": {"shift_tokens": 1},
    "simple_rmsnorm": {"use_simple_rmsnorm": True},
    "swiglu_values": {"attn_swiglu_values": True},
    "unet_skips": {"unet_skips": True},
    "value_residual": {"add_value_residual": True},
}
WRAPPERS: dict[str, dict[str, Any]] = {  # options of what stands around them
    "embedding_factorised": {"emb_dim": 32},
    "embedding_norm": {"post_emb_norm": True, "l2norm_embed": True},
    "embedding_sinusoidal": {"scaled_sinu_pos_emb": True},
    "embedding_tied": {"tie_embedding": True},
    "memory_tokens": {"num_memory_tokens": 4},
    "mixture_of_softmax": {"mixture_of_softmax": True},
}
POOLS: dict[str, dict[str, Any]] = {
    "average": {"average_pool_embed": True},
    "class_token": {"use_cls_token": True},
}


def cases() -> dict[str, Case]:
    """A case for each option."""
    return {
        **{f"decoder_{name}": partial(_decoder, layers, {}) for name, layers in LAYERS.items()},
        **{f"wrapper_{name}": partial(_decoder, {}, around) for name, around in WRAPPERS.items()},
        **{f"encoder_pooled_by_{name}": partial(_encoder, around) for name, around in POOLS.items()},
        "continuous": _continuous,
        "vit": partial(_vit, {}, {}),
        "vit_registers_glu_gates": partial(
            _vit, {"ff_glu": True, "attn_gate_values": True}, {"num_register_tokens": 4}
        ),
        "encoder_decoder": _encoder_decoder,
    }


def _tokens(samples: int) -> Tensor:
    return torch.randint(0, _VOCABULARY, (samples, _LENGTH))


def _on_tokens(model: nn.Module) -> Example:
    return Example(model=model, inputs=_tokens(1), training_inputs=_tokens(2))


def _decoder(layers: dict[str, Any], around: dict[str, Any]) -> Example:
    decoder = Decoder(**{**_SIZES, **layers})
    return _on_tokens(
        TransformerWrapper(num_tokens=_VOCABULARY, max_seq_len=32, attn_layers=decoder, **around)
    )


def _encoder(around: dict[str, Any]) -> Example:
    encoder = Encoder(**_SIZES)
    return _on_tokens(
        TransformerWrapper(
            num_tokens=_VOCABULARY, max_seq_len=32, attn_layers=encoder, logits_dim=10, **around
        )
    )


def _continuous() -> Example:
    model = ContinuousTransformerWrapper(dim_in=24, dim_out=10, max_seq_len=32, attn_layers=Encoder(**_SIZES))
    return Example(
        model=model, inputs=torch.randn(1, _LENGTH, 24), training_inputs=torch.randn(2, _LENGTH, 24)
    )


def _vit(layers: dict[str, Any], around: dict[str, Any]) -> Example:
    encoder = Encoder(**_SIZES, **layers)
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=encoder, **around)
    return Example(model=model, inputs=torch.randn(1, 3, 32, 32), training_inputs=torch.randn(2, 3, 32, 32))


class Logits(nn.Module):
    """An encoder-decoder that gives logits; the library's own gives a loss."""

    def __init__(self, net: XTransformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """The logits of each token of the target."""
        encoded = self.net.encoder(source, return_embeddings=True)
        return self.net.decoder.net(target, context=encoded)


def _encoder_decoder() -> Example:
    sizes = {"num_tokens": _VOCABULARY, "max_seq_len": 32, **_SIZES}
    del sizes["dim"]
    halves = {f"{half}_{name}": value for half in ("enc", "dec") for name, value in sizes.items()}
    model = Logits(XTransformer(dim=64, tie_token_emb=True, **halves))
    return Example(model=model, inputs=(_tokens(1), _tokens(1)), training_inputs=(_tokens(2), _tokens(2)))

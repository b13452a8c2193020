"""open_clip: CLIP on transformers and on a residual network, and CoCa, each two blocks deep."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

from benchmarks.zoo.example import Case, Example

_VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
_TEXT = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
_PLAIN = {"embed_dim": 32, "vision_cfg": _VISION, "text_cfg": _TEXT}
_RESIDUAL = {**_VISION, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None, "image_size": 64}

TABLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIP, _PLAIN),
    "clip_gelu": (CLIP, {**_PLAIN, "quick_gelu": True}),
    "clip_no_causal_mask": (CLIP, {**_PLAIN, "text_cfg": {**_TEXT, "no_causal_mask": True}}),
    "clip_patch_dropout": (CLIP, {**_PLAIN, "vision_cfg": {**_VISION, "patch_dropout": 0.5}}),
    "clip_pooled_by_attention": (
        CLIP,
        {
            **_PLAIN,
            "vision_cfg": {
                **_VISION,
                "attentional_pool": True,
                "attn_pooler_queries": 4,
                "attn_pooler_heads": 4,
            },
        },
    ),
    "clip_pooled_by_average": (CLIP, {**_PLAIN, "vision_cfg": {**_VISION, "pool_type": "avg"}}),
    "clip_residual": (CLIP, {**_PLAIN, "vision_cfg": _RESIDUAL}),
    "clip_text_apart": (CustomTextCLIP, _PLAIN),
    "siglip": (
        CustomTextCLIP,
        {**_PLAIN, "text_cfg": {**_TEXT, "pool_type": "last", "proj_bias": True}, "init_logit_bias": -10.0},
    ),
    "coca": (
        CoCa,
        {
            "embed_dim": 64,
            "vision_cfg": {
                **_VISION,
                "attentional_pool": True,
                "attn_pooler_queries": 8,
                "attn_pooler_heads": 4,
                "output_tokens": True,
            },
            "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
        },
    ),
}


def cases() -> dict[str, Case]:
    """A case for each row."""
    return {name: partial(_example, kind, sizes) for name, (kind, sizes) in TABLE.items()}


def _example(kind: Any, sizes: dict[str, Any]) -> Example:
    side = sizes["vision_cfg"]["image_size"]
    return Example(model=kind(**sizes), inputs=_pair(side, 1), training_inputs=_pair(side, 2))


def _pair(side: int, samples: int) -> dict[str, Tensor]:
    return {"image": torch.randn(samples, 3, side, side), "text": torch.randint(1, 100, (samples, 12))}

"""vit-pytorch: the model of each of its files, 64 wide and two blocks deep.

Left out are the files that only train or record another's model (dino, es_vit, extractor, recorder and the
like) and what needs torchaudio (vaat).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from vit_pytorch import vat
from vit_pytorch.accept_video_wrapper import AcceptVideoWrapper
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.efficient import ViT as EfficientViT
from vit_pytorch.learnable_memory_vit import Adapter
from vit_pytorch.learnable_memory_vit import ViT as MemoryViT
from vit_pytorch.mae import MAE
from vit_pytorch.mp3 import MP3
from vit_pytorch.mp3 import ViT as UnplacedViT
from vit_pytorch.mpp import MPP
from vit_pytorch.na_vit import NaViT
from vit_pytorch.simmim import SimMIM
from vit_pytorch.simple_vit import SimpleViT, Transformer
from vit_pytorch.vit import ViT

from benchmarks.zoo.example import Case, Example

Row: TypeAlias = tuple[str, dict[str, Any], tuple[int, ...]]  # class, sizes of its own, shape of a sample

SIZES = {  # each constructor gets those of its parameters' names
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 64,
    "depth": 2,
    "heads": 4,
    "dim_head": 16,
    "mlp_dim": 128,
    "frames": 4,
    "image_patch_size": 8,
    "frame_patch_size": 2,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "dropout": 0.0,
    "emb_dropout": 0.0,
}
_IMAGE, _LARGER, _VIDEO, _SERIES = (3, 32, 32), (3, 64, 64), (3, 4, 32, 32), (3, 64)
_VIT = {name: SIZES[name] for name in inspect.signature(ViT).parameters if name in SIZES}
_1D = {"seq_len": 64}
_ND = {"ndim": 2, "input_shape": 32}
_CCT = {
    "img_size": 32,
    "embedding_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "num_classes": 10,
}
_STAGES = {"dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1)}

TABLE: dict[str, Row] = {  # file -> what to build
    "ats_vit": ("ViT", {"max_tokens_per_depth": (8, 4)}, _IMAGE),
    "attn_residual_with_dca_simple_vit": ("SimpleViT", {}, _IMAGE),
    "cait": ("CaiT", {"cls_depth": 1}, _IMAGE),
    "cct": ("CCT", _CCT, _IMAGE),
    "cct_3d": ("CCT", {**_CCT, "num_frames": 4}, _VIDEO),
    "cross_vit": (
        "CrossViT",
        {
            "image_size": 48,
            "sm_dim": 48,
            "lg_dim": 64,
            "depth": 1,
            **{f"{part}_dim_head": 16 for part in ("sm_enc", "lg_enc", "cross_attn")},
            **{f"{part}_heads": 4 for part in ("sm_enc", "lg_enc", "cross_attn")},
            "sm_enc_mlp_dim": 96,
            "lg_enc_mlp_dim": 128,
            "lg_enc_depth": 2,
        },
        (3, 48, 48),
    ),
    "crossformer": ("CrossFormer", {**_STAGES, "local_window_size": 2}, _LARGER),
    "cvt": (
        "CvT",
        {
            "s1_emb_dim": 16,
            "s2_emb_dim": 32,
            "s2_heads": 2,
            "s2_depth": 1,
            "s3_emb_dim": 64,
            "s3_heads": 4,
            "s3_depth": 1,
        },
        _IMAGE,
    ),
    "deepvit": ("DeepViT", {}, _IMAGE),
    "distill": ("DistillableViT", _VIT, _IMAGE),
    "jet_vit": ("JetViT", {"window_size": 2}, _IMAGE),
    "jumbo_vit": ("JumboViT", {"mlp_dim": 2, "jumbo_cls_k": 2, "jumbo_ff_mult": 1 / 64}, _IMAGE),
    "levit": (
        "LeViT",
        {
            "image_size": 64,
            "dim": (32, 48, 64),
            "heads": (2, 3, 4),
            "depth": 1,
            "mlp_mult": 2,
            "dim_key": 16,
            "dim_value": 16,
        },
        _LARGER,
    ),
    "look_vit": (
        "LookViT",
        {
            "image_size": 48,
            "patch_size": 12,
            "highres_patch_size": 6,
            "cross_attn_heads": 4,
            "cross_attn_dim_head": 16,
        },
        (3, 48, 48),
    ),
    "looped_vit": (
        "LoopedViT",
        {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": 2},
        _IMAGE,
    ),
    "max_vit": ("MaxViT", {"dim": 32, "depth": (1, 1), "window_size": 4, "dim_conv_stem": 16}, _LARGER),
    "max_vit_with_registers": (
        "MaxViT",
        {"dim": 32, "depth": (1, 1), "window_size": 4, "dim_conv_stem": 16},
        _LARGER,
    ),
    "mobile_vit": (
        "MobileViT",
        {
            "image_size": (64, 64),
            "patch_size": (2, 2),
            "dims": [32, 48, 64],
            "channels": [16, 16, 24, 24, 32, 32, 48, 48, 64, 64, 96],
            "depths": (1, 1, 1),
        },
        _LARGER,
    ),
    "nest": ("NesT", {"num_hierarchies": 2, "block_repeats": (1, 1)}, _IMAGE),
    "normalized_vit": ("nViT", {}, _IMAGE),
    "parallel_vit": ("ViT", {}, _IMAGE),
    "pit": ("PiT", {"depth": (1, 1)}, _IMAGE),
    "regionvit": ("RegionViT", {**_STAGES, "window_size": 2, "use_peg": True}, (3, 64, 64)),
    "rvt": ("RvT", {}, _IMAGE),
    "scalable_vit": (
        "ScalableViT",
        {"dim": 16, "depth": (1, 1), "heads": (2, 4), "reduction_factor": (2, 1), "window_size": (4, 4)},
        _LARGER,
    ),
    "sep_vit": ("SepViT", {"dim": 16, "depth": (1, 1), "heads": (2, 4)}, (3, 56, 56)),
    "simple_flash_attn_vit": ("SimpleViT", {}, _IMAGE),
    "simple_flash_attn_vit_3d": ("SimpleViT", {}, _VIDEO),
    "simple_uvit": ("SimpleUViT", {}, _IMAGE),
    "simple_vit": ("SimpleViT", {}, _IMAGE),
    "simple_vit_1d": ("SimpleViT", _1D, _SERIES),
    "simple_vit_3d": ("SimpleViT", {}, _VIDEO),
    "simple_vit_attn_residual": ("SimpleViTAttnResidual", {}, _IMAGE),
    "simple_vit_orthog_residual_update": ("SimpleViT", {}, _IMAGE),
    "simple_vit_with_fft": ("SimpleViT", {"freq_patch_size": 8}, _IMAGE),
    "simple_vit_with_hyper_connections": ("SimpleViT", {"num_residual_streams": 2}, _IMAGE),
    "simple_vit_with_patch_dropout": ("SimpleViT", {}, _IMAGE),
    "simple_vit_with_register_tokens": ("SimpleViT", {}, _IMAGE),
    "simple_vit_with_relative_proj_pos_bias": ("SimpleViT", {}, _IMAGE),
    "simple_vit_with_sparse_gating": ("SimpleViTWithSparseGating", {}, _IMAGE),
    "simple_vit_with_specialized_cls": ("SimpleViT", {}, _IMAGE),
    "simple_vit_with_value_residual": ("SimpleViT", {}, _IMAGE),
    "t2t": ("T2TViT", {"t2t_layers": ((3, 2), (3, 2))}, _IMAGE),
    "twins_svt": (
        "TwinsSVT",
        {
            **{f"s{stage}_emb_dim": 16 * stage for stage in range(1, 5)},
            **{f"s{stage}_local_patch_size": 2 for stage in range(1, 5)},
            **{f"s{stage}_global_k": 2 for stage in range(1, 5)},
            "s3_depth": 1,
            "s4_depth": 1,
        },
        _LARGER,
    ),
    "vit": ("ViT", {}, _IMAGE),
    "vit_1d": ("ViT", _1D, _SERIES),
    "vit_3d": ("ViT", {}, _VIDEO),
    "vit_5": ("ViT", {}, _IMAGE),
    "vit_detpool": ("ViTDetPool", {}, _IMAGE),
    "vit_for_small_dataset": ("ViT", {}, _IMAGE),
    "vit_nd": ("ViTND", _ND, _IMAGE),
    "vit_nd_pope": ("ViTND", _ND, _IMAGE),
    "vit_nd_rotary": ("ViTND", _ND, _IMAGE),
    "vit_with_decorr": ("ViT", {}, _IMAGE),
    "vit_with_keel_post_ln": ("ViT", {}, _IMAGE),
    "vit_with_patch_dropout": ("ViT", {}, _IMAGE),
    "vit_with_patch_merger": ("ViT", {"patch_merge_layer": 1, "patch_merge_num_tokens": 4}, _IMAGE),
    "vivit": ("ViViT", {}, _VIDEO),
    "vivit_with_moss": ("ViViT", {"moss_hidden_dim": 16}, _VIDEO),
    "wwt": ("WWT", {"num_slots": 4}, _IMAGE),
    "xcit": ("XCiT", {"cls_depth": 1}, _IMAGE),
}


def cases() -> dict[str, Case]:
    """A case for each file."""
    tabled = {
        name: partial(
            _example, getattr(importlib.import_module(f"vit_pytorch.{name}"), kind), sizes, shape
        )  # imports the class before the forks
        for name, (kind, sizes, shape) in TABLE.items()
    }
    return tabled | {name: partial(_with_image, make, shape) for name, (make, shape) in AROUND_OTHERS.items()}


def _example(kind: Any, sizes: dict[str, Any], shape: tuple[int, ...]) -> Example:
    return _with_image(lambda: _built(kind, sizes), shape)


def _with_image(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Example:
    return Example(model=make(), inputs=torch.randn(1, *shape), training_inputs=torch.randn(2, *shape))


def _built(kind: Any, sizes: dict[str, Any]) -> Any:
    taken = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in SIZES.items() if name in taken} | sizes)


class Packed(nn.Module):
    """NaViT, on the images of a batch as one list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _built(NaViT, {})

    def forward(self, images: Tensor) -> Tensor:
        """The logits of each image."""
        return self.net(list(images), group_images=True)


AROUND_OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # what takes a model, or a list
    "accept_video_wrapper": (
        lambda: AcceptVideoWrapper(_built(SimpleViT, {}), add_time_pos_emb=True, dim_emb=10, time_seq_len=4),
        _VIDEO,
    ),
    "efficient": (lambda: _built(EfficientViT, {"transformer": Transformer(64, 2, 4, 16, 128)}), _IMAGE),
    "learnable_memory_vit": (lambda: Adapter(vit=_built(MemoryViT, {}), num_memories_per_layer=2), _IMAGE),
    "mae": (
        lambda: MAE(
            encoder=_built(ViT, {"pool": "mean"}), decoder_dim=48, decoder_heads=4, decoder_dim_head=16
        ),
        _IMAGE,
    ),
    "mp3": (lambda: MP3(_built(UnplacedViT, {}), masking_ratio=0.5), _IMAGE),
    "mpp": (lambda: MPP(_built(DeepViT, {}), patch_size=8, dim=64), _IMAGE),
    "na_vit": (Packed, _IMAGE),
    "simmim": (lambda: SimMIM(encoder=_built(DeepViT, {})), _IMAGE),
    "vat": (
        lambda: _built(vat.VAT, {"vit": _built(vat.ViT, {}), "dim_action": 6, "self_attn_dim_head": 16}),
        (1, 3, 32, 32),
    ),
}

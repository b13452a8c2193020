"""Transformers' architectures as small random networks: two layers or so, 64 wide; nothing is downloaded.

A task's head is on each, since the hidden state of a bare encoder is an output and so keeps its width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.zoo.example import Case, Example
from benchmarks.zoo.transformers_table import (
    AUDIO,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    PAIRS,
    VISION,
    Sizes,
)

_VOCABULARY, _LENGTH = 100, 12
_NOT_OF_THE_CONFIGURATION = ("shape", "outputs")


def cases() -> dict[str, Case]:
    """A case for each architecture of the tables."""
    kinds = [
        (ENCODERS, _tokens),
        (DECODERS, _tokens),
        (ENCODER_DECODERS, _two_sequences),
        (VISION, _pixels),
        (AUDIO, _sound),
        (PAIRS, _image_and_text),
    ]
    return {
        name: partial(
            _example, getattr(transformers, name), sizes, make
        )  # imports the class before the forks
        for table, make in kinds
        for name, sizes in table.items()
    }


def _example(kind: Any, sizes: Sizes, make: Any) -> Example:
    config = _config(kind.config_class, sizes)
    inputs, training_inputs = make(config, 1), make(config, 2)
    model = kind(config)
    if "outputs" in sizes:
        model = Selected(model, sizes["outputs"])
    return Example(model=model, inputs=inputs, training_inputs=training_inputs)


class Selected(nn.Module):
    """A model that gives some of its outputs only, as a program that uses only these would wrap it."""

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = tuple(outputs)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The chosen outputs by name."""
        found = self.model(**inputs)
        return {name: found[name] for name in self.outputs}


def _config(kind: Any, sizes: Sizes) -> Any:
    """A configuration without caches, which would be outputs too."""
    config = kind(**{name: value for name, value in sizes.items() if name not in _NOT_OF_THE_CONFIGURATION})
    for name in ("use_cache", "use_mems", "return_loss"):
        if hasattr(config, name):
            setattr(config, name, False)
    config.zoo_shape = sizes.get("shape")
    return config


def _tokens(config: Any, samples: int) -> dict[str, Tensor]:
    ids = torch.randint(3, _VOCABULARY, (samples, _LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _two_sequences(config: Any, samples: int) -> dict[str, Tensor]:
    ids = torch.randint(3, _VOCABULARY, (samples, _LENGTH))
    return {"input_ids": ids, "decoder_input_ids": torch.randint(3, _VOCABULARY, (samples, _LENGTH - 2))}


def _pixels(config: Any, samples: int) -> dict[str, Tensor]:
    pixels = {"pixel_values": torch.randn(samples, *(config.zoo_shape or (3, 32, 32)))}
    if config.model_type == "vit_mae":  # which patches are masked, else drawn in forward
        pixels["noise"] = torch.rand(samples, (config.image_size // config.patch_size) ** 2)
    return pixels


def _sound(config: Any, samples: int) -> dict[str, Tensor]:
    if config.model_type == "whisper":
        ids = torch.randint(3, _VOCABULARY, (samples, 6))
        return {"input_features": torch.randn(samples, *config.zoo_shape), "decoder_input_ids": ids}
    return {"input_values": torch.randn(samples, *config.zoo_shape)}


def _image_and_text(config: Any, samples: int) -> dict[str, Tensor]:
    return {**_tokens(config, samples), **_pixels(config, samples)}

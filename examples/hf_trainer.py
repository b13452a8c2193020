"""A Hugging Face vision transformer is pruned between two runs of its Trainer.

Run: pip install 'secateurs[examples]' && python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import secateurs
from secateurs.data import ImageSet, load_data
from secateurs.measure import macs


def as_records(images: ImageSet) -> list[dict[str, Any]]:
    """What the Trainer wants: dictionaries with the names of forward's arguments."""
    return [{"pixel_values": image, "labels": label} for image, label in images]


def train(model: nn.Module, records: list[dict[str, Any]], epochs: int) -> None:
    """The Trainer as it is, with nothing written to disk."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=records).train()


def accuracy(model: nn.Module, records: list[dict[str, Any]]) -> float:
    """The share of images whose highest score is their label's."""
    pixels = torch.stack([record["pixel_values"] for record in records])
    labels = torch.tensor([record["labels"] for record in records])
    with torch.no_grad():
        scores: Tensor = model.eval()(pixel_values=pixels).logits
    return float((scores.argmax(1) == labels).float().mean())


def main() -> None:
    """Train, cut to half of the multiply-accumulates, repair, train on."""
    torch.manual_seed(0)
    digits = load_data("digits")
    images, held_out = as_records(digits.ranking), as_records(digits.test)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    train(model, images, 12)
    example = {"pixel_values": images[0]["pixel_values"][None]}
    pixels = torch.stack([record["pixel_values"] for record in images[:512]])
    unlabelled = [{"pixel_values": some} for some in pixels.split(64)]
    (step,) = secateurs.prune_steps(
        model.eval(),
        example,
        criterion="l2",
        budget=secateurs.Budget(macs=0.5),
        repair="reconstruct",
        repair_data=unlabelled,
    )
    print(step.plan, step.repaired, sep="\n")
    train(step.model, images, 6)
    share = macs(step.model, example) / macs(model, example)
    print(f"accuracy {accuracy(step.model, held_out):.3f} at {share:.3f} of the MACs")


if __name__ == "__main__":
    main()

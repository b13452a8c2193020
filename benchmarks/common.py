"""What every benchmark prints first, and the data and networks that several of them use."""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import platform
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from secateurs.machine import surroundings
from secateurs.planning.plan import Plan
from secateurs.recovery import Recipe, finetune
from secateurs.recovery.regularizer import Regularizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def header(title: str) -> None:
    """Print what is measured, on what machine, and when."""
    facts = surroundings()
    print(f"# {title}")
    print(f"# {datetime.date.today()}, {facts['machine']['cpu']}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, python {platform.python_version()}")  # fmt: skip


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data sets and weights")
    return parser


def cifar10(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """CIFAR-10 as normalised images ``(N, 3, 32, 32)`` and labels ``(N,)``."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    if spec is None or spec.loader is None or not (folder / "load.py").exists():
        raise SystemExit(f"the CIFAR-10 data is not in {folder}; pass --data")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images, labels = module.cifar10(split)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (torch.from_numpy(images).float() / 255 - mean) / std
    return pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def augmented(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> _Augmented:
    """Shuffled batches with random crops (4 pixels of padding) and flips, the same for the same seed."""
    return _Augmented(images, labels, batch_size, seed)


def from_scratch(
    model: nn.Module, folder: Path, epochs: int, *, lr: float, precision: str = "no"
) -> nn.Module:
    """Train a small network on all training images of CIFAR-10, by AdamW with half an epoch of warm-up."""
    images, labels = cifar10(folder, "train")
    recipe = Recipe(
        epochs=epochs,
        lr=lr,
        optimizer="adamw",
        warmup_epochs=0.5,
        clip_norm=1.0,
        weight_decay=0.01,
        precision=precision,
    )
    finetune(model, lambda seed: augmented(images, labels, 128, seed), recipe=recipe)
    return model.eval()


def finetuned(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    batch_size: int = 128,
    teacher: nn.Module | None = None,
    plan: Plan | None = None,
    regularizer: Regularizer | None = None,
) -> nn.Module:
    """A trained copy of a network, with its last weights."""
    tuned = copy.deepcopy(model).requires_grad_(True)
    finetune(
        tuned,
        lambda seed: augmented(images, labels, batch_size, seed),
        recipe=recipe,
        teacher=teacher,
        plan=plan,
        regularizer=regularizer,
    )
    return tuned


class _Augmented:
    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int) -> None:
        self._images, self._labels, self._size, self._seed = images, labels, batch_size, seed

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self):
        chance = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(len(self._images), generator=chance)
        for start in range(0, len(self) * self._size, self._size):
            chosen = order[start : start + self._size]
            batch = functional.pad(self._images[chosen], (4, 4, 4, 4))
            top, left = torch.randint(0, 9, (2, len(chosen)), generator=chance)
            rows = (top[:, None] + torch.arange(32))[:, None, :, None].expand(-1, 3, -1, 40)
            columns = (left[:, None] + torch.arange(32))[:, None, None, :].expand(-1, 3, 32, -1)
            batch = batch.gather(2, rows).gather(3, columns)
            flip = torch.rand(len(chosen), generator=chance) < 0.5
            batch[flip] = batch[flip].flip(3)
            yield batch, self._labels[chosen]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample and pad with zeros)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pad = (width - width_in) // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.pad or self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return functional.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, 56 for CIFAR-10 (He et al. 2015): three stages of 16, 32, 64 channels."""

    def __init__(self, depth: int = 56) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(
            *(_Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(blocks))
        )
        self.layer3 = nn.Sequential(
            *(_Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(blocks))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def pretrained(folder: Path, depth: int) -> CifarResNet:
    """A CIFAR-10 ResNet with its published weights, in eval mode."""
    path = folder / "weights" / f"cifar_resnet{depth}.safetensors"
    if not path.exists():
        raise SystemExit(f"{path} is missing; pass --data")
    model = CifarResNet(depth)
    missing = model.load_state_dict(load_file(path), strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    return model.eval()


class CifarVGG(nn.Module):
    """VGG-16 with batch norm for CIFAR-10 (Li et al. 2016): 13 convolutions, one hidden layer of 512.

    Args:
        width: Factor on all widths; 1 is the published network.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                after = round(channels * width)
                layers += [nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
        self.features = nn.Sequential(*layers)
        hidden = round(512 * width)
        self.classifier = nn.Sequential(
            nn.Linear(before, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))

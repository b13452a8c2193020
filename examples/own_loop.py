"""A training loop of your own around `secateurs.prune_steps`; the optimizer's momentum goes through each cut.

Run: python examples/own_loop.py    (a minute on one core, no download)
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import secateurs
from secateurs.data import load_data, loader
from secateurs.measure import accuracy, macs
from secateurs.recovery import carry_optimizer


def network() -> nn.Module:
    """Two convolutions that are wider than the digits need."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(192, 10)),
    )


def main() -> None:
    """Train, then cut, repair and train in three steps down to a quarter of the multiply-accumulates."""
    torch.manual_seed(0)
    digits = load_data("digits")
    plain = loader(digits.ranking, batch_size=64, shuffle=False, seed=0)
    held_out = loader(digits.test, batch_size=64, shuffle=False, seed=0)
    image = digits.ranking[0][0][None]

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        model.train()
        for epoch in range(epochs):
            for images, labels in loader(digits.train, batch_size=64, shuffle=True, seed=epoch):
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    train(model, optimizer, 3)
    first = macs(model, image)
    goal = secateurs.Budget(macs=0.25)
    for step in secateurs.prune_steps(
        model, image, budget=goal, steps=3, data=plain, loss_fn=cross_entropy, repair="reconstruct"
    ):
        optimizer = carry_optimizer(optimizer, model, step.model, step.plan)
        model = step.model
        train(model, optimizer, 1)
        print(step.number, step.plan, step.repaired, sep="\n  ")
    share = macs(model, image) / first
    print(f"accuracy {accuracy(model, held_out).top1:.3f} at {share:.3f} of the MACs")


if __name__ == "__main__":
    main()

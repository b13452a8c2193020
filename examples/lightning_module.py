"""A Lightning module is pruned between two fits: Lightning trains, Secateurs cuts and repairs.

Run: pip install 'secateurs[examples]' && python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from own_loop import network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import secateurs
from secateurs.data import load_data, loader
from secateurs.measure import accuracy, macs


class Classifier(lightning.LightningModule):
    """The network is an attribute, so that the smaller one can take its place."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called anew by each fit, so it gets the parameters of the smaller network."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(module: Classifier, images: object, epochs: int) -> None:
    """Train with nothing written to disk."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(module, images)


def main() -> None:
    """Train, cut to a third of the multiply-accumulates, repair, train on."""
    lightning.seed_everything(0)
    digits = load_data("digits")
    images = loader(digits.train, batch_size=64, shuffle=True, seed=0)
    plain = loader(digits.ranking, batch_size=64, shuffle=False, seed=0)
    held_out = loader(digits.test, batch_size=64, shuffle=False, seed=0)
    image = digits.ranking[0][0][None]

    module = Classifier(network())
    fit(module, images, 3)
    first = macs(module.net, image)
    (step,) = secateurs.prune_steps(
        module.net,
        image,
        budget=secateurs.Budget(macs=0.33),
        data=plain,
        loss_fn=cross_entropy,
        repair="reconstruct",
    )
    print(step.plan, step.repaired, sep="\n")
    module.net = step.model
    fit(module, images, 2)
    share = macs(module.net, image) / first
    print(f"accuracy {accuracy(module.net, held_out).top1:.3f} at {share:.3f} of the MACs")


if __name__ == "__main__":
    main()

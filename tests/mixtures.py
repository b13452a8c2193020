"""Mixtures of experts in the ways that they are written."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SPELLINGS = ("picked", "skipped", "masked")  # each expert a module
STACKED = ("stacked", "grouped")  # the experts' weights stacked in one parameter


class Mixture(nn.Module):
    """Each row goes to the experts that score best for it."""

    def __init__(
        self, spelling: str, width: int = 16, hidden: int = 24, count: int = 4, best: int = 2
    ) -> None:
        super().__init__()
        self.gate, self.best, self.spelling = nn.Linear(width, count), best, spelling
        if spelling in SPELLINGS:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
                for _ in range(count)
            )
        else:
            self.up = nn.Parameter(torch.randn(count, width, hidden) / width**0.5)
            self.down = nn.Parameter(torch.randn(count, hidden, width) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of what the chosen experts give."""
        shares, chosen = self.gate(x).softmax(-1).topk(self.best, -1)
        return getattr(self, f"_{self.spelling}")(x, shares, chosen)

    def _picked(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == number)
            out[rows] += shares[rows, rank][:, None] * expert(x[rows])
        return out

    def _skipped(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == number)
            if len(rows) == 0:
                continue
            out.index_add_(0, rows, shares[rows, rank][:, None] * expert(x[rows]))
        return out

    def _masked(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).any(-1)
            if here.any():
                own = (shares * (chosen == number)).sum(-1)[here]
                out[here] = out[here] + own[:, None] * expert(x[here])
        return out

    def _stacked(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        full = F.one_hot(chosen, num_classes=len(self.up)).permute(2, 0, 1)
        for (number,) in full.sum((1, 2)).nonzero():
            rows, rank = torch.where(full[number])
            given = F.gelu(x[rows] @ self.up[number]) @ self.down[number]
            out.index_add_(0, rows, shares[rows, rank][:, None] * given)
        return out

    def _grouped(self, x: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.best
        ends = torch.bincount(chosen.flatten(), minlength=len(self.up)).cumsum(0).to(torch.int32)
        hidden = F.gelu(F.grouped_mm(x[rows], self.up, offs=ends))
        given = F.grouped_mm(hidden, self.down, offs=ends) * shares.flatten()[order][:, None]
        return torch.zeros_like(x).index_add_(0, rows, given)


class Net(nn.Module):
    """Two mixtures in a residual stream behind a stem."""

    def __init__(self, spelling: str, count: int = 4, best: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        self.first, self.second = (Mixture(spelling, count=count, best=best) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of rows."""
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        return self.head(x)


def net(spelling: str, *, count: int = 4, best: int = 2) -> Net:
    """A network whose weights are the same in every spelling of a kind.

    Args:
        spelling: How its mixtures are written.
        count: Experts of a mixture.
        best: Experts of a row.
    """
    torch.manual_seed(0)
    made = Net(spelling, count, best).eval()
    for mixture in (made.first, made.second):  # so that each expert has rows
        mixture.gate.weight.data *= 4
        mixture.gate.bias.data.zero_()
    return made

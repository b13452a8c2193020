"""The command line: parse, call the library, print. One file a command."""

from __future__ import annotations

import os

import typer

from secateurs.cli.bench import bench
from secateurs.cli.compare import compare
from secateurs.cli.demo import demo
from secateurs.cli.inspect import inspect
from secateurs.cli.prune import prune
from secateurs.cli.rank import rank
from secateurs.cli.recover import recover
from secateurs.cli.sensitivity import sensitivity
from secateurs.cli.sparsify import sparsify
from secateurs.cli.train import train

app = typer.Typer(
    name="secateurs",
    help="Cut channels out of a trained PyTorch network, prove the cut, and heal the loss of accuracy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, train, sparsify, prune, recover, rank, compare, sensitivity, inspect, bench):
    app.command()(command)


def main() -> None:
    """Run the command line of the process."""
    # OpenMP's threads spin for milliseconds while they wait, which slows a job down tenfold as soon as
    # something else wants a core. A spin of some 50 us costs next to nothing. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    app()

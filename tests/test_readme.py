"""The programs of the README and of the guide run, and print what is said there."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import secateurs
from secateurs.cli import app
from tiny_net import TinyNet

README = Path(__file__).parents[1] / "README.md"


def _blocks() -> list[tuple[str, str]]:
    return re.findall(r"```(\w*)\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_program_is_short_and_prints_what_it_says() -> None:
    blocks = _blocks()
    place = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    program, output = blocks[place][1], blocks[place + 1][1]
    assert len(program.strip().splitlines()) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, str(README), "exec"), {})
    said, got = output.strip().splitlines(), printed.getvalue().strip().splitlines()
    assert got[0] == said[0]
    number = r"[\d.]+(e[-+]\d+)?"
    assert re.sub(number, "#", got[1]) == re.sub(number, "#", said[1])
    assert got[1].startswith("verified")


def test_the_one_call_of_the_readme_runs() -> None:
    program = next(
        text for language, text in _blocks() if "secateurs.prune(" in text and language == "python"
    )
    torch.manual_seed(0)
    known: dict[str, Any] = {
        "secateurs": secateurs,
        "model": TinyNet().eval(),
        "loader": torch.randn(32, 3, 8, 8).split(8),
    }
    exec(compile(program, str(README), "exec"), known)
    step = known["step"]
    assert step.repaired.images == 32 and step.plan.after.macs <= 0.5 * step.plan.before.macs


def test_the_examples_of_extending_run_and_print_what_they_say() -> None:
    text = (README.parent / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    known: dict[str, object] = {}
    for (language, program), (_, output) in pairwise(blocks):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(program, "docs/extending.md", "exec"), known)
            assert printed.getvalue() == output


@pytest.mark.parametrize("name", re.findall(r"\]\(((?:docs/)?[\w./-]+\.(?:md|png))\)", README.read_text()))
def test_every_file_that_is_linked_exists(name: str) -> None:
    assert (README.parent / name).exists()


def test_every_page_of_the_documentation_is_linked() -> None:
    text = README.read_text()
    assert all(f"(docs/{page.name})" in text for page in (README.parent / "docs").glob("*.md"))


def test_every_command_is_in_the_list() -> None:
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert all(f"\nsecateurs {name} " in README.read_text() for name in names)


def test_the_layout_names_every_package_and_module() -> None:
    text = (README.parent / "docs" / "architecture.md").read_text()
    layout = text.split("## Layout\n")[1].split("\n## ")[0]
    home = Path(secateurs.__file__).parent
    modules = {path.name for path in home.glob("*.py")} - {"__init__.py"}
    packages = {path.parent.name for path in home.glob("*/__init__.py")}
    assert {name for name in modules | packages if f"`{name}`" not in layout} == set()

"""The programs of the README and of the guide run, and print what is said there."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest

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

"""The public names: complete, sorted, documented."""

from __future__ import annotations

import inspect

import secateurs


def test_all_is_sorted_and_has_a_home_for_every_name() -> None:
    assert secateurs.__all__ == sorted(secateurs.__all__)
    assert set(secateurs.__all__) == set(secateurs._HOME)
    assert set(secateurs.__all__) <= set(dir(secateurs))


def test_every_public_name_has_a_docstring() -> None:
    for name in secateurs.__all__:
        value = getattr(secateurs, name)
        assert inspect.isclass(value) or inspect.isfunction(value)
        assert (inspect.getdoc(value) or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(secateurs, "prun")

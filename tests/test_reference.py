"""The reference misses no public name, and docstrings become the reStructuredText that they mean."""

import inspect

import pytest

import subspace_jax as sj
from docs import docstrings, reference


def public(module):
    return {n for n in module.__all__ if n != "__version__" and not inspect.ismodule(getattr(module, n))}


def test_no_public_name_is_missing():
    """What `__all__` of the library, of its rooms and of every method lists has an entry on a page."""
    homes, pages = reference.homes(), reference.pages()
    rooms = [n for n in sj.__all__ if inspect.ismodule(getattr(sj, n)) and n != "methods"]
    assert set(rooms) == set(reference.ROOMS)
    wanted = {f"sj.{n}" for n in public(sj)}
    for room in rooms:
        module = getattr(sj, room)
        wanted |= {f"sj.{room}.{n}" for n in (public(module) if hasattr(module, "__all__") else ())}
    wanted |= {f"sj.methods.{s.slug}.{n}" for s in sj.catalogue() for n in public(getattr(sj.methods, s.slug))}
    assert len(wanted) > 800
    assert wanted <= set(homes)
    for name in wanted:
        where, there = homes[name]
        file = where.removeprefix("sj.")
        text = pages[f"{file}.rst"]
        full = f"{where}.{there}".replace("sj", "subspace_jax", 1)
        assert f":: {full}\n" in text, f"{name} should be documented on {file}"


def test_a_name_is_documented_once():
    assert reference.homes()["sj.lora"] == reference.homes()["sj.methods.lora.lora"] == ("sj.methods.lora", "lora")
    assert reference.homes()["sj.errors.RankError"] == ("sj.core", "RankError")
    whole = "\n".join(reference.pages().values())
    assert whole.count(":: subspace_jax.methods.lora.lora\n") == 1
    assert ":: subspace_jax.lora\n" not in whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The factor `a` of \(W + s\,a\,b\).", r"The factor ``a`` of :math:`W + s\,a\,b`."),
        ("Any *args, and |x| of x_.", r"Any \*args, and \|x\| of x\_."),
        ("Shapes:\n- `[in]`\n- `[out]`", "Shapes:\n\n- ``[in]``\n- ``[out]``"),
        ("`a`s", "``a``\\ s"),
        (">>> x = `a` * 2\n2\n\n*", ">>> x = `a` * 2\n2\n\n\\*"),
    ],
)
def test_docstrings_become_restructured_text(text, expected):
    assert "\n".join(docstrings.to_rst(text.split("\n"))) == expected


def test_parts_of_docstrings():
    def function():
        r"""Adds \(a\) to \(b\).

        More words.

        Args:
          a: one.

        Example:
          >>> x = 1
          >>> for i in range(2):
          ...   x += i
          >>> x
          2
        """

    assert docstrings.to_markdown(docstrings.description(function)) == "Adds $a$ to $b$.\n\nMore words."
    assert docstrings.example(function) == "x = 1\nfor i in range(2):\n  x += i\nx"


@pytest.mark.parametrize("source", sj.catalogue(), ids=lambda source: source.slug)
def test_a_method_says_when_to_use_it(source):
    assert source.use_for.endswith(".")
    assert source.not_for.endswith(".")

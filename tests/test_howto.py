"""Every block of the how-to pages runs, one after the other; blocks of other libraries where those are installed."""

import functools
import importlib
import os
import re
from pathlib import Path

import jax
import pytest

import subspace_jax as sj

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    "beyond-the-weight.md",
    "concepts.md",
    "continual-learning.md",
    "exports.md",
    "frameworks.md",
    "how-fast.md",
    "nothing-learns.md",
    "own-model.md",
    "peft-files.md",
    "resume.md",
    "serving.md",
    "sharding.md",
    "your-own-data.md",
]
BLOCK = re.compile(r"```python( \w+)?\n(.*?)```", flags=re.DOTALL)


def run(name, library=None):
    """Runs a page's own blocks, and those of one library."""
    blocks = BLOCK.findall((DOCS / name).read_text())
    assert blocks
    names: dict = {}
    if library:
        names[library] = importlib.import_module(library)
    for marked, block in blocks:
        if not marked or marked.strip() == library:
            exec(compile(block, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", PAGES)
def test_the_blocks_of_a_page_run(name):
    run(name)


def test_the_table_of_methods_names_what_there_is():
    """Every name of the library resolves, and every experiment that a statement rests on exists."""
    page = (DOCS / "which-method.md").read_text()
    names = re.findall(r"`(sj\.[\w.]+)", page)
    assert len(names) > 20
    for name in names:
        functools.reduce(getattr, name.split(".")[1:], sj)
    known = {path.stem for path in (DOCS.parent / "experiments").rglob("*.py")}
    assert set(re.findall(r"`([a-z_]+)`", page)) <= known


@pytest.mark.interop
@pytest.mark.parametrize(
    ("library", "inputs"),
    [("keras", "x"), ("equinox", "x"), ("haiku", "x"), ("gemma", "tokens"), ("tunix", "tokens")],
)
def test_the_shortest_code_for_other_libraries_gives_what_their_models_give(library, inputs, monkeypatch):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "jax")
    pytest.importorskip(library)
    found = run("frameworks.md", library)
    fn, given = found["fn"], found[inputs]
    trainable, frozen = sj.partition(found["adapted"])
    filled = sj.combine(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    merged = fn(sj.merge(filled), given)
    assert abs(merged - fn(sj.merge(found["adapted"]), given)).max() > 1e-3
    assert abs(sj.with_adapters(fn)(filled, given) - merged).max() < 1e-4 * abs(merged).max()

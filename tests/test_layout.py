"""The house keeps its plan: imports point down, and the documents tell the truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_jax as sj
from docs import generate
from experiments import _registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "subspace_jax"

# What each topic may import of this library.
MAY_IMPORT = {
    "core": set(),
    "linalg": set(),
    "assets": set(),
    "weights": {"core", "linalg"},
    "adapters": {"core", "linalg", "weights"},
    "manifolds": {"core", "linalg"},
    "regularizers": {"core", "linalg"},
    "optim": {"core", "linalg", "manifolds", "regularizers", "weights"},
    "continual": {"adapters", "core", "linalg", "metrics", "optim", "weights"},
    "metrics": set(),
    "models": {"assets", "core", "linalg", "manifolds"},
    "data": {"assets"},
    "io": {"core", "weights"},
    "training": {"core", "io", "sharding"},
}


def imported_topics(path: Path) -> set[str]:
    topics = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            names = [f"subspace_jax.{node.module}"]
        topics |= {name.split(".")[1] for name in names if name.startswith("subspace_jax.")}
    return topics


def test_every_topic_is_planned():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("topic", sorted(MAY_IMPORT))
def test_imports_point_down(topic):
    for path in (PACKAGE / topic).rglob("*.py"):
        allowed = MAY_IMPORT[topic] | {topic}
        assert imported_topics(path) <= allowed, f"{path.relative_to(ROOT)} imports {imported_topics(path) - allowed}"


def test_nothing_reaches_into_private_files_of_another_topic():
    for path in PACKAGE.rglob("*.py"):
        topic = path.relative_to(PACKAGE).parts[0]
        for module in re.findall(r"from (subspace_jax\.\w+\._\w+) import", path.read_text()):
            assert module.split(".")[1] == topic, f"{path.relative_to(ROOT)} imports {module}"


def test_the_picture_names_every_topic():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for topic in MAY_IMPORT:
        assert f"{topic}/" in page
    for name in re.findall(r"`(core/_\w+\.py)`", page):
        assert (PACKAGE / name).exists(), name


def test_readme_example_runs(capsys):
    page = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:  # the second goes on where the first ends
        exec(compile(block, "README.md", "exec"), names)
    assert float(names["metrics"]["loss"]) < 1.0
    assert names["plain"]["layers_0"]["kernel"].shape == names["params"]["layers_0"]["kernel"].shape
    assert names["optimizer"].init(names["plain"])[0].basis["layers_2/kernel"].shape == (256, 8)
    assert "dora(lora)" in capsys.readouterr().out


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_parts_are_up_to_date(name):
    page = (ROOT / name).read_text()
    assert generate.fill(page) == page, "run `make tables`"


def test_catalogue_is_complete():
    known = set(_registry.names())
    for source in sj.catalogue():
        assert source.experiment in known, f"{source.name}: no experiments/{source.experiment}.py"
        for name in source.public:
            assert callable(getattr(sj, name)), f"{source.name}: subspace_jax.{name}"
    registered = {source.name for source in sj.catalogue()}
    for path in (PACKAGE / "adapters").glob("_[a-z]*.py"):
        name = path.stem.removeprefix("_")
        parts = any(name == one or name.startswith(f"{one}_") for one in registered)
        assert name == "catalogue" or parts, f"{path.name} does not register its method"


def test_import_is_light():
    heavy = "tensorflow_datasets", "orbax", "sklearn", "matplotlib", "rich", "tokenizers", "torch"
    code = f"import sys, subspace_jax; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # flax itself imports some of these; what counts is what we add to it.
    flax = code.replace("subspace_jax", "jax, flax.linen, optax")
    theirs = subprocess.run([sys.executable, "-c", flax], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(out.stdout)) <= set(ast.literal_eval(theirs.stdout))

"""The house keeps its plan: imports point down, names are where they are said to be, and the documents are true."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest

import subspace_jax as sj
from docs import generate

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "subspace_jax"

# What each room may import of this library, from the ground floor to the roof.
MAY_IMPORT = {
    "core": {"linalg"},
    "linalg": set(),
    "metrics": set(),
    "assets": set(),
    "data": {"assets", "core"},
    "weights": {"core", "linalg"},
    "manifolds": {"core", "linalg"},
    "sharding": {"core"},
    "models": {"assets", "banks", "core", "io", "weights"},
    "continual": {"core", "metrics"},
    "optim": {"core", "linalg", "manifolds", "weights"},
    "merging": {"core", "linalg", "weights"},
    "methods": {"continual", "core", "linalg", "manifolds", "merging", "metrics", "modules", "optim", "weights"},
    "reports": {"core", "linalg", "merging", "methods"},
    "banks": {"core", "methods", "modules", "weights"},
    "modules": {"core", "weights"},
    "io": {"core", "linalg", "methods", "weights"},
    "training": {"core", "io", "sharding"},
    "errors": {"assets", "continual", "core", "io"},
    # The command stands on the roof and sees the whole house.
    "cli": {
        "assets",
        "banks",
        "continual",
        "core",
        "data",
        "errors",
        "io",
        "linalg",
        "merging",
        "methods",
        "metrics",
        "models",
        "modules",
        "optim",
        "sharding",
        "training",
        "weights",
    },
}
# No part of a published method stays behind in these, and one method uses another by its public names only.
FAMILIES = (
    "analysis",
    "low_rank",
    "structured",
    "sparse",
    "optimizers",
    "continual",
    "regularized",
    "merging",
    "systems",
)


def imported(path: Path) -> set[str]:
    """The modules of this library that a file imports."""
    found: set[str] = set()
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            found |= {base} if base != "subspace_jax" else {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("subspace_jax.")}


def files_of(room: str) -> list[Path]:
    return [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))


def test_every_room_is_planned():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.stem not in ("__init__", "__pycache__", "py")}
    assert rooms == set(MAY_IMPORT)
    families = {p.name for p in (PACKAGE / "methods").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert families == set(FAMILIES)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_down(room):
    allowed = MAY_IMPORT[room] | {room}
    for path in files_of(room):
        rooms = {name.split(".")[1] for name in imported(path)}
        assert rooms <= allowed, f"{path.relative_to(ROOT)} imports {rooms - allowed}"


def test_the_plan_has_no_circle():
    left = dict(MAY_IMPORT)
    while left:
        floor = [room for room, below in left.items() if not below & set(left)]
        assert floor, f"these import each other in a circle: {sorted(left)}"
        left = {room: below for room, below in left.items() if room not in floor}


def home(module: str) -> str:
    """The folder whose face a module's names are handed out by: a room, or a method's home."""
    parts = module.split(".")
    return ".".join(parts[:4] if parts[1] == "methods" else parts[:2])


def test_nothing_reaches_into_private_files_of_another_home():
    for path in PACKAGE.rglob("*.py"):
        here = home(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imported(path):
            if any(part.startswith("_") for part in module.split(".")):
                assert home(module) == here, f"{path.relative_to(ROOT)} imports {module}"


def test_experiments_benchmarks_and_docs_use_no_private_names_of_each_other():
    for top in ("experiments", "benchmarks", "docs"):
        for path in (ROOT / top).rglob("*.py"):
            for module, names in re.findall(r"^from ([\w.]+) import (.*)$", path.read_text(), flags=re.MULTILINE):
                first, *others = module.split(".")
                if first in ("experiments", "benchmarks", "docs", "subspace_jax") and first != top:
                    private = [n for n in [*others, *names.split(", ")] if n.startswith("_")]
                    assert not private, f"{path.relative_to(ROOT)} imports {module}: {private}"


def test_shared_packages_say_what_they_hand_out():
    """A name in `__all__` exists, and a public name that an `__init__` imports is in its `__all__`."""
    for path in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        names = {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
        listed = [n for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
        assert listed, f"{path.relative_to(ROOT)} has no __all__"
        # Names that are loaded when they are asked for are told to the type checker alone.
        typed = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
        inner = [n for block in typed for n in block.body if isinstance(n, ast.ImportFrom)]
        names |= {a.asname for n in inner for a in n.names if a.asname and path.parent != PACKAGE}
        missing = names ^ (set(ast.literal_eval(listed[0].value)) - {"__version__", "data", "models", "training"})
        assert not missing, f"{path.relative_to(ROOT)}: __all__ and the imports differ by {sorted(missing)}"


def test_the_face_is_small_and_whole():
    """About 45 functions and classes at 25 methods; modules come on top."""
    functions = [name for name in sj.__all__ if callable(getattr(sj, name))]
    assert len(functions) <= 60
    assert sj.__version__
    for name in (
        "continual",
        "data",
        "errors",
        "linalg",
        "manifolds",
        "methods",
        "metrics",
        "models",
        "optim",
        "training",
    ):
        assert getattr(sj, name).__name__ == f"subspace_jax.{name}"
    assert issubclass(sj.errors.RankError, sj.errors.SubspaceError)
    with pytest.raises(AttributeError, match=r"osf_ranks.*sj\.methods"):
        sj.osf_ranks  # noqa: B018


def test_the_picture_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in MAY_IMPORT:
        assert re.search(rf"\b{room}\b", page), room
    for family in FAMILIES:
        assert f"{family}/" in page
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


def test_pages_of_methods_are_up_to_date():
    folder = ROOT / "docs" / "methods"
    pages = generate.method_pages()
    assert {p.name for p in folder.glob("*.md")} == set(pages), "run `make tables`"
    for name, text in pages.items():
        assert (folder / name).read_text() == text, f"docs/methods/{name}: run `make tables`"


def test_programs_on_pages_of_methods_are_whole():
    """They run as doctests in their files; on a page they have to bring every name along."""
    for name, text in generate.method_pages().items():
        for program in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            tree = ast.parse(program)
            bound = {a.asname or a.name.split(".")[0] for n in ast.walk(tree) for a in getattr(n, "names", ())}
            bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)} | set(vars(builtins))
            bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            missing = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - bound
            assert not missing, f"docs/methods/{name}: {sorted(missing)}"


def test_import_is_light():
    heavy = "tensorflow_datasets", "sklearn", "matplotlib", "rich", "tokenizers", "torch"
    code = f"import sys, subspace_jax; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # flax itself imports some of these; what counts is what we add to it.
    flax = code.replace("subspace_jax", "jax, flax.linen, optax")
    theirs = subprocess.run([sys.executable, "-c", flax], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(out.stdout)) <= set(ast.literal_eval(theirs.stdout))

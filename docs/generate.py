"""Writes the generated parts of README.md and docs/ from the catalogue and results: `python -m docs.generate`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks
import experiments
import subspace_jax as sj
from experiments import runner
from experiments.runner import human_bytes, markdown_table, read_json

ROOT = Path(__file__).parents[1]


def methods(folder: str = "docs/methods/") -> str:
    """Returns the table of published methods by family.

    Args:
      folder: where the pages of methods are, seen from the page that the table is on.
    """

    def row(source: sj.core.Source) -> list[str]:
        names = functions(source)
        short = [name for name in names if name.count(".") == 1] or names
        link = f"[{source.slug}]({folder}{source.slug}.md)"
        return [source.family.replace("_", " "), link, summary(source).rstrip("."), ", ".join(f"`{n}`" for n in short)]

    return markdown_table([["family", "method", "what it does", "functions"], *map(row, sj.catalogue())])


def summary(source: sj.core.Source) -> str:
    """Returns what a method does in one line: the first line of its home, without the method's name."""
    text = inspect.getdoc(getattr(sj.methods, source.slug)) or ""
    line = text.split("\n\n", maxsplit=1)[0].replace("\n", " ")
    return line.split(": ", maxsplit=1)[-1]


def functions(source: sj.core.Source) -> list[str]:
    """Returns a method's functions as a user writes them: those at the top of the library by their short name."""
    found = []
    for name in source.public:
        value = getattr(getattr(sj.methods, source.slug), name)
        if inspect.isfunction(value):
            found.append(f"sj.{name}" if getattr(sj, name, None) is value else f"sj.methods.{source.slug}.{name}")
    return sorted([*found, *(f"sj.{name}" for name in source.uses)], key=lambda name: (name.count("."), name))


def method_page(source: sj.core.Source) -> str:
    """Returns the page of a method: what it is, how to call it, where its files are, and what its experiment shows."""
    home = getattr(sj.methods, source.slug)
    path = Path(*source.module.split("."))
    module = path.with_suffix(".py")
    parts_of_home = [path / f.name for f in sorted((ROOT / path).glob("*.py"))]
    names = map(str, [module] if (ROOT / module).exists() else parts_of_home)
    experiment = runner.find(source.experiment)
    tests = sorted((ROOT / "tests" / "methods" / source.family).glob(f"test_{source.slug}*.py"))
    parts = [
        f"# {inspect.getdoc(home).splitlines()[0].rstrip('.')}",  # pyright: ignore[reportOptionalMemberAccess]
        f"{source.citation}.",
        f"A {' and a '.join(KINDS[kind] for kind in source.kinds)} of the family {source.family.replace('_', ' ')}.",
    ]
    for name in sorted(source.public, key=lambda name: not hasattr(sj, name)):
        value = getattr(home, name)
        if inspect.isfunction(value):
            text = (inspect.getdoc(value) or "").replace("\n\nSource:\n  " + source.citation + ".", "")
            short = f"sj.{name}" if getattr(sj, name, None) is value else f"sj.methods.{source.slug}.{name}"
            parts += [f"## `{short}`", f"```text\n{_signature(value, short)}\n\n{text.strip()}\n```"]
    classes = [n for n in source.public if inspect.isclass(getattr(home, n))]
    if classes:
        rows = [["class", "what it is"], *([f"`{n}`", _first_line(getattr(home, n))] for n in classes)]
        parts += ["## Classes", markdown_table(rows)]
    parts += ["## What its experiment shows", experiment.claim, experiment_table(source.experiment)]
    measured = (inspect.getdoc(runner.find_module(source.experiment, experiments, "experiment")) or "").strip()
    parts += [f"```text\n{measured}\n```"]
    listed = [*names, *(str(t.relative_to(ROOT)) for t in tests), _experiment_file(source.experiment)]
    parts += ["## Files", "\n".join(f"- [{name}](../../{name})" for name in listed)]
    return "\n\n".join(parts) + "\n"


KINDS = {
    "weight": "stand-in weight",
    "transformation": "gradient transformation",
    "learner": "learner of streams",
    "merger": "merger",
    "penalty": "penalty",
    "module": "module of activations",
    "analysis": "analysis",
    "system": "system",
}


def _signature(value: Any, name: str) -> str:
    """The call as the source has it, one line for each parameter."""
    function = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(function, ast.FunctionDef)
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + list(given.defaults)
    lines = [_parameter(a, d) for a, d in zip(given.args, defaults, strict=True)]
    lines += ["*"] if given.kwonlyargs and not given.vararg else []
    lines += [_parameter(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    lines += [f"**{given.kwarg.arg}"] if given.kwarg else []
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    body = ",\n    ".join(lines)
    return f"{name}(\n    {body},\n){returns}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return argument.arg + annotation + (f" = {ast.unparse(default)}" if default else "")


def _first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").split("\n\n", maxsplit=1)[0].replace("\n", " ")


def _experiment_file(name: str) -> str:
    return runner.modules()[name].replace(".", "/") + ".py"


def experiment_table(name: str) -> str:
    """Returns the table of an experiment's recorded result, with its command and circumstances."""
    path = ROOT / "experiments" / "results" / f"{name}.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m experiments run {name}` makes one."
    result, experiment = read_json(path), runner.find(name)
    defaults = {k: _listed(v) for k, v in dataclasses.asdict(experiment.config()).items()}
    other = {k: v for k, v in result["config"].items() if k in defaults and v != defaults[k]}
    settings = "".join(f" {k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in other.items())
    command = f"python -m experiments run {name}" + (f" --set{settings}" if settings else "")
    where = result["environment"]
    note = (
        f"`{command}`, mean ± standard deviation over {len(result['config']['seeds'])} seeds; {where['cores']} cores, "
        f"jax {where['packages']['jax']}."
    )
    return f"{markdown_table(experiment.rows(result))}\n\n{note}"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def experiments_table() -> str:
    """Returns every experiment with its claim and its command."""
    found = [(f, name) for f, name in runner.by_family(experiments) if name not in ("quickstart", "adapters")]
    rows = [["family", "experiment", "what it shows"]]
    rows += [[family.replace("_", " "), f"`{name}`", runner.find(name).claim] for family, name in found]
    return markdown_table(rows)


def step_table() -> str:
    """Returns operations and time of a step relative to full fine-tuning, from the recorded CPU result."""
    path = ROOT / "benchmarks" / "results" / "lora_step-cpu.json"
    if not path.exists():
        return "No result is recorded yet; `python -m benchmarks run lora_step` makes one."
    result = read_json(path)
    layouts = result["order"]["layouts"]
    timed = [x for x in layouts if any("seconds" in v["ratios"] for v in result["layouts"][x].values())]
    rows = [["variant", *(f"operations, {x}" for x in layouts), *(f"time, {x}" for x in timed), "optimizer state"]]
    for name in result["order"]["variants"]:
        cells = [result["layouts"][x].get(name, {}) for x in layouts]
        state = next((human_bytes(c["state_bytes"]) for c in cells if c), "")
        row = [name, *(_ratio(c, "step_flops") for c in cells)]
        rows.append([*row, *(_ratio(result["layouts"][x].get(name, {}), "seconds") for x in timed), state])
    where = result["environment"]
    note = (
        "A step of each relative to full fine-tuning: rank 8 on all kernels of a transformer of 4 layers of width 512, "
        "512 tokens. Operations are counted by the compiler, which counts the body of a scan once. "
        f"`python -m benchmarks run lora_step`; {where['cores']} cores, jax {where['packages']['jax']}; "
        "[all figures](benchmarks/results/README.md), [findings](benchmarks/NOTES.md)."
    )
    return f"{markdown_table(rows)}\n\n{note}"


def benchmark_table(name: str) -> str:
    """Returns the tables of a benchmark's recorded CPU result, with its notes, command and circumstances."""
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m benchmarks run {name}` makes one."
    result, benchmark = read_json(path), runner.entry(benchmarks, name)
    tables = "\n\n".join(markdown_table(rows) for _, rows in benchmark.tables(result))
    where = result["environment"]
    note = f"`python -m benchmarks run {name}`; {where['cores']} cores, jax {where['packages']['jax']}."
    return "\n\n".join([tables, *result.get("notes", ()), note])


def _ratio(measured: dict[str, Any], name: str) -> str:
    value = measured.get("ratios", {}).get(name)
    return "-" if value is None else f"{value:.3f}" if name == "step_flops" else f"{value:.2f}"


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "experiments": experiments_table,
    "adapters": lambda: experiment_table("adapters"),
    "quickstart": lambda: experiment_table("quickstart"),
    "lora_step": step_table,
    "optimizers": lambda: benchmark_table("optimizers"),
    "projected_step": lambda: benchmark_table("projected_step"),
    "lambda_orthogonality": lambda: experiment_table("lambda_orthogonality"),
    "continual_text": lambda: experiment_table("continual_text"),
    "continual_vision": lambda: experiment_table("continual_vision"),
    "gcr_fashion": lambda: experiment_table("gcr_fashion"),
}

PAGES = ("README.md", "docs/continual-learning.md")


def fill(text: str) -> str:
    """Returns a page with every generated part made anew.

    Args:
      text: a page with parts between `<!-- generated: NAME -->` and `<!-- end -->`.
    """

    def part(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def method_pages() -> dict[str, str]:
    """Returns the pages of all methods, and the list of them, by file name in docs/methods."""
    pages = {f"{source.slug}.md": method_page(source) for source in sj.catalogue()}
    return {"README.md": f"# Methods\n\n{methods('')}\n", **pages}


def main() -> None:
    """Writes every page anew."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill(page.read_text()))
    folder = ROOT / "docs" / "methods"
    folder.mkdir(exist_ok=True)
    pages = method_pages()
    for old in set(folder.glob("*.md")) - {folder / name for name in pages}:
        old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()

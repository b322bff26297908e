"""Writes the generated parts of README.md from the catalogue and the result files: `python -m docs.generate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import subspace_jax as sj
from experiments import _registry
from experiments._results import markdown_table, read_json

ROOT = Path(__file__).parents[1]


def methods() -> str:
    """Returns the table of published methods."""
    rows = [["method", "functions", "source", "experiment"]]
    for source in sj.catalogue():
        functions = ", ".join(f"`sj.{name}`" for name in source.public)
        rows.append(
            [source.name, functions, f"{source.authors}: {source.title}, {source.year}", f"`{source.experiment}`"]
        )
    return markdown_table(rows)


def experiment_table(name: str) -> str:
    """Returns the table of an experiment's recorded result, with its command and circumstances."""
    path = ROOT / "experiments" / "results" / f"{name}.json"
    if not path.exists():
        return f"No result is recorded yet; `python -m experiments run {name}` makes one."
    result = read_json(path)
    where = result["environment"]
    seeds = len(result["config"]["seeds"])
    note = (
        f"`python -m experiments run {name}`, mean ± standard deviation over {seeds} seeds; "
        f"{where['cores']} cores, jax {where['packages']['jax']}."
    )
    return f"{markdown_table(_registry.find(name).rows(result))}\n\n{note}"


def benchmark_table(name: str) -> str:
    """Returns the page that a benchmark made of its results."""
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    return path.read_text().strip() if path.exists() else f"`python -m benchmarks run {name}` measures it."


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "quickstart": lambda: experiment_table("quickstart"),
    "lora_step": lambda: benchmark_table("lora_step"),
}


def fill(text: str) -> str:
    """Returns a page with every generated part made anew.

    Args:
      text: a page with parts between `<!-- generated: NAME -->` and `<!-- end -->`.
    """

    def part(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> None:
    """Writes every page anew."""
    page = ROOT / "README.md"
    page.write_text(fill(page.read_text()))


if __name__ == "__main__":
    main()

"""Writes the generated parts of docs/ from the catalogue and recorded results: `python -m docs.generate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import experiments
import subspace_jax as sj
from docs.method_page import functions, main_functions, method_page, short_name, summary
from docs.results import benchmark_table, experiment_table, figures_of_the_league, league_table, step_table
from experiments import runner
from experiments.runner import markdown_table

ROOT = Path(__file__).parents[1]


def methods() -> str:
    """Returns the table of published methods by family, as the page of all methods has it."""

    def row(source: sj.core.Source) -> list[str]:
        start = [short_name(source, name) for name in main_functions(source)] + [f"sj.{n}" for n in source.uses]
        link = f"[{source.slug}]({source.slug}.md)"
        more = len(functions(source)) - len(start[:2])
        names = ", ".join(f"`{n}`" for n in start[:2]) + (f" and {more} more" if more > 0 else "")
        return [source.family.replace("_", " "), link, summary(source).rstrip("."), names]

    return markdown_table([["family", "method", "what it does", "start with"], *map(row, sj.catalogue())])


def all_methods() -> str:
    """Returns the table of all methods with their figures, to be sorted by a click on a column's head."""
    columns, measured = figures_of_the_league()
    rows = [["method", "family", *columns, "what its experiment shows"]]
    for source in sj.catalogue():
        link, family = f"[{source.slug}](methods/{source.slug}.md)", source.family.replace("_", " ")
        cells = measured.get(source.slug, [""] * len(columns))
        rows.append([link, family, *cells, runner.find(source.experiment).claim])
    return markdown_table(rows)


def experiments_table() -> str:
    """Returns every experiment with its claim and its command."""
    rows = [["family", "experiment", "what it shows"]]
    for family, name in runner.by_family(experiments):
        if name != "quickstart":
            rows.append([family.replace("_", " "), f"`{name}`", runner.find(name).claim])
    return markdown_table(rows)


PARTS: dict[str, Callable[[], str]] = {
    "all_methods": all_methods,
    "experiments": experiments_table,
    "league": league_table,
    "league_top": lambda: league_table(8),
    "quickstart": lambda: experiment_table("quickstart"),
    "lora_step": step_table,
    "optimizers": lambda: benchmark_table("optimizers"),
    "projected_step": lambda: benchmark_table("projected_step"),
    "roofline": lambda: benchmark_table("roofline"),
    "peft_minilm": lambda: benchmark_table("peft_minilm"),
    "continual_steps": lambda: benchmark_table("continual_steps"),
    "lambda_orthogonality": lambda: experiment_table("lambda_orthogonality"),
    "continual_text": lambda: experiment_table("continual_text"),
    "continual_vision": lambda: experiment_table("continual_vision"),
    "gcr_fashion": lambda: experiment_table("gcr_fashion"),
}

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("continual-learning", "experiments", "benchmarks", "how-fast", "which-method")),
)


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
    head = (
        "# Methods\n\nEvery published method has one home, `sj.methods.<slug>`, and one page of the same form: what it "
        "does, when to use it, code, what was measured, what did not reproduce, and where it departs from the "
        "publication. [Which method?](../which-method.md) has all of them in one table with their figures."
    )
    return {"README.md": f"{head}\n\n{methods()}\n", **pages}


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

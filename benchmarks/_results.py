"""Results on disk: one JSON file per benchmark and device kind, and one page made from all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks._benchmark import find
from benchmarks._charts import draw
from experiments.runner import environment, markdown_table, read_json, write_json

FOLDER = Path(__file__).parent / "results"


def save(name: str, config: Mapping[str, Any], results: Mapping[str, Any], folder: Path = FOLDER) -> Path:
    """Writes a result with its circumstances, and the page anew.

    Args:
      name: the benchmark.
      config: its settings.
      results: what it measured.
      folder: where results are.

    Returns:
      The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    circumstances = environment()
    for package in results.get("packages", ()):
        circumstances["packages"][package] = _version(package)
    kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    path = folder / f"{name}-{kind}.json"
    write_json(path, {**results, "benchmark": name, "config": dict(config), "environment": circumstances})
    write_page(folder)
    return path


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def page(folder: Path = FOLDER) -> str:
    """Returns the Markdown page of all results in a folder."""
    parts = ["# Benchmark results\n\nWritten by `python -m benchmarks page` from the JSON files beside it."]
    for path in sorted(folder.glob("*.json")):
        results = read_json(path)
        benchmark, circumstances = find(results["benchmark"]), results["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in sorted(circumstances["packages"].items()))
        where = f"{', '.join(circumstances['devices'])} ({circumstances['processor']}, {circumstances['cores']} cores)"
        parts.append(f"## {benchmark.name}: {where}")
        settings = " ".join(f"{k}={_setting(v)}" for k, v in sorted(results["config"].items()) if v not in ([], ()))
        parts.append(
            f"{benchmark.claim}\n\n`python -m benchmarks run {benchmark.name} --set {settings}`, "
            f"{circumstances['finished']}.\nPython {circumstances['python']}, {versions}."
        )
        if benchmark.charts is not None:
            parts.append(f"![{benchmark.name}]({path.stem}.png)")
        for title, rows in benchmark.tables(results):
            parts.append(f"### {title}\n\n{markdown_table(rows)}")
        parts += [f"{note}" for note in results.get("notes", ())]
    return "\n\n".join(parts) + "\n"


def _setting(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_page(folder: Path = FOLDER) -> None:
    """Writes the page of all results into their folder, and the pictures in it."""
    for path in sorted(folder.glob("*.json")):
        results = read_json(path)
        charts = find(results["benchmark"]).charts
        if charts is not None:
            draw(charts(results), path.with_suffix(".png"))
    (folder / "README.md").write_text(page(folder))

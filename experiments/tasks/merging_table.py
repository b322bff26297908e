"""The table of a comparison of mergers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runner import human_bytes, with_spread


def rows(results: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    """Returns every merger at its chosen strength, by kind of experts; the best mean first."""
    table = [["experts", "merger", "strength", "each task (%)", "mean (%)", "normalized (%)", "time (s)", "memory"]]
    for kind in dict.fromkeys(r["kind"] for r in results["runs"]):
        singles = [s for s in results["singles"] if s["kind"] == kind]
        own = [s["experts"] for s in singles]
        alone = with_spread([float(np.mean(one)) for one in own])
        table.append([kind, "each expert alone", "", _per_task(own), alone, "100", "", ""])
        table.append([kind, "the base", "", *_figures([s["base"] for s in singles]), "", ""])
        by_method: dict[str, list[Mapping[str, Any]]] = {}
        for one in results["runs"]:
            if one["kind"] == kind:
                by_method.setdefault(one["method"], []).append(one)
        order = sorted(by_method, key=lambda m: -float(np.mean([r["accuracy"] for r in by_method[m]])))
        for method in order:
            found = by_method[method]
            strength = _strength(found[0]["strength"], results["searches"][kind].get(method, []))
            # Programs are compiled by the last seed; memory may lie ready from earlier calls, so the most tells.
            seconds = min(r["seconds"] for r in found)
            memory = [r["peak_bytes"] for r in found if r["peak_bytes"] is not None]
            size = human_bytes(max(memory)) if memory else ""
            table.append([kind, method, strength, *_figures(found), f"{seconds:.1f}", size])
    return table


def _strength(chosen: float | None, search: Sequence[Mapping[str, float]]) -> str:
    """The chosen strength, and whether it lies at an edge of what was searched."""
    tried = [one["strength"] for one in search]
    edge = " (edge)" if chosen in (min(tried, default=None), max(tried, default=None)) else ""
    return "" if chosen is None else f"{chosen:.3g}{edge}"


def _per_task(values: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{100 * v:.0f}" for v in np.mean(values, axis=0))


def _figures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        _per_task([r["tasks"] for r in found]),
        *(with_spread([r[k] for r in found]) for k in ("accuracy", "normalized")),
    ]

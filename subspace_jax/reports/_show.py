"""A report as a table of text, as a picture, and as a page."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from subspace_jax.reports._report import MatrixChange, Report

COLUMNS = {
    "matrix": "path of the leaf, and the layer of a stack",
    "method": "what stands there",
    "moved": "change over weight, in the Frobenius norm",
    "rank": "of the change",
    "directions": "how many hold 90 % of its energy",
    "inside": "share of the change within as many leading pretrained directions",
    "intruders": "leading directions that resemble no pretrained one",
    "rounding": "share of the change that the weight's dtype loses",
    "cosine": "with the other change",
    "overlap": "share of the other's directions that lie in these",
}


def cells(one: MatrixChange, compared: bool) -> list[str]:
    """Returns the cells of one matrix."""
    found = [
        *(one.path, one.method, f"{100 * one.moved:.2f}%", str(one.rank), str(one.directions)),
        *(f"{100 * one.inside:.0f}%", str(one.intruders), f"{100 * one.rounding:.2g}%"),
    ]
    return [*found, f"{one.cosine:.2f}", f"{one.overlap:.2f}"] if compared else found


def text_table(report: Report) -> str:
    """Returns a line for each matrix, and what all of them have in common."""
    compared = any(one.cosine is not None for one in report)
    header = list(COLUMNS)[: 10 if compared else 8]
    lines = [header, *(cells(one, compared) for one in report)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    return "\n".join([*(line.rstrip() for line in text), summary(report)])


def summary(report: Report) -> str:
    """Returns in a sentence what happened."""
    moved = [one for one in report if one.moved]
    others = sum(1 for value in report.others.values() if value)
    if not moved:
        return f"none of {len(report.matrices)} matrices moved, {others} of {len(report.others)} other leaves did"
    most = max(moved, key=lambda one: one.moved)
    return (
        f"{len(moved)} of {len(report.matrices)} matrices moved, {most.path} most, by {100 * most.moved:.2g}%; "
        f"{sum(one.intruders for one in moved)} intruders; {others} of {len(report.others)} other leaves moved"
    )


def draw(report: Report) -> bytes:
    """Returns a PNG: how far each matrix moved, in how many directions, and the spectra of the changes.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'subspace-jax[cli]'.") from error

    count = len(report.matrices)
    figure = Figure(figsize=(13, min(40.0, 2.0 + 0.22 * max(count, 8))), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 3))
    names, places = [one.path for one in report], np.arange(count)
    left.barh(places, [100 * one.moved for one in report], color="C0")
    left.set_yticks(places, names, fontsize=6 if count > 20 else 8)
    left.set_xlabel("moved, % of the weight's norm")
    middle.barh(places, [one.rank for one in report], color="C7", alpha=0.4, label="rank of the change")
    middle.barh(places, [one.directions for one in report], color="C1", label="directions with 90 % of it")
    middle.plot([one.intruders for one in report], places, "kx", markersize=4, label="intruders")
    middle.set_yticks([])
    middle.set_xlabel("directions")
    for axes in (left, middle):
        axes.set_ylim(count - 0.4, -0.6)
    if count:
        middle.legend(fontsize=7)
    _spectra(right, report)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _spectra(axes: Any, report: Report) -> None:
    """Singular values of every change, over the largest one of it."""
    for values in report.spectra.values():
        if values.size and values[0] > 0:
            axes.plot(np.arange(1, len(values) + 1), values / values[0], color="C0", alpha=0.3, linewidth=0.8)
    axes.set(xscale="log", yscale="log", ylim=(1e-6, 1.5), xlabel="direction", title="spectra of the changes")
    axes.grid(alpha=0.3)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:.2rem .6rem;text-align:right;border-bottom:1px solid "
    "#ddd}td:first-child,th:first-child{text-align:left;font-family:monospace}img{max-width:100%}"
    ".scroll{overflow-x:auto}"
)


def html_page(report: Report, picture: bytes) -> str:
    """Returns one page with the sentence, the picture and the table, which needs no other file."""
    compared = any(one.cosine is not None for one in report)
    header = list(COLUMNS.items())[: 10 if compared else 8]
    head = "".join(f'<th title="{html.escape(told)}">{name}</th>' for name, told in header)
    lines = (
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(one, compared)) + "</tr>" for one in report
    )
    image = base64.b64encode(picture).decode()
    others = "".join(
        f"<tr><td>{html.escape(path)}</td><td>{100 * moved:.2f}%</td></tr>"
        for path, moved in report.others.items()
        if moved
    )
    rest = f"<h2>Other leaves that moved</h2><table>{others}</table>" if others else ""
    told = "".join(f"<li><b>{name}</b>: {html.escape(words)}</li>" for name, words in header)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>What the training changed</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>What the training changed</h1><p>{html.escape(summary(report))}.</p>"
        f'<img alt="How far each matrix moved, and in how many directions" src="data:image/png;base64,{image}">'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
        f"{rest}<ul>{told}</ul></html>\n"
    )

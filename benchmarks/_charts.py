"""Pictures of results: bars of every variant, one chart beside the other, and rooflines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chart:
    """Bars, one group for each label.

    Attributes:
      title: above the bars.
      axis: what the bars' length is.
      bars: by label, then by series.
      reference: where a line is drawn; None for none.
      log: whether the axis is logarithmic.
    """

    title: str
    axis: str
    bars: Mapping[str, Mapping[str, float]]
    reference: float | None = None
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Points between the two limits of a machine.

    Attributes:
      title: above the picture.
      points: by series, then by label: operations a byte, and thousand million operations a second.
      flops: the limit of operations, in thousand millions a second.
      bytes: the limit of bytes, likewise.
    """

    title: str
    points: Mapping[str, Mapping[str, tuple[float, float]]]
    flops: float
    bytes: float

    @property
    def bars(self) -> Sequence[int]:
        """Fourteen, as high as so many bars."""
        return range(14)


def draw(charts: Sequence[Chart | Roofline], path: Path) -> None:
    """Draws charts beside each other into a PNG file.

    Args:
      charts: at least one.
      path: the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(charts))
    lines = -(-len(charts) // columns)
    most = max(4, *(len(chart.bars) for chart in charts))
    size = (5.5 * columns, (1.2 + 0.3 * most) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, chart in zip(axes.ravel(), charts, strict=False):
        _draw_roofline(axis, chart) if isinstance(chart, Roofline) else _draw_one(axis, chart)
    for axis in axes.ravel()[len(charts) :]:
        axis.axis("off")
    figure.savefig(path, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def _draw_one(axis: Any, chart: Chart) -> None:
    series = list(dict.fromkeys(name for group in chart.bars.values() for name in group))
    thick = 0.8 / len(series)
    for number, name in enumerate(series):
        places = [i + (number - (len(series) - 1) / 2) * thick for i in range(len(chart.bars))]
        values = [group.get(name, float("nan")) for group in chart.bars.values()]
        axis.barh(places, values, thick, label=name)
    axis.set_yticks(range(len(chart.bars)), list(chart.bars), fontsize=8)
    axis.invert_yaxis()
    axis.set_title(chart.title, fontsize=10, pad=22 if len(series) > 1 else 6)
    axis.set_xlabel(chart.axis, fontsize=9)
    if chart.log:
        axis.set_xscale("log")
    if chart.reference is not None:
        axis.axvline(chart.reference, color="0.3", linewidth=0.8)
    if len(series) > 1:  # above the bars, which would lie under it
        axis.legend(fontsize=8, ncols=len(series), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axis.grid(axis="x", alpha=0.3)


def _draw_roofline(axis: Any, chart: Roofline) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    places = [x for series in chart.points.values() for x, _ in series.values()]
    heights = [y for series in chart.points.values() for _, y in series.values()]
    ridge = chart.flops / chart.bytes
    ends = (min(*places, ridge) / 1.5, max(*places, ridge) * 1.5)
    axis.plot([ends[0], ridge, ends[1]], [ends[0] * chart.bytes, chart.flops, chart.flops], color="0.3", linewidth=1)
    for number, (name, series) in enumerate(chart.points.items()):
        drawn = axis.scatter(*zip(*series.values(), strict=True), s=18, label=name, marker="os^"[number % 3])
        # Points of two series lie in pairs, so each has its labels on a side of its own.
        side, offset = ("left", 5) if number % 2 == 0 else ("right", -5)
        style = {"textcoords": "offset points", "ha": side, "fontsize": 7, "color": drawn.get_facecolor()[0]}
        for label, place in series.items():
            axis.annotate(label, place, xytext=(offset, -3), **style)
    axis.set(xscale="log", yscale="log", ylim=(min(heights) / 1.3, 1.2 * max(*heights, chart.flops)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        one.set_major_formatter(ScalarFormatter())
        one.set_minor_formatter(NullFormatter())
    axis.set_title(chart.title, fontsize=10)
    axis.set_xlabel("operations a byte", fontsize=9)
    axis.set_ylabel("GFLOP a second", fontsize=9)
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3, which="both")

"""How long a step takes under each policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halfstep.compare.result import Comparison
from halfstep.report import series, svg, wording
from halfstep.report.figures.chart import Chart, Looks, Runs, grid, row_name, rows
from halfstep.report.svg import NARROW, SURFACE, TEXT, WIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM = 6.0  #: ratio of medians from which step times need a logarithmic axis
_DOTS = 120  #: steps drawn per policy


def step_times(runs: Runs, comparison: Comparison, looks: Looks) -> Chart:
    """Step times per policy: the middle half as a box, the median labelled, single steps as dots."""
    title = "Step time"
    pooled = {policy: series.timed_milliseconds(records) for policy, records in runs.items()}
    pooled = {policy: values for policy, values in pooled.items() if len(values)}
    if not pooled:
        return Chart(title, "No run has a timed step: time is taken from one step of an optimizer to its next.")
    medians = {result.policy: result.speed.median_seconds * 1e3 for result in comparison.policies if result.speed}
    centers = {policy: medians.get(policy, float(np.median(values))) for policy, values in pooled.items()}
    ends = np.array([np.quantile(values, (0.02, 0.95)) for values in pooled.values()])
    low, high = min(ends[:, 0].min(), *centers.values()), max(ends[:, 1].max(), *centers.values())
    logarithmic = low > 0 and max(centers.values()) > _LOG_FROM * min(centers.values())
    if logarithmic:
        low, high = low / 1.1, high * 1.1
    else:
        pad = 0.12 * (high - low) or 0.05 * high or 1.0
        low, high = max(0.0, low - pad), high + pad
    beyond = sum(int(((values < low) | (values > high)).sum()) for values in pooled.values())
    says = [
        "Each dot is a step" + (" (a sample, evenly spaced in rank)" if _thinned(pooled) else "") + ", "
        "the box holds the middle half, the thin line the middle 90 %, the label is the median over seeds."
    ]
    if logarithmic:
        says.append("The axis is logarithmic.")
    if beyond:
        says.append(f"{beyond:,} of {sum(map(len, pooled.values())):,} steps lie beyond the axis.")
    label = "Step time per policy: " + ", ".join(f"{p} median {wording.number(c, 4)} ms" for p, c in centers.items())
    drawing = svg.draw(
        "time",
        label + ".",
        {WIDE: 52.0 * len(pooled) + 34, NARROW: 74.0 * len(pooled) + 34},
        partial(_paint_times, pooled=pooled, centers=centers, view=(low, high, logarithmic), looks=looks),
    )
    return Chart(title, " ".join(says), drawing)


def _thinned(pooled: Mapping[str, series.Array]) -> bool:
    return any(len(values) > _DOTS for values in pooled.values())


def _paint_times(
    figure: Figure,
    narrow: bool,
    *,
    pooled: Mapping[str, series.Array],
    centers: Mapping[str, float],
    view: tuple[float, float, bool],
    looks: Looks,
) -> None:
    row, above = (74, 20) if narrow else (52, 0)
    axes = rows(figure, narrow, row * len(pooled), right=14)
    low, high, logarithmic = view
    axes.set_xscale("log" if logarithmic else "linear")
    axes.set_xlim(low, high)
    _time_axis(axes, view, narrow)
    for place, (policy, values) in enumerate(pooled.items()):
        color = looks[policy].color
        middle = place * row + above + 30
        row_name(axes, policy, place * row + 12 if narrow else middle, narrow)
        q05, q25, q75, q95 = np.clip(np.quantile(values, (0.05, 0.25, 0.75, 0.95)), low, high)
        axes.plot([q05, q95], [middle, middle], color=color, linewidth=1.2, solid_capstyle="butt")
        axes.fill_between([q25, q75], middle - 7, middle + 7, color=SURFACE, linewidth=0, zorder=3)
        axes.fill_between([q25, q75], middle - 7, middle + 7, color=color, alpha=0.3, linewidth=0, zorder=3)
        center = centers[policy]
        axes.plot([center, center], [middle - 9, middle + 9], color=color, linewidth=2.5, zorder=4)
        dots = series.thinned(values[(values >= low) & (values <= high)], _DOTS)
        # A fixed irrational stride keeps neighbouring dots apart without a random generator.
        jitter = middle + 16 + 3 * ((np.arange(len(dots), dtype=np.float64) * 0.618034) % 1 - 0.5)
        _dots(axes, dots, jitter, color)
        _clamped_text(axes, center, middle - 12, f"{wording.number(center, 4)} ms")


def _dots(axes: Axes, x: series.Array, y: series.Array, color: str) -> None:
    """Dots as segments of no length with round ends: one path instead of a marker each."""
    gap = np.full(len(x), math.nan)
    flat_x, flat_y = np.column_stack([x, x, gap]).ravel(), np.column_stack([y, y, gap]).ravel()
    axes.plot(flat_x, flat_y, color=color, alpha=0.55, linewidth=2.4, solid_capstyle="round")


def _clamped_text(axes: Axes, x: float, y: float, text: str) -> None:
    """Text centred above ``x``, or flush with the edge of the axes where it would stick out."""
    fraction = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[0]
    align = "left" if fraction < 0.08 else "right" if fraction > 0.92 else "center"
    axes.text(x, y, text, ha=align, va="bottom", color=TEXT, fontweight="bold")


def _time_axis(axes: Axes, view: tuple[float, float, bool], narrow: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high, logarithmic = view
    locator = LogLocator(subs=(1, 2, 5)) if logarithmic else MaxNLocator(4 if narrow else 7)
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:,g} ms" for tick in ticks])
    grid(axes, "x")

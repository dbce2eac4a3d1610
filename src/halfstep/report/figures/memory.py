"""What fills the memory at its peak, per policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from halfstep.compare.result import Comparison, PolicyResult
from halfstep.report import svg, wording
from halfstep.report.figures.chart import NAME_WIDTH, Chart, Key, grid, row_name, rows, text_at
from halfstep.report.svg import MUTED, NARROW, SMALL, SURFACE, WIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACTIVATIONS = "activations and temporaries"
_REST = "not categorised"
#: colour of each known category, in the order in which they are stacked from the left; the last two end the stack
_COLORS = {
    "parameters": 0,
    "master weights": 1,
    "gradients": 2,
    "optimizer state": 3,
    "buffers": 4,
    _ACTIVATIONS: 5,
    "other tensors": 6,
    _REST: 6,
}
_TOTAL_WIDTH = 80  #: pixels right of the bars for the total


def memory(comparison: Comparison) -> Chart:
    """Live tensor bytes at the peak of a step, stacked by category."""
    title = "Memory at the peak of a step"
    measured = [result for result in comparison.policies if result.peak_bytes]
    if not measured:
        return Chart(title, "No run measured its memory.")
    names = sorted({name for result in measured for name, _ in _segments(result)}, key=_category_place)
    colors = {name: _COLORS.get(name, _COLORS["buffers"]) for name in names}
    label = "Memory at the peak per policy: " + "; ".join(
        f"{r.policy} {wording.size(r.peak_bytes or 0)}"
        + f" ({', '.join(f'{name} {wording.size(count)}' for name, count in _segments(r))})"
        for r in measured
    )
    drawing = svg.draw(
        "memory",
        label + ".",
        {WIDE: 58.0 * len(measured) + 34, NARROW: 78.0 * len(measured) + 34},
        partial(_paint_memory, measured=measured, colors=colors),
    )
    legend = tuple(Key(name, svg.category_variable(place), None) for name, place in colors.items())
    missing = [result.policy for result in comparison.policies if not result.peak_bytes]
    says = (
        "Bytes of live tensors at the fullest moment of a training step, largest over seeds, and the operation there."
    )
    if memories := wording.memories(comparison):
        says += f" {memories[0].upper()}{memories[1:]}."
    if missing:
        says += f" Not measured: {', '.join(missing)}."
    return Chart(title, says, drawing, legend)


def _segments(result: PolicyResult) -> list[tuple[str, int]]:
    parts = {name.replace("_", " "): count for name, count in result.memory_by_category.items() if count > 0}
    rest = (result.peak_bytes or 0) - sum(parts.values())
    if rest > 0:
        parts[_REST] = rest
    return sorted(parts.items(), key=lambda part: _category_place(part[0]))


def _category_place(name: str) -> tuple[int, str]:
    known = list(_COLORS)
    # Unknown names share the activations' place, and names order them there.
    return known.index(name if name in _COLORS else _ACTIVATIONS), name


def _paint_memory(figure: Figure, narrow: bool, *, measured: Sequence[PolicyResult], colors: Mapping[str, int]) -> None:
    row, above = (78, 20) if narrow else (58, 0)
    axes = rows(figure, narrow, row * len(measured), right=_TOTAL_WIDTH)
    most = max(sum(count for _, count in _segments(result)) for result in measured)
    axes.set_xlim(0, most)
    _size_axis(axes, most, narrow)
    width = (NARROW - 1 if narrow else WIDE - NAME_WIDTH) - _TOTAL_WIDTH
    for place, result in enumerate(measured):
        top = place * row + above + 8
        row_name(axes, result.policy, place * row + 14 if narrow else top + 11, narrow)
        left = 0.0
        for name, count in _segments(result):
            color = svg.category_color(colors[name])
            axes.barh(top + 11, count, left=left, height=22, color=color, edgecolor=SURFACE, linewidth=1.2)
            text = wording.size(count)
            if count / most * width > 7.5 * len(text):
                axes.text(
                    left + count / 2,
                    top + 11,
                    text,
                    ha="center",
                    va="center_baseline",
                    color=SURFACE,
                    fontsize=SMALL,
                )
            left += count
        text_at(axes, left, top + 11, wording.size(result.peak_bytes or 0), dx=8, weight="bold")
        if result.peak_op:
            text_at(axes, 0, top + 32, f"peak at {result.peak_op}", dx=0, color=MUTED, size=SMALL, backed=True)


def _size_axis(axes: Axes, most: float, narrow: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    power = min(4, math.floor(math.log(most, 1024)))
    unit = 1024.0**power
    ticks = [tick for tick in MaxNLocator(3 if narrow else 6).tick_values(0, most / unit) if 0 <= tick <= most / unit]
    name = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    axes.set_xticks([tick * unit for tick in ticks], [f"{tick:g} {name}" if tick else "0" for tick in ticks])
    grid(axes, "x")

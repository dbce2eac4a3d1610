"""Which layers' gradients turn into zeros, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halfstep.report import svg
from halfstep.report.figures.chart import Chart, share, shortened, step_axis, text_at
from halfstep.report.figures.layers import OUTSIDE, Rows, rows
from halfstep.report.series import Array
from halfstep.report.svg import MUTED, NARROW, SMALL, TEXT, WIDE, ZONE, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 120
#: upper ends of the shades; up to the first is as good as nothing
SHADES = (0.001, 0.01, 0.05, 0.2, 0.5, 1.0)
_STRENGTH = (None, 0.14, 0.32, 0.52, 0.75, 1.0)  #: None: the ground that says "looked at, and nothing"
_LOOK = Look(2)
_HEAD = 30.0  #: pixels of the key above the map
_ROW = {WIDE: 20.0, NARROW: 32.0}
_NAME_WIDTH = {WIDE: 208.0, NARROW: 1.0}


@dataclass(frozen=True)
class Shares:
    """Underflow per row and column; NaN where a layer had no gradient."""

    rows: Rows
    starts: tuple[int, ...]  #: first step of each column
    size: int  #: steps per column
    values: Array  #: (rows, columns), 0 to 1: the worst of what a cell stands for
    skipped: tuple[bool, ...]  #: whether a step of this column was skipped

    @property
    def last(self) -> int:
        return self.starts[-1] + self.size - 1


def underflow(steps: Sequence[tuple[int, Mapping[str, float], bool]]) -> Chart:
    """Layer × step map of the share of gradient elements that are zero and would not be in FP32.

    Args:
        steps: (step number, share per layer, whether its update was applied), in order.
    """
    title = "Gradients that became zero"
    shares = reduced(steps)
    if shares is None:
        return Chart(title, "No step was compared with FP32: nothing is known of zeros that rounding made.")
    worst = np.nanmax(shares.values)
    row, column = np.unravel_index(int(np.nanargmax(shares.values)), shares.values.shape)
    says = ["The share of each layer's gradient elements that are zero in this run and not in FP32."]
    if worst > SHADES[0]:
        at = shares.starts[int(column)]
        says.append(f"The worst: {share(float(worst))} in {list(shares.rows.of)[int(row)]}, step {at:,}.")
    else:
        says.append("None of them lost any worth mentioning.")
    if any(shares.skipped):
        says.append("A dot above marks a step that was skipped.")
    if shares.size > 1:
        says.append(f"A column is {shares.size} steps.")
    if shares.rows.rule:
        says.append(shares.rows.rule)
    if shares.size > 1 or shares.rows.rule:
        says.append("A cell shows the worst of what it stands for.")
    label = f"Map of {len(shares.rows.of)} rows of layers by {len(shares.starts)} columns of steps. {says[1]}"
    drawing = svg.draw(
        "underflow",
        label,
        {width: _HEAD + _ROW[width] * len(shares.rows.of) + 46 for width in (WIDE, NARROW)},
        partial(_paint, shares=shares),
    )
    return Chart(title, " ".join(says), drawing)


def reduced(steps: Sequence[tuple[int, Mapping[str, float], bool]]) -> Shares | None:
    """At most as many rows and columns as can be read; None if no step knows of any layer."""
    chosen = rows(layer for _, layers, _ in steps for layer in layers)
    if not chosen.of:
        return None
    row_of = {layer: row for row, layers in enumerate(chosen.of.values()) for layer in layers}
    first, last = min(step for step, _, _ in steps), max(step for step, _, _ in steps)
    size = -(-(last - first + 1) // MOST_COLUMNS)
    starts = tuple(range(first, last + 1, size))
    values = np.full((len(chosen.of), len(starts)), math.nan)
    skipped = [False] * len(starts)
    for step, layers, applied in steps:
        column = (step - first) // size
        skipped[column] |= not applied
        for layer, value in layers.items():
            values[row_of[layer], column] = np.fmax(values[row_of[layer], column], value)
    if not np.isfinite(values).any():
        return None
    return Shares(chosen, starts, size, values, tuple(skipped))


def _paint(figure: Figure, narrow: bool, *, shares: Shares) -> None:
    width = NARROW if narrow else WIDE
    height, above = _ROW[width], 15.0 if narrow else 0.0
    total = height * len(shares.rows.of)
    axes = svg.panel(figure, left=_NAME_WIDTH[width], top=_HEAD + 12, right=1, height=total)
    # Cells of very few steps would be bars; they stay as wide as those of 20.
    end = shares.starts[0] + shares.size * max(len(shares.starts), 20)
    axes.set_xlim(shares.starts[0] - 0.5, end - 0.5)
    axes.set_ylim(total, 0)
    axes.set_yticks([])
    step_axis(axes, shares.last, narrow)
    if shares.last <= 8:
        axes.set_xticks(shares.starts, [f"{step:,}" for step in shares.starts])
    for place, name in enumerate(shares.rows.of):
        y = place * height + (7.0 if narrow else height / 2)
        shown = shortened(name or OUTSIDE, 60 if narrow else 33)
        text_at(axes, 0, y, shown, dx=-_NAME_WIDTH[width], size=SMALL, of_axes=True)
    for shade in range(len(SHADES)):
        cells = [(row, column) for row, column in np.argwhere(np.isfinite(shares.values))]
        own = [(row, column) for row, column in cells if _shade(shares.values[row, column]) == shade]
        boxes = [
            (
                shares.starts[column] - 0.5,
                row * height + above + 1,
                shares.size * (1 - 0.06 * (len(shares.starts) < 60)),
                height - above - 2,
            )
            for row, column in own
        ]
        _boxes(axes, boxes, shade)
    middles = [start - 0.5 + shares.size / 2 for start, skip in zip(shares.starts, shares.skipped, strict=True) if skip]
    if middles:
        axes.plot(middles, [-4.0] * len(middles), ".", color=TEXT, markersize=4, clip_on=False)
    _key(figure, width)


def _shade(value: float) -> int:
    return next((shade for shade, end in enumerate(SHADES) if value <= end), len(SHADES) - 1)


def _boxes(axes: Axes, boxes: Sequence[tuple[float, float, float, float]], shade: int) -> None:
    """All cells of one shade as one path."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not boxes:
        return
    corners = [
        point
        for x, y, width, height in boxes
        for point in ((x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y))
    ]
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
    strength = _STRENGTH[shade]
    color = ZONE if strength is None else _LOOK.color
    axes.add_patch(PathPatch(Path(corners, codes), facecolor=color, alpha=strength, linewidth=0))


def _key(figure: Figure, width: int) -> None:
    """What the shades mean, above the map."""
    axes = svg.panel(figure, left=1, top=0, right=1, height=20)
    axes.set_xlim(0, width - 2)
    axes.set_ylim(20, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    names = ["none", *(f"≤ {100 * end:g} %" for end in SHADES[1:-1]), f"> {100 * SHADES[-2]:g} %"]
    apart = 92.0 if width == WIDE else 65.0
    for shade, name in enumerate(names):
        x = shade * apart
        _boxes(axes, [(x, 4.0, 12.0, 12.0)], shade)
        text_at(axes, x, 10, name, dx=17, color=MUTED, size=SMALL)

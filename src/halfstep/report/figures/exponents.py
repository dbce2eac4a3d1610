"""How large the numbers of each layer are, in octaves, against what fp16 and bf16 can hold.

One row per layer: activations as a histogram above its line, gradients below it, both over the same axis of powers of
two. A loss scale is a power of two, so all it does is to move the gradients' half to the right: that is drawn as an
outline. (Micikevicius et al. 2018, "Mixed Precision Training", figure 3.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halfstep import formats
from halfstep.formats import Format
from halfstep.observe.histogram import BIAS, ExponentHistogram
from halfstep.report import svg
from halfstep.report.figures.chart import Chart, Key, power_of_two, share, shortened, text_at
from halfstep.report.series import Array
from halfstep.report.svg import GRID, MUTED, NARROW, SMALL, TEXT, WIDE, ZONE, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FP16, BF16 = formats.FORMATS["fp16"], formats.FORMATS["bf16"]

_ACTIVATIONS, _GRADIENTS = Look(1), Look(2)
_HALF = 20.0  #: pixels of the fullest octave's column
_HEAD = 92.0  #: pixels of the formats' rulers above the rows
_NAME_WIDTH = {WIDE: 176.0, NARROW: 1.0}
_SHARES_WIDTH = {WIDE: 150.0, NARROW: 1.0}
_ROW_HEIGHT = {WIDE: 50.0, NARROW: 66.0}
_LETTERS = {WIDE: 27, NARROW: 26}
_TAIL = 1e-4  #: share of a layer's numbers at either end that need not be within the axis


@dataclass(frozen=True)
class LayerNumbers:
    """The numbers of one row, of an FP32 step."""

    name: str
    activations: ExponentHistogram
    gradients: ExponentHistogram


def exponents(layers: Sequence[LayerNumbers], power: int | None = None, remark: str = "") -> Chart:
    """Exponent histograms per layer with the windows of fp16 and bf16.

    Args:
        layers: from the input to the output; rows without numbers are left out.
        power: the loss scale is ``2**power``; None without one.
        remark: what the caption says of the rows and the loss scale besides.
    """
    title = "Size of the numbers, layer by layer"
    drawn = [layer for layer in layers if layer.activations.nonzero or layer.gradients.nonzero]
    if not drawn:
        return Chart(title, "No FP32 step was profiled, or it made no numbers other than zero.")
    low, high, cut = _axis(drawn, power)
    legend = [Key("activations", _ACTIVATIONS.variable, None), Key("gradients", _GRADIENTS.variable, None)]
    says = [
        "One FP32 step: how many numbers lie in each octave, each half scaled to its fullest octave. "
        "The thin line reaches from the smallest number to the largest.",
        "Shaded: fp16's normal numbers; faintly shaded: its subnormal ones, which lose a bit per octave. "
        "What lies left of that becomes zero in fp16, what lies right of it inf.",
    ]
    if power is not None:
        legend.append(Key(f"gradients × {power_of_two(power)}", _GRADIENTS.variable, "0"))
        over = [layer.name for layer in drawn if layer.gradients.scaled(power).overflow_share(FP16)]
        if over:
            more = f" and {len(over) - 3} more" if len(over) > 3 else ""
            says.append(f"With this loss scale, gradients of {', '.join(over[:3])}{more} are beyond fp16.")
    says.append(
        "At the side, what fp16 would make of them: the share of activations that become inf and of gradients that "
        "become zero" + (", in brackets with the loss scale." if power is not None else ".") + " Zeros do not count."
    )
    if cut:
        says.append("What lies beyond the axis is counted in its last octave.")
    drawing = svg.draw(
        "exponents",
        _label(drawn, power),
        {width: _HEAD + _ROW_HEIGHT[width] * len(drawn) + 30 for width in (WIDE, NARROW)},
        partial(_paint, layers=drawn, power=power, limits=(low, high)),
    )
    return Chart(title, " ".join([*says, *([remark] if remark else [])]), drawing, tuple(legend))


def _label(layers: Sequence[LayerNumbers], power: int | None) -> str:
    flushed = [f"{layer.name} {share(layer.gradients.flushed_share(FP16))}" for layer in layers]
    scale = f" A loss scale of 2 to the {power} is drawn too." if power is not None else ""
    return f"Exponent histograms of {len(layers)} layers; gradients below fp16: {', '.join(flushed)}.{scale}"


def _axis(layers: Sequence[LayerNumbers], power: int | None) -> tuple[int, int, bool]:
    """The octaves from ``low`` up to ``high``, and whether some numbers lie beyond.

    fp16's window is always whole. Single numbers far out would press everything else together.
    """
    ends = [(lowest(FP16) - 2, FP16.emax + 3)]
    extremes = []
    for layer in layers:
        shown = [layer.activations, layer.gradients]
        if power is not None:
            shown.append(layer.gradients.scaled(power))
        for histogram in shown:
            if histogram.nonzero:
                counts = histogram.counts[:-1].numpy()
                below = np.cumsum(counts) / counts.sum()
                first, last = np.searchsorted(below, (_TAIL, 1 - _TAIL))
                ends.append((int(first) - BIAS, int(last) - BIAS + 1))
                filled = np.flatnonzero(counts)
                extremes.append((int(filled[0]) - BIAS, int(filled[-1]) - BIAS + 1))
    low, high = min(a for a, _ in ends), max(b for _, b in ends)
    # Where little is left out, nothing is.
    wider = max(min(a for a, _ in extremes), low - 6), min(max(b for _, b in extremes), high + 6)
    low, high = min(low, wider[0]), max(high, wider[1])
    return low, high, any(a < low or b > high for a, b in extremes)


def lowest(format: Format) -> int:
    """The exponent below which a number becomes zero: half the smallest subnormal one."""
    return format.emin - format.mantissa_bits - 1


def _paint(
    figure: Figure, narrow: bool, *, layers: Sequence[LayerNumbers], power: int | None, limits: tuple[int, int]
) -> None:
    width = NARROW if narrow else WIDE
    row = _ROW_HEIGHT[width]
    height = _HEAD + row * len(layers)
    axes = svg.panel(figure, left=_NAME_WIDTH[width], top=0, right=_SHARES_WIDTH[width], height=height)
    axes.set_xlim(*limits)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    _octaves(axes, limits, narrow)
    _windows(axes, limits, height)
    _rulers(axes, limits, layers, power)
    if not narrow:
        text_at(axes, 1, _HEAD - 22, "activations → inf", dx=12, color=MUTED, size=SMALL, of_axes=True)
        scaled = " (scaled)" if power is not None else ""
        text_at(axes, 1, _HEAD - 7, f"gradients → 0{scaled}", dx=12, color=MUTED, size=SMALL, of_axes=True)
    for place, layer in enumerate(layers):
        top = _HEAD + place * row
        axes.axhline(top, color=GRID, linewidth=1)
        middle = top + (20 if narrow else 4) + _HALF + 1
        _row_words(axes, layer, power, top + 11 if narrow else middle, narrow)
        _half(axes, layer.activations, limits, middle - 1, -_HALF, _ACTIVATIONS)
        _half(axes, layer.gradients, limits, middle + 1, _HALF, _GRADIENTS)
        if power is not None:
            _outline(axes, layer.gradients.scaled(power), limits, middle + 1, _HALF, _GRADIENTS)


def _row_words(axes: Axes, layer: LayerNumbers, power: int | None, y: float, narrow: bool) -> None:
    width = NARROW if narrow else WIDE
    name = shortened(layer.name, _LETTERS[width])
    text_at(axes, 0, y, name, dx=-_NAME_WIDTH[width], weight="bold", size=SMALL, of_axes=True)
    beyond = layer.activations.overflow_share(FP16)
    flushed = layer.gradients.flushed_share(FP16)
    upper = share(beyond) if layer.activations.nonzero else "–"
    lower = share(flushed) if layer.gradients.nonzero else "–"
    if power is not None and layer.gradients.nonzero:
        lower += f" ({share(layer.gradients.scaled(power).flushed_share(FP16))})"
    if narrow:
        text_at(axes, 1, y, f"inf {upper}, zero {lower}", color=MUTED, size=SMALL, align="right", of_axes=True)
        return
    for text, at, bad in ((upper, y - 9, beyond > 0), (lower, y + 10, flushed >= 0.1)):
        weight = "bold" if bad else "normal"
        text_at(axes, 1, at, text, dx=12, color=TEXT if bad else MUTED, size=SMALL, weight=weight, of_axes=True)


def _octaves(axes: Axes, limits: tuple[int, int], narrow: bool) -> None:
    low, high = limits
    step = next(step for step in (4, 8, 16, 32, 64) if (high - low) / step <= (7 if narrow else 14))
    ticks = range(math.ceil(low / step) * step, high + 1, step)
    axes.set_xticks(list(ticks), [power_of_two(tick) if tick else "1" for tick in ticks])


def _windows(axes: Axes, limits: tuple[int, int], height: float) -> None:
    """fp16's ground under all rows, and lines where bf16 ends, if that is in sight."""
    top = _HEAD
    _ground(axes, lowest(FP16), FP16.emin, top, height, strength=0.4)
    _ground(axes, FP16.emin, FP16.emax + 1, top, height, strength=1.0)
    for end in (lowest(BF16), BF16.emin, BF16.emax + 1):
        if limits[0] < end < limits[1]:
            axes.plot([end, end], [top, height], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)


def _ground(axes: Axes, left: float, right: float, top: float, bottom: float, strength: float) -> None:
    corners = ([left, right, right, left], [top, top, bottom, bottom])
    axes.fill(*corners, color=ZONE, alpha=strength, linewidth=0, zorder=0)


def _rulers(axes: Axes, limits: tuple[int, int], layers: Sequence[LayerNumbers], power: int | None) -> None:
    """What each format holds, above the rows, and how far the loss scale moves the gradients."""
    low, high = limits
    for place, format in enumerate((BF16, FP16)):
        top = 4.0 + 24 * place
        parts = ((lowest(format), format.emin, 0.4), (format.emin, format.emax + 1, 1.0))
        for (left, right, strength), name in zip(parts, ("subnormal", f"{format} normal"), strict=True):
            if left < low or right > high:
                name += f", {power_of_two(left)} to {power_of_two(right)}"
            left, right = max(left, low), min(right, high)
            if left >= right:
                continue
            _ground(axes, left, right, top, top + 18, strength)
            if (right - left) / (high - low) > 0.17:
                text_at(axes, (left + right) / 2, top + 9, name, color=MUTED, size=SMALL, align="center")
            elif strength == 1:
                text_at(axes, right, top + 9, str(format), dx=6, color=MUTED, size=SMALL)
    if power is None:
        return
    every = ExponentHistogram.merge(layer.gradients for layer in layers)
    if not every.nonzero:
        return
    counts = every.counts[:-1].numpy()
    start = float(np.searchsorted(np.cumsum(counts) / counts.sum(), 0.5)) - BIAS + 0.5
    end, y = start + power, 4.0 + 24 * 2 + 20
    axes.annotate(
        "",
        (end, y),
        xytext=(start, y),
        arrowprops={"arrowstyle": "->", "color": _GRADIENTS.color, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0},
        annotation_clip=False,
    )
    text = f"loss scale {power_of_two(power)}"
    text_at(axes, (start + end) / 2, y - 10, text, color=_GRADIENTS.color, size=SMALL, align="center")


def _heights(histogram: ExponentHistogram, limits: tuple[int, int]) -> Array | None:
    """Height of each octave's column, from 0 to 1; None without numbers."""
    if not histogram.nonzero:
        return None
    low, high = limits
    counts = histogram.counts[:-1].numpy().astype(np.float64)
    octaves = np.clip(np.arange(len(counts)) - BIAS, low, high - 1) - low
    columns = np.bincount(octaves, weights=counts, minlength=high - low)
    heights: Array = columns / columns.max()
    return heights


def _half(
    axes: Axes, histogram: ExponentHistogram, limits: tuple[int, int], base: float, height: float, look: Look
) -> None:
    heights = _heights(histogram, limits)
    if heights is None:
        return
    x, y = _staircase(heights, limits[0])
    axes.fill(x, base + height * y, color=look.color, alpha=0.75, linewidth=0, zorder=2)
    filled = np.flatnonzero(heights)
    ends = limits[0] + filled[0], limits[0] + filled[-1] + 1
    axes.plot(ends, [base, base], color=look.color, linewidth=1.4, solid_capstyle="butt", zorder=3)


def _outline(
    axes: Axes, histogram: ExponentHistogram, limits: tuple[int, int], base: float, height: float, look: Look
) -> None:
    heights = _heights(histogram, limits)
    if heights is not None:
        x, y = _staircase(heights, limits[0])
        axes.plot(x, base + height * y, color=look.color, linewidth=1.3, solid_joinstyle="miter", zorder=4)


def _staircase(heights: Array, low: int) -> tuple[Array, Array]:
    """The columns' outline from base to base, without the empty octaves at either end."""
    filled = np.flatnonzero(heights)
    first, last = filled[0], filled[-1] + 1
    x = np.repeat(np.arange(first, last + 1), 2) + low
    y = np.concatenate([[0.0], np.repeat(heights[first:last], 2), [0.0]])
    return x, y

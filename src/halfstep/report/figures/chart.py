"""A figure with its words, and the layout that several figures share: named rows, step axes, grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from halfstep.record import RunRecord
from halfstep.report import svg
from halfstep.report.svg import FONT, GRID, MUTED, SURFACE, TEXT, Drawing, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[RunRecord]]
Looks = Mapping[str, Look]

NAME_WIDTH = 130  #: pixels left of the rows for the policy's name, on a wide page


@dataclass(frozen=True)
class Key:
    """One entry of a legend."""

    label: str
    variable: str  #: CSS variable of its colour
    dashes: str | None  #: dash pattern of a line; None for an area


@dataclass(frozen=True)
class Chart:
    """A figure with its words."""

    title: str
    caption: str
    drawing: Drawing | None = None
    legend: tuple[Key, ...] = ()


def line_key(policy: str, look: Look) -> Key:
    """Legend entry of a policy drawn as a line."""
    return Key(policy, look.variable, look.dashes)


def rows(figure: Figure, narrow: bool, height: float, right: float) -> Axes:
    """Axes for one row per policy: y in pixels downwards, names at the left, values along the bottom."""
    axes = svg.panel(figure, left=1 if narrow else NAME_WIDTH, top=4, right=right, height=height)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    return axes


def row_name(axes: Axes, name: str, y: float, narrow: bool) -> None:
    """The policy's name left of its row, or above it on a narrow page."""
    text_at(axes, 0, y, name, dx=0 if narrow else -NAME_WIDTH, weight="bold", of_axes=True)


def text_at(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    dx: float = 0,
    color: str = TEXT,
    size: float = FONT,
    weight: str = "normal",
    align: str = "left",
    of_axes: bool = False,
    backed: bool = False,
) -> None:
    """Text at a data position moved by ``dx`` pixels; with ``of_axes``, x is a fraction of the axes.

    ``backed`` lays the text on the page's ground, so that no grid line crosses it.
    """
    axes.annotate(
        svg.drawable(text),
        (x, y),
        xycoords=("axes fraction" if of_axes else "data", "data"),
        xytext=(dx, 0),
        textcoords="offset points",
        ha=align,
        va="center_baseline",
        color=color,
        fontsize=size,
        fontweight=weight,
        annotation_clip=False,
        bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 1.0} if backed else None,
    )


def grid(axes: Axes, axis: Literal["x", "y"]) -> None:
    """Hairlines across ``axis``, behind everything."""
    axes.grid(axis=axis, color=GRID, linewidth=1)
    axes.set_axisbelow(True)


def step_axis(axes: Axes, last: float, narrow: bool) -> None:
    """Whole step numbers along the bottom, none beyond the last step."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(4 if narrow else 7, integer=True)
    ticks = [tick for tick in locator.tick_values(1, max(last, 2)) if 1 <= tick <= last]
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xlabel("step", color=MUTED, loc="right", labelpad=2)


def power_of_two(exponent: int) -> str:
    """2⁻²⁴."""
    return "2" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def share(value: float) -> str:
    """A share as a percentage with two digits; what is not zero is never shown as zero."""
    if value <= 0:
        return "0 %"
    if value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %" if value < 0.0995 or 0.99 < value < 1 else f"{100 * value:.0f} %"


def shortened(name: str, most: int) -> str:
    """The end of a module path, which tells layers apart, in ``most`` letters."""
    return name if len(name) <= most else "…" + name[1 - most :]

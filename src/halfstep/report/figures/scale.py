"""The loss scale over steps, and the steps it made the optimizer skip."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halfstep.report import series, svg
from halfstep.report.figures.chart import Chart, Looks, Runs, grid, line_key, power_of_two, step_axis, text_at
from halfstep.report.svg import MUTED, NARROW, SMALL, WIDE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 400  #: changes drawn per line
_TICKS = 300  #: skipped steps drawn per policy
_RUG = 20  #: pixels per row of ticks


def loss_scales(runs: Runs, looks: Looks) -> Chart:
    """Loss scale over steps for the runs that used one, skipped steps as ticks below."""
    title = "Loss scale"
    scaled = {
        policy: [record for record in records if any(step.scale is not None for step in record.steps)]
        for policy, records in runs.items()
    }
    scaled = {policy: records for policy, records in scaled.items() if records}
    if not scaled:
        return Chart(title, "No run used loss scaling.")
    skipped = {policy: series.skipped_steps(records) for policy, records in scaled.items()}
    counts = {policy: len(steps) for policy, steps in skipped.items()}
    says = ["One line per run. Ticks below mark the steps whose update a run skipped because gradients overflowed."]
    without = [policy for policy in runs if policy not in scaled]
    if without:
        says.append(f"{', '.join(without)} used no loss scaling.")
    label = "Loss scale over steps: " + ", ".join(f"{p} {n} skipped" for p, n in counts.items())
    drawing = svg.draw(
        "scale",
        label + ".",
        dict.fromkeys((WIDE, NARROW), 232.0 + _RUG * len(scaled)),
        partial(_paint_scales, scaled=scaled, skipped=skipped, looks=looks),
    )
    return Chart(title, " ".join(says), drawing, tuple(line_key(policy, looks[policy]) for policy in scaled))


def _paint_scales(
    figure: Figure, narrow: bool, *, scaled: Runs, skipped: Mapping[str, series.Array], looks: Looks
) -> None:
    from matplotlib.ticker import MaxNLocator

    right = 84
    axes = svg.panel(figure, left=42, top=12, right=right, height=170)
    last = 1.0
    exponents: list[float] = []
    for policy, records in scaled.items():
        look = looks[policy]
        for record in records:
            for optimizer in series.optimizers([record]):
                steps, scales = series.scale_history(record, optimizer)
                usable = np.isfinite(scales) & (scales > 0)
                if not usable.any():
                    continue
                steps, powers = steps[usable], np.log2(scales[usable])
                kept = np.unique(np.linspace(0, len(steps) - 1, _POINTS).round().astype(int))
                axes.plot(
                    steps[kept],
                    powers[kept],
                    drawstyle="steps-post",
                    color=look.color,
                    linewidth=1.6,
                    linestyle=look.linestyle,
                    marker="." if len(kept) == 1 else "",
                    alpha=1.0 if len(records) == 1 else 0.75,
                )
                last = max(last, float(steps[-1]))
                exponents += [float(powers.min()), float(powers.max())]
    low, high = (min(exponents), max(exponents)) if exponents else (0.0, 1.0)
    pad = max(0.5, 0.08 * (high - low))
    low, high = low - pad, high + pad
    axes.set_ylim(low, high)
    last = max(last, *(float(steps[-1]) for steps in skipped.values() if len(steps)), 2.0)
    axes.set_xlim(1 - 0.01 * last, last * 1.01)
    # Of a scale that never changes, the locator offers fractions of an octave.
    ticks = [
        tick for tick in MaxNLocator(5, integer=True).tick_values(low, high) if low <= tick <= high and tick % 1 == 0
    ]
    axes.set_yticks(ticks, [power_of_two(int(tick)) for tick in ticks])
    grid(axes, "y")
    rug = svg.panel(figure, left=42, top=188, right=right, height=_RUG * len(scaled), sharex=axes)
    step_axis(rug, last, narrow)
    axes.tick_params(labelbottom=False)
    rug.set_ylim(_RUG * len(scaled), 0)
    rug.set_yticks([])
    for place, (policy, steps) in enumerate(skipped.items()):
        top = _RUG * place
        shown = series.thinned(np.unique(steps), _TICKS)
        # All ticks of a policy are one path: a line broken by NaN after each.
        x = np.column_stack([shown, shown, np.full(len(shown), math.nan)]).ravel()
        y = np.tile([top + 3.0, top + 17.0, math.nan], len(shown))
        rug.plot(x, y, color=looks[policy].color, linewidth=1.5, solid_capstyle="butt")
        text = f"{len(steps):,} skipped"
        text_at(rug, 1, top + _RUG / 2, text, dx=8, color=MUTED, size=SMALL, of_axes=True)

"""Loss curves, and their difference to the baseline against the yardstick of its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from halfstep.compare.result import Comparison, Interval
from halfstep.report import series, svg
from halfstep.report.figures.chart import Chart, Key, Looks, Runs, grid, line_key, step_axis
from halfstep.report.series import Array, Band, LossCurves
from halfstep.report.svg import MUTED, NARROW, TEXT, WIDE, ZONE, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEFT, _RIGHT = 56, 10  #: pixels
_LOG_FROM = 30.0  #: highest to lowest loss from which the axis is logarithmic


@dataclass(frozen=True)
class _View:
    """What the loss figure shows beyond the curves: its range, the paired differences and what was judged."""

    range: tuple[float, float]
    logarithmic: bool
    cut: bool  #: some values lie beyond the range
    compared: Mapping[str, Band]  #: policy -> difference to the baseline
    difference_range: float  #: the lower panel reaches from minus to plus this
    deviation: Array | None  #: baseline's seed deviation at each point
    judged: Mapping[str, Interval]
    yardstick: float | None  #: baseline's seed deviation of the mean loss of the last steps
    last_steps: int
    confidence: float


def losses(runs: Runs, comparison: Comparison, looks: Looks, optimizer: int, several: bool) -> Chart:
    """Loss per policy with its seed band; beneath, the difference to the baseline, paired by seed."""
    curves = series.loss_curves(runs, optimizer)
    title = f"Training loss, optimizer {optimizer}" if several else "Training loss"
    drawn = [policy for policy in runs if np.isfinite(curves.band(policy).mean).any()]
    if not drawn:
        return Chart(title, "No run reported a loss: nothing was passed to backward before an optimizer step.")
    looks = {policy: looks[policy] for policy in drawn}
    view = _view(curves, comparison, drawn, optimizer)
    several_seeds = max(len(curves.runs[policy]) for policy in drawn) > 1
    says = [
        f"Each point is the mean of {curves.steps_per_point:,} consecutive steps."
        if curves.steps_per_point > 1
        else "Every step is drawn, without smoothing.",
        "Lines are means over seeds, bands reach from the lowest to the highest seed."
        if several_seeds
        else "One seed per policy, so there is no band.",
    ]
    legend = [line_key(policy, looks[policy]) for policy in drawn]
    if view.compared:
        says.append(f"Below: the difference to {comparison.baseline}, taken seed by seed; above zero is worse.")
        if view.deviation is not None:
            legend.append(Key(f"±1 sd over {comparison.baseline} seeds", "--zone", None))
            says.append(f"The zone is one standard deviation over {comparison.baseline}'s seeds at that step.")
        if view.judged:
            says.append(
                f"The bars at the right are what was judged: the mean of the last {view.last_steps:,} steps, "
                f"with its {100 * view.confidence:g} % interval"
                + (", on the same deviation of that mean, the yardstick." if view.yardstick else ".")
            )
    if any(curves.stopped[policy] for policy in drawn):
        says.append("A cross marks where a run broke off or its loss stopped being a number.")
    if view.cut:
        says.append("Values beyond the drawn range are cut off.")
    label = f"{title} over {curves.last_step:,} steps for {', '.join(drawn)}" + (
        f"; below, the difference to {comparison.baseline}." if view.compared else "."
    )
    height = {WIDE: 470.0, NARROW: 430.0} if view.compared else {WIDE: 330.0, NARROW: 280.0}
    drawing = svg.draw(
        f"loss{optimizer}",
        label,
        height,
        partial(_paint_losses, curves=curves, view=view, looks=looks, baseline=comparison.baseline),
    )
    return Chart(title, " ".join(says), drawing, tuple(legend))


def _view(curves: LossCurves, comparison: Comparison, drawn: Sequence[str], optimizer: int) -> _View:
    baseline = comparison.baseline
    bands = {policy: curves.band(policy) for policy in drawn}
    low, high, cut = _range(bands, baseline)
    compared = {}
    for policy in drawn:
        differences = curves.differences(policy, baseline) if policy != baseline else []
        if any(np.isfinite(difference).any() for difference in differences):
            compared[policy] = series.over_seeds(differences)
    deviation = series.seed_deviation(list(curves.runs[baseline].values())) if compared else None
    judged: dict[str, Interval] = {}
    yardstick, last_steps, confidence = None, 0, 0.0
    for result in comparison.policies:
        for quality in result.quality:
            interval = quality.difference
            if quality.optimizer != optimizer or interval is None or result.policy not in compared:
                continue
            if np.isfinite([interval.estimate, interval.low, interval.high]).all():
                judged[result.policy] = interval
                last_steps, confidence = quality.last_steps, interval.confidence
                yardstick = quality.seed_spread
    reach, beyond = _difference_range(curves, compared, deviation, judged, (high - low) or 1.0)
    return _View(
        range=(low, high),
        logarithmic=low > 0 and high > _LOG_FROM * low,
        cut=cut or beyond,
        compared=compared,
        difference_range=reach,
        deviation=deviation,
        judged=judged,
        yardstick=yardstick,
        last_steps=last_steps,
        confidence=confidence,
    )


def _range(bands: Mapping[str, Band], baseline: str) -> tuple[float, float, bool]:
    """Range of the loss axis, and whether it cuts something off.

    The baseline sets it; others may reach beyond by 60 % of its span. Single values far above the bulk, as
    when a run blows up, must not press everything else flat.
    """
    every = np.concatenate([_finite(band) for band in bands.values()])
    base = _finite(bands[baseline]) if baseline in bands else every
    q02, q98 = np.quantile(base, (0.02, 0.98))
    low, high = max(base.min(), q02 - 2 * (q98 - q02)), min(base.max(), q98 + 2 * (q98 - q02))
    span = (high - low) or abs(high) or 1.0
    lowest, highest = max(every.min(), low - 0.6 * span), min(every.max(), high + 0.6 * span)
    return float(lowest), float(highest), bool(every.min() < lowest or every.max() > highest)


def _difference_range(
    curves: LossCurves,
    compared: Mapping[str, Band],
    deviation: Array | None,
    judged: Mapping[str, Interval],
    most: float,
) -> tuple[float, bool]:
    """Reach of the difference axis to both sides of zero, and whether it cuts something off.

    Policies whose runs came to a good end set it, where there are any, and it never exceeds the span of the
    losses.
    """
    if not compared:
        return 1.0, False
    sizes = {policy: np.abs(_finite(band)) for policy, band in compared.items()}
    healthy = [policy for policy in sizes if not curves.stopped[policy]] or list(sizes)
    known = [float(np.quantile(sizes[policy], 0.98)) for policy in healthy]
    known += [max(abs(interval.low), abs(interval.high)) for interval in judged.values()]
    if deviation is not None and np.isfinite(deviation).any():
        known.append(1.5 * float(np.nanmedian(deviation)))
    reach = 1.25 * min(max(known), most) or 1.0
    return reach, any(size.max() > reach for size in sizes.values())


def _finite(band: Band) -> Array:
    values: Array = np.concatenate([band.mean, band.low, band.high])
    finite: Array = values[np.isfinite(values)]
    return finite


def _paint_losses(
    figure: Figure, narrow: bool, *, curves: LossCurves, view: _View, looks: Mapping[str, Look], baseline: str
) -> None:
    upper_height = 210 if narrow else 250
    axes = svg.panel(figure, left=_LEFT, top=26, right=_RIGHT, height=upper_height)
    _panel_title(axes, "loss")
    low, high = view.range
    if view.logarithmic:
        axes.set_yscale("log")
        shown = (low / 1.1, high * 1.1)
    else:
        pad = 0.05 * ((high - low) or abs(high) or 1.0)
        shown = (low - pad, high + pad)
    axes.set_ylim(*shown)
    _number_axis(axes, *shown, logarithmic=view.logarithmic, most=4 if narrow else 5)
    room = 0.03 + 0.022 * len(view.judged) if view.judged else 0.01
    axes.set_xlim(1 - 0.01 * curves.last_step, max(curves.last_step, 2) * (1 + room))
    # Far outside the axes matplotlib's arithmetic overflows; just outside nothing is seen either.
    span = shown[1] - shown[0]
    limits = (shown[0] / 10, shown[1] * 10) if view.logarithmic else (shown[0] - span, shown[1] + span)
    for policy, look in looks.items():
        _line(axes, curves.steps, curves.band(policy), look, limits, banded=len(curves.runs[policy]) > 1)
    for policy, look in looks.items():
        for step, loss in curves.stopped[policy]:
            inside = min(max(loss, shown[0]), shown[1])
            axes.plot([step], [inside], "x", color=look.color, markersize=9, markeredgewidth=2, clip_on=False)
    if not view.compared:
        step_axis(axes, curves.last_step, narrow)
        return
    lower = svg.panel(figure, left=_LEFT, top=26 + upper_height + 40, right=_RIGHT, height=110, sharex=axes)
    step_axis(lower, curves.last_step, narrow)
    axes.tick_params(labelbottom=False)
    _paint_differences(lower, curves, view, looks, baseline)


def _paint_differences(axes: Axes, curves: LossCurves, view: _View, looks: Mapping[str, Look], baseline: str) -> None:
    _panel_title(axes, f"difference to {baseline}")
    reach = view.difference_range
    axes.set_ylim(-reach, reach)
    _number_axis(axes, -reach, reach, logarithmic=False, most=4)
    if view.deviation is not None:
        zone = np.clip(view.deviation, 0, 2 * reach)
        axes.fill_between(curves.steps, -zone, zone, color=ZONE, linewidth=0)
    if view.yardstick is not None:
        first, end = curves.last_step * 1.014, axes.get_xlim()[1]
        axes.fill_between([first, end], -view.yardstick, view.yardstick, color=ZONE, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=1)
    for policy, band in view.compared.items():
        look = looks[policy]
        pairs = len(curves.differences(policy, baseline))
        _line(axes, curves.steps, band, look, (-2 * reach, 2 * reach), banded=pairs > 1)
    for place, (policy, interval) in enumerate(view.judged.items()):
        x = curves.last_step * (1.03 + 0.022 * place)
        color = looks[policy].color
        ends = np.clip([interval.low, interval.high], -reach, reach)
        axes.plot([x, x], ends, color=color, linewidth=2, solid_capstyle="butt", clip_on=False)
        if abs(interval.estimate) <= reach:
            axes.plot([x], [interval.estimate], "o", color=color, markersize=6, clip_on=False)


def _line(axes: Axes, steps: Array, band: Band, look: Look, limits: tuple[float, float], banded: bool) -> None:
    mean, low, high = (np.clip(values, *limits) for values in (band.mean, band.low, band.high))
    if banded:
        axes.fill_between(steps, low, high, color=look.color, alpha=0.18, linewidth=0)
    if len(steps) == 1:
        steps, mean = np.repeat(steps, 2), np.repeat(mean, 2)  # a line needs two points, even of no length
    axes.plot(
        steps,
        mean,
        color=look.color,
        linewidth=1.8,
        linestyle=look.linestyle,
        solid_capstyle="round",
        solid_joinstyle="round",
    )


def _panel_title(axes: Axes, text: str) -> None:
    axes.annotate(
        svg.drawable(text),
        (0, 1),
        xycoords="axes fraction",
        xytext=(-_LEFT, 12),
        textcoords="offset points",
        color=TEXT,
        fontweight="bold",
    )


def _number_axis(axes: Axes, low: float, high: float, *, logarithmic: bool, most: int) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    locator = LogLocator(subs=(1, 3)) if logarithmic else MaxNLocator(most)
    ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
    texts = [f"{tick:.6g}" for tick in ticks]
    if not logarithmic and not any("e" in text for text in texts):
        decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
        texts = [f"{tick:z.{decimals}f}" if tick else "0" for tick in ticks]
    axes.set_yticks(ticks, [text.replace("-", "−") for text in texts])
    grid(axes, "y")

"""One prediction as the cells of a table, the same in the terminal and on the page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halfstep.compare.phrases import number
from halfstep.doctor.prediction import FormatPrediction, Peak
from halfstep.report import findings_wording
from halfstep.report.figures.chart import power_of_two, share

MOST_MODULES = 6
MOST_PEAKS = 3


@dataclass(frozen=True)
class Row:
    """The cells of one format."""

    format: str
    usable: str
    usable_class: str  #: usable, limited, unusable or none
    reason: str
    overflows: str  #: how many
    peaks: tuple[str, ...]  #: the largest of what overflows
    more_peaks: int  #: beyond those in `peaks`
    underflow: str
    scaled: str  #: the same at the loss scale; empty where it makes no difference
    worst: str  #: the layer that loses most
    scale: str
    window: str
    keep_fp32: tuple[str, ...]
    more_modules: int  #: beyond those in `keep_fp32`
    policy: str | None


def row(prediction: FormatPrediction) -> Row:
    """The words of one prediction."""
    usable, kind = ("yes", "usable") if prediction.usable else ("no", "unusable")
    if not prediction.ops:
        usable, kind = "no effect", "none"
    elif prediction.usable and (prediction.keep_fp32 or prediction.window_is_empty):
        usable, kind = "in part", "limited"
    peaks = sorted(prediction.overflows, key=lambda peak: -peak.ratio)
    worst = max(prediction.layers, key=lambda layer: layer.unscaled * layer.elements, default=None)
    differs = prediction.flushed > 0 and prediction.loss_scale != 1
    return Row(
        format=prediction.format,
        usable=usable,
        usable_class=kind,
        reason=prediction.reason,
        overflows=f"{len(peaks):,}",
        peaks=tuple(map(_peak, peaks[:MOST_PEAKS])),
        more_peaks=max(0, len(peaks) - MOST_PEAKS),
        underflow=share(prediction.flushed),
        scaled=share(prediction.flushed_scaled) if differs else "",
        worst=f"{worst.layer or 'the loss'} {share(worst.unscaled)}" if worst and worst.unscaled > 0 else "",
        scale=_scale(prediction.loss_scale) if prediction.window is not None else "–",
        window=_window(prediction),
        keep_fp32=prediction.keep_fp32[:MOST_MODULES],
        more_modules=max(0, len(prediction.keep_fp32) - MOST_MODULES),
        policy=prediction.policy if prediction.usable and prediction.ops else None,
    )


def power(prediction: FormatPrediction) -> int | None:
    """The predicted loss scale as a power of two; None where the format needs none."""
    scale = prediction.loss_scale
    return round(math.log2(scale)) if prediction.window is not None and 0 < scale < math.inf else None


def _peak(peak: Peak) -> str:
    where, amax = findings_wording.where(peak.place), findings_wording.quantity(peak.amax)
    return f"{where}: {amax}, {number(peak.ratio)} × the largest number"


def _window(prediction: FormatPrediction) -> str:
    if prediction.window is None:
        return "not needed"
    return "none is safe" if prediction.window_is_empty else " to ".join(map(_scale, prediction.window))


def _scale(value: float) -> str:
    mantissa, exponent = math.frexp(value)
    return power_of_two(exponent - 1) if mantissa == 0.5 else number(value, 4)

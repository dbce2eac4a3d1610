"""Numbers as a sentence quotes them: only as many digits as their uncertainty leaves meaningful."""

from __future__ import annotations

import math
from collections.abc import Sequence

from halfstep.compare.result import Interval


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, trailing zeros kept: 1.60, 0.0210, 12.3, NaN."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinity" if value > 0 else "-infinity"
    if value == 0:
        return "0"
    # The exponent after rounding: 9.996 to three digits is 10.0, not 10.00.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if not -5 <= exponent < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def duration(seconds: float) -> str:
    """12.3 ms, 1.23 s."""
    return f"{number(seconds * 1e3)} ms" if seconds < 1 else f"{number(seconds)} s"


def percent(confidence: float) -> str:
    """95 %."""
    return f"{100 * confidence:g} %"


def ratio(interval: Interval) -> tuple[str, str]:
    """A ratio's estimate and its interval in words: ``("1.62", "95 % interval 1.55 to 1.70")``.

    Three significant digits of the estimate, one more decimal where the interval is so narrow that its ends
    would read the same.
    """
    half = (interval.high - interval.low) / 2
    decimals = 2 - _exponent(interval.estimate)
    if half > 0:
        decimals = max(decimals, -_exponent(half))
    decimals = min(max(decimals, 0), 3)
    low, high = f"{interval.low:.{decimals}f}", f"{interval.high:.{decimals}f}"
    return f"{interval.estimate:.{decimals}f}", f"{percent(interval.confidence)} interval {low} to {high}"


def inverse(interval: Interval) -> Interval:
    """The ratio read the other way round: 0.80 × as fast is 1.25 × slower."""
    return Interval(1 / interval.estimate, 1 / interval.high, 1 / interval.low, interval.confidence)


def difference(interval: Interval) -> tuple[str, str]:
    """A difference and its interval in words, signed: ``("+0.003", "90 % interval -0.004 to +0.010")``.

    Two significant digits of the interval's half-width decide the decimals of all three.
    """
    half = (interval.high - interval.low) / 2
    scale = half or abs(interval.estimate)
    if scale == 0:
        return "0", f"{percent(interval.confidence)} interval 0 to 0"
    decimals = 1 - _exponent(scale)
    form = f"+z.{max(decimals, 0)}f" if decimals <= 8 else "+.1e"  # z: no minus sign before a rounded zero
    low, high = format(interval.low, form), format(interval.high, form)
    return format(interval.estimate, form), f"{percent(interval.confidence)} interval {low} to {high}"


def count(n: int, noun: str) -> str:
    """1 seed, 3 seeds."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def runs(n: int, total: int) -> str:
    """Which runs something befell, to follow a verb: `` in 2 of its 3 runs``; nothing for the only run."""
    if total == 1:
        return ""
    return f" in all {total} runs" if n == total else f" in {n} of its {total} runs"


def cited(errors: Sequence[str]) -> str:
    """The first of some error messages in brackets, shortened to one line; nothing if there is none."""
    if not errors:
        return ""
    first = " ".join(errors[0].split())
    more = f"; and {count(len(errors) - 1, 'other error')}" if len(errors) > 1 else ""
    return f" ({first if len(first) <= 160 else first[:159] + '…'}{more})"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))

"""How numbers and outcomes are put into words, the same in the terminal and on the page.

A number is shown with as many digits as its uncertainty leaves meaningful: the half-width of an interval
keeps two significant digits and decides the decimals of the estimate too.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from halfstep.compare.phrases import count, number
from halfstep.compare.result import Comparison, Interval, Outcome, PolicyResult, Quality, Speed

__all__ = [  # count and number are the comparison's own
    "count",
    "difference",
    "errors",
    "memories",
    "milliseconds",
    "notices",
    "number",
    "outcome",
    "quality_verdict",
    "quartiles",
    "ratio",
    "size",
    "speed_up",
    "unsaid",
    "weighted",
]

_STATES_IN_ORDER: tuple[Outcome, ...] = ("finished", "interrupted", "running", "diverged", "crashed")


def milliseconds(seconds: float) -> str:
    """Four significant digits in ms, without the unit."""
    return number(seconds * 1e3, 4)


def quartiles(speed: Speed) -> str:
    """Lower to upper quartile of the step time in ms."""
    low, high = speed.quartiles_seconds
    return _range(1e3 * low, 1e3 * high, 3)


def size(bytes_: float) -> str:
    """Bytes in binary units, three significant digits from KiB on: 512 B, 1.50 KiB, 412 MiB."""
    if abs(bytes_) < 1024:
        return f"{bytes_:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        bytes_ /= 1024
        if abs(bytes_) < 999.5 or unit == "TiB":
            break
    return f"{number(bytes_, 3)} {unit}"


def ratio(value: float) -> str:
    """1.80×, 0.76×, 12.3×, 0.025×."""
    return f"{number(value, _ratio_digits(value))}×"


def speed_up(interval: Interval) -> tuple[str, str]:
    """The estimate, and the interval's ends: ``("1.80×", "1.76–1.84")``."""
    return ratio(interval.estimate), _range(interval.low, interval.high, _ratio_digits(interval.estimate))


def _ratio_digits(value: float) -> int:
    return 2 if 0 < value < 0.995 else 3


def _range(low: float, high: float, digits: int) -> str:
    """Both ends with ``digits`` digits, or up to two more where they would read the same."""
    for more in range(3):
        ends = number(low, digits + more), number(high, digits + more)
        if ends[0] != ends[1]:
            break
    return "–".join(ends)


def difference(interval: Interval) -> tuple[str, str]:
    """The signed estimate, and the interval's ends, all with the decimals that the half-width calls for."""
    half_width = (interval.high - interval.low) / 2
    known = math.isfinite(half_width) and half_width > 0
    if not known or not -8 <= math.floor(math.log10(half_width)) <= 3:
        estimate, low, high = (number(v, 3) for v in (interval.estimate, interval.low, interval.high))
        return (estimate if interval.estimate <= 0 else f"+{estimate}"), f"{low} to {high}"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return (
        f"{interval.estimate:+z.{decimals}f}",
        f"{interval.low:+z.{decimals}f} to {interval.high:+z.{decimals}f}",
    )


def outcome(result: PolicyResult) -> str:
    """The outcomes of all seeds: ``3 finished``, ``2 finished, 1 crashed``; a single run without a count."""
    counts = Counter(result.outcomes)
    if not counts:
        return "no runs"
    if sum(counts.values()) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{counts[state]} {state}" for state in _STATES_IN_ORDER if counts[state])


def quality_verdict(quality: Quality, is_baseline: bool) -> str:
    """The verdict as a word; the baseline is what the others are judged against."""
    return quality.verdict or ("baseline" if is_baseline else "not judged")


def notices(comparison: Comparison) -> list[tuple[str, tuple[str, ...]]]:
    """Each distinct notice once, with the policies it was given for; in the order of first appearance."""
    policies: dict[str, list[str]] = {}
    for result in comparison.policies:
        for notice in result.notices:
            policies.setdefault(notice, []).append(result.policy)
    return [(notice, tuple(names)) for notice, names in policies.items()]


def errors(comparison: Comparison) -> list[tuple[str, str]]:
    """(policy, message) for every distinct error."""
    return [(result.policy, error) for result in comparison.policies for error in result.errors]


def memories(comparison: Comparison) -> str | None:
    """Whose memory the table has, and what the accelerator's allocator and the host held; None on a CPU alone."""
    on = sorted({result.memory_device for result in comparison.policies if result.memory_device})
    parts = []
    if on and on != ["cpu"]:
        parts.append(f"tensors at the peak of a step, in the memory of {' and '.join(on)}")
    for what, field in (
        ("the allocator's own peak in the run", "allocator_bytes"),
        ("in the host's memory", "host_bytes"),
    ):
        sizes = [f"{r.policy} {size(count)}" for r in comparison.policies if (count := getattr(r, field)) is not None]
        parts += [f"{what}: {', '.join(sizes)}"] if sizes else []
    return "; ".join(parts) or None


def unsaid(result: PolicyResult, comparison: Comparison) -> list[tuple[str, str]]:
    """(what, why) of the judgements whose reason the verdict does not give already."""
    why = [("speed", result.speed.reason)] if result.speed else []
    for quality in result.quality:
        several = len(result.quality) > 1
        why.append((f"quality, optimizer {quality.optimizer}" if several else "quality", quality.reason))
    is_baseline = result.policy == comparison.baseline
    return [(what, text) for what, text in why if text and not is_baseline and text not in comparison.verdict]


def weighted(comparison: Comparison) -> list[list[tuple[str, bool]]]:
    """The verdict's sentences, each in parts that are (text, whether it belongs to the conclusion).

    What stands in brackets or after a colon is the evidence; the page sets it lighter, so that the
    conclusions of a long verdict can be read at a glance. A new sentence is taken to start only at a policy's
    name, because error messages hold full stops too. Joined with a space, the sentences are the verdict, word
    for word.
    """
    names = "|".join(re.escape(result.policy) for result in comparison.policies)
    sentences = re.split(rf"(?<=\.) (?=(?:{names})\b)", comparison.verdict) if names else [comparison.verdict]
    return [_parts(sentence) for sentence in sentences]


def _parts(sentence: str) -> list[tuple[str, bool]]:
    parts: list[tuple[str, bool]] = []
    depth, explained = 0, False
    for position, character in enumerate(sentence):
        depth += character == "("
        is_main = depth == 0 and not explained
        # A full stop or comma goes with what stands before it.
        if parts and (parts[-1][1] == is_main or (character in ".,;" and not parts[-1][1])):
            parts[-1] = (parts[-1][0] + character, parts[-1][1])
        else:
            parts.append((character, is_main))
        depth -= int(character == ")" and depth > 0)
        explained |= depth == 0 and sentence.startswith(": ", position)
    return parts

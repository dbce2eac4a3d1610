"""How findings and predictions are put into words, the same in the terminal and on the page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath

from halfstep.compare.phrases import count, number
from halfstep.doctor.finding import Finding, Severity, Trial
from halfstep.observe.place import Place

__all__ = ["counts", "file_line", "numbers", "ordered_trials", "quantity", "seen", "summary", "where"]


def summary(findings: Sequence[Finding], policy: str, looked_at: Sequence[str] = ()) -> list[tuple[str, bool]]:
    """The conclusion in parts that are (text, whether it is the main thing), to be joined as they are.

    Args:
        findings: worst first.
        policy: what was examined.
        looked_at: what the doctor had in hand, named where nothing was found.
    """
    if not findings:
        seen = f" Looked at: {', '.join(looked_at)}." if looked_at else ""
        if not looked_at:
            return [("Nothing was examined.", True), (" The notes say why.", False)]
        return [(f"Nothing found under {policy}.", True), (seen, False)]
    parts = [(f"{counts(findings)} under {policy}.", True)]
    worst = findings[0]
    if worst.severity == Severity.NOTE:
        return [*parts, (" Nothing that would harm the training.", False)]
    at = f" at {where(worst.place)}" if worst.place is not None else ""
    at += f", {line}" if worst.place is not None and (line := file_line(worst.place)) else ""
    parts.append((f" Worst: {worst.code}, {worst.title}{at}.", False))
    serious = [finding for finding in findings if finding.severity > Severity.NOTE]
    helped = sum(any(trial.outcome == "verified" for trial in finding.trials) for finding in serious)
    if helped:
        whose = "it" if len(serious) == 1 else f"{helped} of {len(serious)}"
        parts.append((f" A remedy was verified for {whose}.", False))
    return parts


def counts(findings: Iterable[Finding]) -> str:
    """2 errors, 1 warning, 3 notes."""
    by_severity = Counter(finding.severity for finding in findings)
    return ", ".join(count(by_severity[s], str(s)) for s in sorted(Severity, reverse=True) if by_severity[s])


def where(place: Place) -> str:
    """``mm in blocks.3.mlp.wo (Linear), backward``: all but the line of code."""
    return str(Place(place.op, place.phase, place.module, place.module_type, parameter=place.parameter))


def file_line(place: Place, whole: bool = False) -> str:
    """``train.py:41``, with its whole path if asked for; empty if unknown."""
    if place.file is None:
        return ""
    path = PureWindowsPath(place.file) if "\\" in place.file else PurePosixPath(place.file)
    return f"{place.file if whole else path.name}:{place.line}"


def seen(finding: Finding) -> str:
    """``12 times, first in step 3``; empty where there is nothing to say."""
    times = f"{finding.count:,} times" if finding.count > 1 else ""
    first = "" if finding.step is None else f"first in step {finding.step:,}" if times else f"in step {finding.step:,}"
    return ", ".join(filter(None, (times, first)))


def numbers(values: Mapping[str, float | int | str]) -> list[tuple[str, str, bool]]:
    """(name, value, whether it is a number) of what a detector measured."""
    return [(name.replace("_", " "), quantity(value), not isinstance(value, str)) for name, value in values.items()]


def quantity(value: float | int | str) -> str:
    """A number with four digits at least, its thousands apart and no idle zeros; words as they are."""
    if isinstance(value, bool | str):
        return str(value)
    try:
        text = number(float(value), 4)
    except OverflowError:  # an int that no float holds
        return f"about 10^{len(str(abs(int(value)))) - 1}"
    if (isinstance(value, int) and abs(value) < 10**15) or re.fullmatch(r"-?\d+", text):
        return f"{int(value if isinstance(value, int) else text):,}"
    # A limit has no uncertainty that its last digits would tell of: 0.1000 says no more than 0.1.
    mantissa, e, exponent = text.partition("e")
    return (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + e + exponent


def ordered_trials(trials: Iterable[Trial]) -> list[Trial]:
    """What helped first."""
    return sorted(trials, key=lambda trial: trial.outcome != "verified")

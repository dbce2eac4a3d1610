"""Findings and predictions in a terminal: worst first, within 80 columns, plain when piped.

Only text styles are used, no markup: module names and paths cannot change the looks. What is there to be copied (a
policy, a diff) is printed on lines of its own that are never wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfstep.compare.phrases import count
from halfstep.doctor.finding import Finding, Severity, Trial, ordered
from halfstep.doctor.prediction import FormatPrediction
from halfstep.report import findings_wording as words
from halfstep.report import predictions as rows
from halfstep.report.terminal import harmless

_WIDTH = 96  #: columns beyond which running text is hard to read
_INDENT, _LABEL = 2, 5
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "cyan"}
_OUTCOMES = {"verified": "bold green", "tried, did not help": "dim"}
_USABLE = {"usable": "green", "limited": "yellow", "unusable": "red", "none": "dim"}


def print_findings(
    console: Console, findings: Sequence[Finding], *, policy: str, looked_at: Sequence[str] = (), most_per_code: int = 3
) -> None:
    """The conclusion, then every finding, worst first.

    Args:
        policy: what was examined.
        looked_at: what the doctor had in hand, named where nothing was found.
        most_per_code: findings of one code and severity that are printed in full; the others are counted. A finding
            with a tried remedy always is.
    """
    width = min(console.width, _WIDTH)
    worst_first = ordered(findings)
    style = "bold" if not worst_first else _STYLES[worst_first[0].severity]
    parts = words.summary(worst_first, policy, looked_at)
    summary = Text.assemble(*((harmless(text), style if is_main else "") for text, is_main in parts))
    console.print(summary, width=width, overflow="fold")
    printed: dict[tuple[str, Severity], int] = {}
    for finding in worst_first:
        kind = finding.code, finding.severity
        if finding.trials or printed.get(kind, 0) < most_per_code:
            printed[kind] = printed.get(kind, 0) + 1
            console.print()
            _print_finding(console, finding, width)
    left = len(worst_first) - sum(printed.values())
    if left:
        console.print()
        hint = f"{count(left, 'more finding')} of these codes; --json lists all, and so does the report."
        console.print(Text(hint, style="dim"), width=width)


def print_predictions(console: Console, predictions: Sequence[FormatPrediction]) -> None:
    """The table, then for each format why, what overflows most, and the policy to use it with."""
    width = min(console.width, _WIDTH)
    console.print(prediction_table(predictions))
    for row in map(rows.row, predictions):
        console.print()
        why = Text.assemble((f"{row.format}: ", "bold"), harmless(row.reason))
        console.print(why, width=width, overflow="fold")
        if row.keep_fp32:
            more = f" and {row.more_modules} more" if row.more_modules else ""
            _print_row(console, "FP32", Text(harmless(", ".join(row.keep_fp32)) + more), width)
        if row.peaks:
            others = f"; {count(int(row.overflows) - 1, 'more op')}" if row.overflows != "1" else ""
            _print_row(console, "inf", Text(harmless(row.peaks[0]) + others), width)
        if row.worst:
            _print_row(console, "zero", Text(f"most gradients in {harmless(row.worst)}"), width)
        if row.policy:
            _print_copyable(console, row.policy)


def prediction_table(predictions: Sequence[FormatPrediction]) -> Table:
    """Per format: whether it is usable, what overflows and underflows, and the loss scale with its safe window."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("format", overflow="fold")
    table.add_column("usable", no_wrap=True)
    for heading in ("overflows\nops", "gradients to\nzero, at least", "with\nloss scale", "loss scale\nsafe window"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in map(rows.row, predictions):
        table.add_row(
            Text(harmless(row.format), style="bold"),
            Text(row.usable, style=_USABLE[row.usable_class]),
            Text(row.overflows),
            Text(row.underflow),
            Text(row.scaled or "–"),
            Text.assemble(row.scale, ("\n" + row.window, "dim")),
        )
    return table


def _print_finding(console: Console, finding: Finding, width: int) -> None:
    head = Text.assemble((f"{finding.code} {finding.severity}", _STYLES[finding.severity]), f"  {finding.title}")
    console.print(head, width=width, overflow="fold")
    if finding.place is not None:
        _print_row(console, "at", Text(harmless(words.where(finding.place))), width)
        if at := words.file_line(finding.place, whole=True):
            _print_row(console, "", Text(harmless(at), style="bold"), width)
    times = words.seen(finding)
    what = Text.assemble(harmless(finding.what), *([(f" ({times})", "dim")] if times else []))
    _print_row(console, "what", what, width)
    _print_row(console, "so", Text(harmless(finding.consequence)), width)
    _print_row(console, "do", Text(harmless(finding.remedy)), width)
    for trial in words.ordered_trials(finding.trials):
        _print_trial(console, trial, width)


def _print_row(console: Console, label: str, text: Text, width: int) -> None:
    """A label in its own narrow column, and running text that wraps beside it."""
    for line in text.wrap(console, max(width - _LABEL - _INDENT, 10), overflow="fold"):
        line.rstrip()
        console.print(Text.assemble(" " * _INDENT, (label.ljust(_LABEL), "dim"), line), overflow="fold")
        label = ""


def _print_trial(console: Console, trial: Trial, width: int) -> None:
    text = Text.assemble((f"{trial.outcome}: ", _OUTCOMES[trial.outcome]), harmless(trial.remedy))
    if trial.evidence:
        text.append(f"; {harmless(trial.evidence)}", style="dim")
    _print_row(console, "try", text, width)
    for copied in filter(None, (trial.policy, trial.diff)):
        _print_copyable(console, copied)


def _print_copyable(console: Console, text: str) -> None:
    """Lines as they are: the terminal may wrap them, but a copy of them holds no break of ours."""
    for line in text.rstrip("\n").split("\n"):
        console.print(Text(" " * (_INDENT + _LABEL) + harmless(line)), soft_wrap=True)

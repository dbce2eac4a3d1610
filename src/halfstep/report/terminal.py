"""The comparison in a terminal: a table that fits into 80 columns, then notices, then the verdict.

Every cell has its estimate above and its uncertainty below. Only text styles are used, no markup: words from
records cannot change the looks, and rich leaves colours out when the output is piped or ``NO_COLOR`` is set.
"""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.table import Table
from rich.text import Text

from halfstep.compare.result import Comparison, PolicyResult, Quality
from halfstep.report import wording

_WIDTH = 96  #: columns beyond which running text is hard to read
_VERDICT_STYLES = {
    "same": "green",
    "better": "green",
    "worse": "red",
    "diverged": "red",
    "cannot tell": "yellow",
}


def comparison_table(comparison: Comparison, width: int = 80) -> Table:
    """Policy, step time, speed-up, peak memory, final loss, difference, verdict on quality, skipped steps.

    Columns stand closer together where ``width`` would not hold them otherwise.
    """
    roomy = _table(comparison, gap=2)
    fits = Console(width=10 * width).measure(roomy).maximum <= width
    return roomy if fits else _table(comparison, gap=1)


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The table, what went wrong or should be known, and at the end, where the eye is, the verdict."""
    width = min(console.width, _WIDTH)
    console.print(comparison_table(comparison, console.width))
    console.print()
    remarks = [(f"{policy} failed", error, "red") for policy, error in wording.errors(comparison)]
    remarks += [("warning", warning, "yellow") for warning in comparison.warnings]
    remarks += [(", ".join(policies), notice, "cyan") for notice, policies in wording.notices(comparison)]
    remarks += [("memory", memories, "cyan")] if (memories := wording.memories(comparison)) else []
    for result in comparison.policies:
        remarks += [(f"{result.policy}, {what}", why, "cyan") for what, why in wording.unsaid(result, comparison)]
    for who, what, style in remarks:
        remark = Text.assemble((f"{who}: ", style), harmless(what))
        console.print(remark, width=width, overflow="fold")
    if remarks:
        console.print()
    for place, sentence in enumerate(wording.weighted(comparison)):
        if place:
            console.print()
        style = "bold yellow" if comparison.findings else "bold"
        text = Text.assemble(*((harmless(part), style if is_main else "") for part, is_main in sentence))
        console.print(text, width=width, overflow="fold")


def _table(comparison: Comparison, gap: int) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    # Where it is too narrow, long names and words give way; numbers stay whole.
    longest = max((len(result.policy) for result in comparison.policies), default=0)
    table.add_column("policy", overflow="fold", min_width=min(longest, 13))
    for heading in ("ms/step", "speed-up", "memory", "loss", "difference"):
        table.add_column(heading, justify="right", overflow="fold", no_wrap=True)
    table.add_column("quality", overflow="fold", min_width=8)
    table.add_column("skips", justify="right", overflow="fold", no_wrap=True)
    for result in comparison.policies:
        _add_policy(table, result, result.policy == comparison.baseline)
    return table


def _add_policy(table: Table, result: PolicyResult, is_baseline: bool) -> None:
    speed, several = result.speed, len(result.quality) > 1
    quick = speed.speed_up if speed else None
    ratio = None if is_baseline else result.memory_ratio
    failed = {"crashed", "diverged"} & set(result.outcomes)
    cells = [
        _cell(result.policy, wording.outcome(result).replace(", ", ",\n"), "bold", "red" if failed else "dim"),
        _cell(wording.milliseconds(speed.median_seconds), wording.quartiles(speed)) if speed else _cell("–"),
        _cell(*wording.speed_up(quick)) if quick else _cell("baseline" if is_baseline else "–"),
        _cell(
            "–" if result.peak_bytes is None else wording.size(result.peak_bytes),
            wording.ratio(ratio) if ratio else "",
        ),
        *(_quality_cells(result.quality[0], is_baseline) if len(result.quality) == 1 else _no_quality(several)),
        _cell(f"{result.skipped_steps:,}"),
    ]
    table.add_row(*cells)
    for quality in result.quality if several else ():
        label = Text(f"  optimizer {quality.optimizer}", style="dim")
        table.add_row(label, "", "", "", *_quality_cells(quality, is_baseline), "")


def _quality_cells(quality: Quality, is_baseline: bool) -> tuple[Text, Text, Text]:
    word = wording.quality_verdict(quality, is_baseline)
    return (
        _cell(wording.number(quality.final_loss, 4)),
        _difference(quality, is_baseline),
        Text(word.replace(" ", "\n"), style=_VERDICT_STYLES.get(word, "dim")),
    )


def _difference(quality: Quality, is_baseline: bool) -> Text:
    if quality.difference is None:
        return _cell("" if is_baseline else "–")
    estimate, interval = wording.difference(quality.difference)
    return _cell(estimate, interval.replace(" to ", " to\n"))


def _no_quality(several: bool) -> tuple[Text, Text, Text]:
    return (Text(),) * 3 if several else (_cell("–"), _cell("–"), _cell("–"))


def harmless(text: str) -> str:
    """``text`` without the control characters that command a terminal (C1's one-byte codes too), as valid Unicode.

    Names, paths and error messages may carry terminal codes, or bytes that are no text.
    """
    kept = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return kept.encode("utf-8", errors="replace").decode()


def _cell(above: str, below: str = "", style: str = "", style_below: str = "dim") -> Text:
    return Text.assemble((above, style), *([("\n" + below, style_below)] if below else []))

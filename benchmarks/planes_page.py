"""Writes the measured block of ``docs/parameters.md`` from the result of `planes`.

python benchmarks/planes_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parameters.md"
RESULT = ROOT / "benchmarks" / "results" / "planes.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def block(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    environment, workloads = result["environment"], result["workloads"]
    ways = list(next(iter(workloads.values())))
    lines = [
        "Speed of a whole training step relative to `torch.autocast` with FP32 parameters and PyTorch's fused AdamW, "
        f"above 1 is faster: median and quartiles of {environment['rounds']} rounds in turn. "
        f"{environment['threads']} threads, {environment['bf16']}, PyTorch {environment['torch']}. The second row "
        "is the first again, so it shows the noise.",
        "",
        f"| | {' | '.join(workloads)} |",
        f"|---|{'---|' * len(workloads)}",
    ]
    for way in ways:
        cells = []
        for rows in workloads.values():
            low, high = rows[way]["quartiles"]
            cells.append(f"**{rows[way]['speed']:.2f}** ({low:.2f}–{high:.2f})")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += ["", "Most bytes that are alive at once in such a step, MiB:", ""]
    lines += [f"| | {' | '.join(workloads)} |", f"|---|{'---|' * len(workloads)}"]
    for way in ways:
        cells = [f"{rows[way]['peak_bytes'] / 2**20:,.0f}" for rows in workloads.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render(page: str, result: dict[str, Any]) -> str:
    """The page with its block written anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block(result)}\n{END}{after}"


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()

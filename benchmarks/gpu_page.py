"""Writes the measured block of ``docs/gpu.md`` from the documents of `gpu_once` under ``benchmarks/results/``.

python benchmarks/gpu_page.py

A document is ``gpu-main.json`` (or ``gpu-smoke.json``, for tests and waits) of a run's folder, copied to
``benchmarks/results/gpu-<card>.json``. Sections that were only tried, and runs on a CPU, show nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = """\
**Nothing of halfstep has been measured on a GPU yet.** Its CUDA code was written and tested without one: Triton's
kernels are compiled for every storage and run in Triton's interpreter, CUDA's casting rules are compared with PyTorch's
lists, and what a step asks of the device is counted on fake tensors."""

Document = Mapping[str, Any]
Table = list[str]


def block(documents: Sequence[Document]) -> str:
    """All that was measured, as Markdown."""
    found = [text for document in documents if (text := _card(document))]
    return "\n\n".join(found) if found else NOTHING


def render(page: str, documents: Sequence[Document]) -> str:
    """The page with its block written anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block(documents)}\n{END}{after}"


def load(folder: Path = RESULTS) -> list[Document]:
    """The documents in a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]


def _card(document: Document) -> str:
    """One run: what it was measured on, then a table a subject; empty if it measured nothing."""
    if document["run"].get("device") != "cuda":
        return ""
    sections = document["sections"]
    tried = {name for name, section in sections.items() if section["tiny"]}
    measured = {name: rows for name, rows in document["measured"].items() if name not in tried}
    tables = [
        _tests(measured.get("numerics", {})),
        _training("A GPT of 124 million parameters", measured.get("training", {})),
        _training("The same under `torch.compile`", measured.get("training_compiled", {})),
        _training("A GPT of a billion parameters", measured.get("training_large", {})),
        _optimizers(measured.get("optimizers", {})),
        _seven_billion(measured.get("seven_billion", {})),
        _gemm(measured.get("gemm", {})),
        _float8(measured.get("float8", {})),
        _comparison(measured.get("comparison", {})),
        _waits(measured.get("waits", {})),
    ]
    if not any(tables):
        return ""
    environment = document["environment"]
    head = (
        f"{environment.get('device', 'unknown card')}, PyTorch {environment.get('torch')}, "
        f"CUDA {environment.get('cuda')}, halfstep {environment.get('halfstep')}, {document['run']['started'][:10]}."
    )
    wrong = [check["name"] for check in document["checks"] if not check["ok"]]
    cut = [f"{name} ({section['status']})" for name, section in sections.items() if section["status"] != "ok"]
    lines = [f"### {environment.get('device', 'unknown card')}", "", head]
    lines += ["", f"Checks that failed: {'; '.join(wrong)}."] if wrong else []
    lines += ["", f"Sections that did not end: {', '.join(cut)}."] if cut else []
    for table in tables:
        lines += ["", *table] if table else []
    return "\n".join(lines)


def _tests(rows: Mapping[str, Any]) -> Table:
    if not rows:
        return []
    told = rows["tests"]
    counts = [f"{told[name]} {name}" for name in ("passed", "failed", "skipped") if told.get(name)]
    return [f"Tests marked `gpu`: {', '.join(counts)}."]


def _training(title: str, rows: Mapping[str, Any]) -> Table:
    """Median and quartiles; the share of products in their format's peak; launches and waits of one step."""
    if not rows:
        return []
    first = next(iter(rows.values()))
    baseline = next((row["ms"] for name, row in rows.items() if name == "torch bf16 autocast"), None)
    lines = [
        f"**{title}**, {first['rows']} rows of {first['context']} tokens; fused AdamW of PyTorch where no other is "
        "named, gradients clipped. MFU is of the peak of the products' own format.",
        "",
        "| way | ms per step (quartiles) | against autocast | tokens/s | MFU | peak GiB | launches | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "tokens_per_s" not in row or name.startswith("largest batch"):
            continue
        ratio = "" if not baseline else f"{row['ms'] / baseline:.2f}"
        cells = [
            _time(row),
            ratio,
            f"{row['tokens_per_s']:,}",
            _percent(row.get("mfu")),
            _number(row.get("peak_gib"), 1),
        ]
        lines.append(_row(name, *cells, _number(row.get("step_launches")), _number(row.get("sync_warnings"))))
    for name, row in rows.items():
        if name.startswith("largest batch"):
            fits = f"{row['tokens_per_s']:,} tokens/s, {row['peak_gib']:.1f} GiB" if row["fits"] else "does not fit"
            lines += ["", f"{name[0].upper()}{name[1:]}: {fits}."]
    return lines


def _optimizers(rows: Mapping[str, Any]) -> Table:
    if "copy" not in rows:
        return []
    measured = {name: row for name, row in rows.items() if "bytes_moved" in row}
    count = next((row["parameters"] for row in measured.values()), 0)
    lines = [
        f"**A step of an optimizer**, {count / 1e9:.2f} billion parameters; a copy moves "
        f"{rows['copy']['gb_per_s']:,.0f} GB/s. Bytes are for each parameter: moved in a step, and held, weights and "
        "gradients among them.",
        "",
        "| optimizer | ms (quartiles) | against torch fused | GB/s | of a copy | moved | held | launches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in measured.items():
        rate = [f"{row['gb_per_s']:,.0f}", _percent(row["of_copy"])]
        cells = [_time(row), _number(row["against_torch_fused"], 2), *rate]
        cells += [_number(row["bytes_moved"], 1), _number(row["bytes_held"], 1), _number(row.get("step_launches"))]
        lines.append(_row(name, *cells))
    return lines


def _seven_billion(rows: Mapping[str, Any]) -> Table:
    if not rows:
        return []
    first = next(iter(rows.values()))
    lines = [
        f"**A step of full fine-tuning of a 7B model** under a limit of {first['limit_gib']:.1f} GiB, that of a card "
        f"of 80 GB: {first['rows']} rows of {first['context']} tokens with activation checkpointing, AdamW.",
        "",
        "| way | fits | peak GiB | tokens/s |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        rate = f"{row['tokens_per_s']:,}" if row["fits"] else ""
        lines.append(_row(name, "yes" if row["fits"] else "no", _number(row.get("peak_gib"), 1), rate))
    return lines


def _gemm(rows: Mapping[str, Any]) -> Table:
    if not rows:
        return []
    sizes = sorted({int(name.split()[1]) for name in rows}, reverse=True)
    forms = list(dict.fromkeys(name.split()[0] for name in rows))
    lines = ["**Matrix products**, TFLOP/s, and of the datasheet.", ""]
    lines += [_row("size", *forms), "|---|" + "---|" * len(forms)]
    for size in sizes:
        found = [rows.get(f"{form} {size}") for form in forms]
        cells = ["" if row is None else f"{row['tflops']:.0f} {_percent(row['of_datasheet'], '({})')}" for row in found]
        lines.append(_row(f"{size}³", *cells))
    return lines


def _float8(rows: Mapping[str, Any]) -> Table:
    if not rows:
        return []
    lines = [
        "**Two linear layers in float8**, forward and backward, compiled, beside bf16.",
        "",
        "| layers | ms (quartiles) | speed-up | relative error of a layer |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(_row(name, _time(row), _number(row["speed_up"], 2), _number(row["error"], 4)))
    return lines


def _comparison(rows: Mapping[str, Any]) -> Table:
    compared = {name.removeprefix("compare "): row for name, row in rows.items() if name.startswith("compare ")}
    if not compared:
        return []
    lines = [
        "**`halfstep compare` on the built-in GPT**",
        "",
        "| policy | ms per step | speed-up | memory at the peak |",
    ]
    lines += ["|---|---|---|---|"]
    for name, row in compared.items():
        cells = [_number(row["ms"], 1), _number(row["speed_up"], 2), _number(row["peak_mib"], 0)]
        lines.append(_row(f"`{name}`", cells[0], cells[1], f"{cells[2]} MiB" if cells[2] else ""))
    return lines


def _waits(rows: Mapping[str, Any]) -> Table:
    """Ways with and without clipping in one row."""
    if not rows:
        return []
    ways = list(
        dict.fromkeys(name.rpartition(", ")[0] for name in rows if name.endswith("clipped") and "released" not in name)
    )
    lines = ["**Waits for the device in one step**, and launches, without and with clipping.", ""]
    lines += ["| way | waits | clipped | launches | clipped |", "|---|---|---|---|---|"]
    for way in ways:
        pair = [rows.get(f"{way}, {end}", {}) for end in ("not clipped", "clipped")]
        lines.append(_row(way, *(_number(row.get(key)) for key in ("waits", "launches") for row in pair)))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _time(row: Mapping[str, Any]) -> str:
    low, high = row["quartiles"]
    return f"**{row['ms']:.2f}** ({low:.2f}–{high:.2f})"


def _percent(share: float | None, form: str = "{}") -> str:
    return "" if share is None else form.format(f"{100 * share:.0f} %")


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(), load()))


if __name__ == "__main__":
    main()

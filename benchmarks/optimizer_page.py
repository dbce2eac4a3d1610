"""Writes the measured block of ``docs/optimizers.md`` from the results of `optimizers` and `convergence`.

python benchmarks/optimizer_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "optimizers.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

#: Rows of the benchmark that the page shows, with what it calls them.
ROWS = {
    "torch fused fp32": "`torch.optim.AdamW(fused=True)`, FP32",
    "torch foreach fp32": "`torch.optim.AdamW(foreach=True)`, FP32",
    "torch fused, fp32 masters by hand": "the same, FP32 masters of bf16 weights by hand",
    "halfstep exact + fp32": "`halfstep.optim.AdamW`, exact, FP32 state",
    "halfstep exact + bf16": "exact, bf16 state",
    "halfstep exact + 8bit": "exact, 8-bit state",
    "halfstep 24bit + fp32": "24bit, FP32 state",
    "halfstep 24bit + 8bit": "24bit, 8-bit state",
    "halfstep 24bit + 8bit, gradients released": "24bit, 8-bit state, gradients released",
    "halfstep none + bf16": "no master, bf16 state",
    "halfstep exact + fp32, fp16 parameters": "exact, FP32 state, fp16 weights",
    "halfstep Lion exact + fp32": "`halfstep.optim.Lion`, exact, FP32 state",
    "halfstep Lion exact + bf16": "`Lion`, exact, bf16 state",
    "halfstep.MasterWeights, torch fused": "`halfstep.MasterWeights(torch.optim.AdamW(fused=True))`",
    "optimi AdamW, kahan": "optimi, Kahan",
    "torchao _AdamW, stochastic": "torchao, bf16 with stochastic rounding",
    "torchao AdamW8bit, stochastic": "torchao, 8 bits",
    "bitsandbytes AdamW8bit": "bitsandbytes, 8 bits",
    "bitsandbytes AdamW fp32": "bitsandbytes, 32 bits, FP32",
}
WHOLE = "halfstep exact + fp32: unscale + clip + step"
SGD = "halfstep SGD exact + fp32"


def block(optimizers: dict[str, Any], convergence: dict[str, Any]) -> str:
    """All that was measured, as Markdown."""
    return "\n".join([*_times(optimizers), "", *_pretraining(convergence), "", *_finetuning(convergence)])


def _times(result: dict[str, Any]) -> list[str]:
    environment, model = result["environment"], result["model"]
    runs = sorted(result["runs"], key=lambda run: int(run["threads"]))
    threads = [f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}" for run in runs]
    lines = [
        f"Time of a step of {model['parameters'] / 1e6:.1f} M parameters in {model['tensors']} tensors, relative to "
        f"PyTorch's fused AdamW on FP32 parameters in the same round (median, quartiles), and bytes per parameter of "
        f"weight, master, state and gradient together. {environment['cpu_count']} cores of {environment['device']} "
        f"({environment['device_detail']}), PyTorch {environment['torch']}, {result['started'][:10]}.",
        "",
        f"| optimizer | {' | '.join(threads)} | bytes per parameter |",
        f"|---|{'---|' * len(threads)}---|",
    ]
    for name, called in ROWS.items():
        cells = [_ratio(run["rows"].get(name, {})) for run in runs]
        memory = result["memory"].get(name, {}).get("total")
        if any(cells) or memory is not None:
            lines.append(f"| {called} | {' | '.join(cells)} | {'' if memory is None else f'{memory:.1f}'} |")
    for name, called in (
        (
            WHOLE,
            "Unscaling, clipping and stepping together, exact masters against PyTorch's three passes (unscale, "
            "`clip_grad_norm_`, fused step on FP32)",
        ),
        (SGD, "SGD with momentum, exact masters against PyTorch's fused one on FP32"),
    ):
        ratios = [_ratio(run["rows"].get(name, {})) for run in runs]
        if any(ratios):
            told = ", ".join(f"{ratio} ({t})" for ratio, t in zip(ratios, threads, strict=True))
            lines += ["", f"{called}: {told}."]
    refusal = next((run["rows"][n]["unavailable"] for run in runs for n in run["rows"] if _refused(run, n)), None)
    if refusal:
        lines += ["", f"flashoptim does not run on a CPU: `{refusal}`"]
    return lines


def _refused(run: dict[str, Any], name: str) -> bool:
    return "flashoptim" in name and "unavailable" in run["rows"][name]


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return ""
    low, high = row["ratio"]["quartiles"]
    return f"**{row['ratio']['median']:.2f}** ({low:.2f}–{high:.2f})"


def _pretraining(result: dict[str, Any]) -> list[str]:
    measured = result["pretraining"]
    losses = measured["fp32_losses"]
    lines = [
        f"**Does it learn the same?** The built-in GPT ({measured['size']}), {measured['steps']} steps; held-out loss "
        f"minus that of FP32 training with `torch.optim.AdamW` on the same seed. FP32 itself: {min(losses):.4f} to "
        f"{max(losses):.4f} over {len(losses)} seeds, a spread of {measured['seed_spread']:.4f}. Each pair: mean over "
        f"{len(measured['pairs'][0]['losses'])} of these seeds, and from where to where. fp16 products are emulated.",
        "",
        "| weights | master | state | rounding | difference | of one seed |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {p['parameters']} | `{p['master']}` | `{p['state']}` | {p['rounding'] or 'default'} | "
        f"{p['mean_difference']:+.4f} | {min(p['differences']):+.4f} to {max(p['differences']):+.4f} |"
        for p in measured["pairs"]
    ]


def _finetuning(result: dict[str, Any]) -> list[str]:
    measured = result["finetuning"]
    count = len(next(iter(measured["rows"].values()))["losses"])
    lines = [
        f"**A bf16 checkpoint, loaded the default way.** A small GPT-2 of Transformers, trained in FP32 on English for "
        f"{measured['pretrain_steps']} steps, saved in bf16 and fine-tuned on Python code for {measured['steps']} "
        f"steps at a learning rate of {measured['lr']:g}. Held-out loss, {measured['loss_before']:.3f} before "
        f"({count} seed{'' if count == 1 else 's'}), and the share of weights or masters that had moved after 5 steps:",
        "",
        "| optimizer | loss | moved |",
        "|---|---|---|",
    ]
    for name, row in measured["rows"].items():
        loss = sum(row["losses"]) / len(row["losses"])
        moved = sum(row["moved_after_5"]) / len(row["moved_after_5"])
        lines.append(f"| {name} | {loss:.3f} | {100 * moved:.1f} % |")
    return lines


def render(page: str, optimizers: dict[str, Any], convergence: dict[str, Any]) -> str:
    """The page with its block written anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block(optimizers, convergence)}\n{END}{after}"


def load() -> tuple[dict[str, Any], dict[str, Any]]:
    """The two results."""
    return tuple(json.loads((RESULTS / f"{name}.json").read_text()) for name in ("optimizers", "convergence"))  # type: ignore[return-value]


def main() -> None:
    PAGE.write_text(render(PAGE.read_text(), *load()))


if __name__ == "__main__":
    main()

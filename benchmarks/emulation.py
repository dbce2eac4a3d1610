"""How much faster emulated 16-bit arithmetic is than this CPU's own kernels, and how near.

    python benchmarks/emulation.py          # some ten seconds, one thread

Native and emulated runs alternate, so that load on the machine falls on both; each pair gives one ratio, and the median
ratio is kept with its quartiles. The numbers go to ``benchmarks/results/emulation.json`` with machine, versions and
load.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfstep import hardware
from halfstep.autocast import autocast

RESULTS = Path(__file__).resolve().parent / "results" / "emulation.json"
Case = Callable[[], tuple[Tensor, ...]]


def product(size: int, text: str) -> Case:
    """A matrix product of ``size`` x ``size`` 16-bit matrices, forward only; the region is entered already."""
    low = torch.float16 if text.startswith("fp16") else torch.bfloat16
    a, b = torch.randn(size, size).to(low), torch.randn(size, size).to(low)

    return lambda: (torch.mm(a, b),)


def layer(size: int, text: str) -> Case:
    """A linear layer with FP32 weights, forward and backward."""
    x = torch.randn(size, size, requires_grad=True)
    w = torch.randn(size, size, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = functional.linear(x, w)
        return out.detach(), *torch.autograd.grad(out, (x, w), torch.ones_like(out))

    return run


def compare(make: Callable[[str], Case], name: str, pairs: int) -> dict[str, Any]:
    """Ratios native / emulated over alternating pairs, and how the results agree."""
    texts = (name, f"{name}:emulate")
    cases: list[Case] = []
    results = []
    for text in texts:
        torch.manual_seed(0)
        cases.append(make(text))
        with autocast(text, "cpu"):
            results.append(cases[-1]())  # warms up
    seconds = []
    for _ in range(pairs):
        pair = []
        for text, case in zip(texts, cases, strict=True):
            with autocast(text, "cpu"):
                case()  # casts the weight, which a region keeps
                pair.append(timed(case))
        seconds.append(pair)
    ratios = [before / after for before, after in seconds]
    low, median, high = statistics.quantiles(ratios, n=4)
    same = [float((a == b).double().mean()) for a, b in zip(*results, strict=True)]
    return {
        "native_over_emulated": {"median": round(median, 2), "quartiles": [round(low, 2), round(high, 2)]},
        "native_ms": round(1e3 * statistics.median(s for s, _ in seconds), 3),
        "emulated_ms": round(1e3 * statistics.median(s for _, s in seconds), 3),
        "pairs": pairs,
        "identical_elements": [round(share, 4) for share in same],
    }


def timed(case: Case) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def entering(text: str, times: int = 200) -> float:
    """Microseconds to enter and leave a region."""
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        with autocast(text, "cpu"):
            pass
        samples.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(samples), 1)


def main() -> None:
    torch.set_num_threads(1)
    cases: dict[str, Any] = {}
    for name, size, pairs in (
        ("fp16-mixed", 128, 31),
        ("fp16-mixed", 256, 15),
        ("fp16-mixed", 512, 11),
        ("bf16-mixed", 512, 31),
    ):
        cases[f"{name} mm {size}"] = compare(lambda text, n=size: product(n, text), name, pairs)  # type: ignore[misc]
    cases["fp16-mixed linear 512 forward+backward"] = compare(lambda text: layer(512, text), "fp16-mixed", 7)
    regions = ("bf16-mixed", "fp16-mixed:emulate", "bf16-mixed:rules=cuda", "bf16-mixed:fp32_ops=softmax")
    entry = {text: entering(text) for text in regions}
    result = {
        "threads": 1,
        "enter_and_leave_us": entry,
        "environment": hardware.environment(hardware.detect("cpu")),
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    for case, numbers in cases.items():
        print(case, numbers)
    print(entry)


if __name__ == "__main__":
    main()

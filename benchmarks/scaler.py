"""What `halfstep.GradScaler` costs beside PyTorch's: ``python benchmarks/scaler.py``.

The same model trains under both in turn, round after round in one process, in rotating order; the result is the ratio
of each round's two times, with its spread. ``step`` is a whole training step; ``scaler_only`` is unscaling, check,
optimizer and ``update`` alone, on gradients that are there already: the part that differs. Model sizes span a case
where overhead must show (a few small layers) and one where it must not. Written to ``benchmarks/results/scaler.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep import GradScaler

RESULTS = Path(__file__).resolve().parent / "results" / "scaler.json"
SIZES = {"4 layers of 32": (4, 32), "40 layers of 64": (40, 64), "6 layers of 512": (6, 512)}
SCALERS: dict[str, Callable[[str, float], Any]] = {"pytorch": torch.amp.GradScaler, "halfstep": GradScaler}


class Run:
    """One model, its optimizer and a scaler."""

    def __init__(self, make: Callable[[str, float], Any], layers: int, width: int, fused: bool, device: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused)
        self.scaler = make(device, 1.0)  # so that gradients that are unscaled again and again stay what they are
        self.x = torch.randn(32, width, device=device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.model(self.x).square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def scaler_only(self) -> None:
        """On the gradients of the last backward pass."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def seconds(run: Callable[[], None], repeat: int, device: str) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeat


def measure(layers: int, width: int, fused: bool, device: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each scaler, and quartiles of the ratio halfstep / PyTorch over rounds."""
    runs = {name: Run(make, layers, width, fused, device) for name, make in SCALERS.items()}
    result: dict[str, Any] = {}
    for part in ("step", "scaler_only"):
        times: dict[str, list[float]] = {name: [] for name in runs}
        calls = {name: getattr(run, part) for name, run in runs.items()}
        for run in runs.values():
            run.step()
        repeat = max(3, int(0.03 / seconds(calls["pytorch"], 5, device)))
        for index in range(rounds):
            for name in sorted(runs, reverse=bool(index % 2)):
                times[name].append(seconds(calls[name], repeat, device))
        ratios = [own / their for own, their in zip(times["halfstep"], times["pytorch"], strict=True)]
        quarter, median, three_quarters = statistics.quantiles(ratios, n=4)
        result[part] = {
            "microseconds": {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()},
            "ratio": {"median": round(median, 3), "quartiles": [round(quarter, 3), round(three_quarters, 3)]},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    cases = {
        f"{size}, {'fused' if fused else 'foreach or for-loop'} AdamW": measure(
            *shape, fused, options.device, options.rounds
        )
        for size, shape in SIZES.items()
        for fused in (False, True)
    }
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    result = {
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": 1,
            "gpu": gpu,
            "load_at_start": round(load, 2),
        },
        "device": options.device,
        "rounds": options.rounds,
        "cases": cases,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for name, case in cases.items():
        for part, values in case.items():
            low, high = values["ratio"]["quartiles"]
            print(f"{name:45} {part:12} {values['ratio']['median']:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()

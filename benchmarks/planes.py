"""What parameters in planes cost and save, beside autocast: ``python benchmarks/planes.py``.

Whole training steps of one model under several ways, in turn, round after round in one process, in rotating order. The
result is the ratio of each round's time to that of ``torch.autocast`` with FP32 parameters and fused AdamW, with its
quartiles, and the peak of the bytes that are alive in a step (`halfstep.observe.PeakMemory`) after it. Two identical
ways, the first and ``autocast, again``, show what the machine's own noise is. Written to
``benchmarks/results/planes.json``.
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
from gpu.model import Size, decoder
from torch import Tensor, nn
from torch.nn import functional

import halfstep
from halfstep.observe import PeakMemory

RESULTS = Path(__file__).resolve().parent / "results" / "planes.json"

_FUSED = {"lr": 1e-4, "fused": True}
#: Policy, and optimizer. Without a policy: a loop in plain PyTorch.
WAYS: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "autocast": ("", lambda p: torch.optim.AdamW(p, **_FUSED)),
    "autocast, again": ("", lambda p: torch.optim.AdamW(p, **_FUSED)),
    "bf16-mixed": ("bf16-mixed", lambda p: torch.optim.AdamW(p, **_FUSED)),
    "bf16-master": ("bf16-master", lambda p: torch.optim.AdamW(p, **_FUSED)),
    "bf16-master, default AdamW": ("bf16-master", lambda p: torch.optim.AdamW(p, lr=1e-4)),
    "bf16-master, halfstep AdamW": ("bf16-master", lambda p: halfstep.optim.AdamW(p, lr=1e-4)),
    "bf16-master:grads=bf16": ("bf16-master:grads=bf16", lambda p: halfstep.optim.AdamW(p, lr=1e-4)),
    "bf16-master:grads=bf16, 8-bit": (
        "bf16-master:grads=bf16",
        lambda p: halfstep.optim.AdamW(p, lr=1e-4, state="8bit"),
    ),
}


class Recurrent(nn.Module):
    """ids (B, T) -> logits (B, T, 2000) by two LSTM layers of 512."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(2000, 512), nn.LSTM(512, 512, 2), nn.Linear(512, 2000)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids).transpose(0, 1))[0].transpose(0, 1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """Images (B, 3, 32, 32) -> logits (B, 10), channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=1) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(8))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + functional.relu(norm(convolution(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def _decoder(width: int, layers: int, heads: int, context: int, vocabulary: int) -> Callable[[], nn.Module]:
    return lambda: decoder(Size(width, layers, heads, context, vocabulary), "cpu")


#: Model, shape of a batch of ids or images, and number of classes.
WORKLOADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "GPT d64 L4, 8 x 64 tokens": (_decoder(64, 4, 4, 64, 256), (8, 64), 256),
    "GPT d512 L6, 4 x 256 tokens": (_decoder(512, 6, 8, 256, 4096), (4, 256), 4096),
    "GPT-2, 124 M, 1 x 512 tokens": (_decoder(768, 12, 12, 512, 50304), (1, 512), 50304),
    "ResNet, 16 x 32 x 32": (lambda: Residual().to(memory_format=torch.channels_last), (16, 3, 32, 32), 10),
    "LSTM 2 x 512, 16 x 35 tokens": (Recurrent, (16, 35), 2000),
}


class Run:
    """One way of training one workload."""

    def __init__(self, way: str, workload: str) -> None:
        torch.manual_seed(0)
        make, shape, classes = WORKLOADS[workload]
        policy, optimizer = WAYS[way]
        self.model = make()
        self.optimizer = optimizer(list(self.model.parameters()))
        self.mp = halfstep.MixedPrecision(self.model, self.optimizer, policy) if policy else None
        if len(shape) == 2:
            self.x = torch.randint(classes, shape)
            self.y = self.x
        else:
            self.x = torch.randn(shape).to(memory_format=torch.channels_last)
            self.y = torch.randint(classes, shape[:1])

    def _loss(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x).flatten(0, -2), self.y.flatten())

    def step(self) -> None:
        if self.mp is not None:
            with self.mp.autocast():
                loss = self._loss()
            self.mp.backward(loss)
            self.mp.step()
            return
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_bytes(self) -> int:
        memory = PeakMemory()
        memory.start()
        self.step()
        return memory.finish(0)[0].peak_bytes


def measure(workload: str, rounds: int, names: list[str]) -> dict[str, Any]:
    """Every way's ratios to the first one, and its bytes."""
    runs = {name: Run(name, workload) for name in names}
    for run in runs.values():
        run.step()
        run.step()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            runs[name].step()
            seconds[name].append(time.perf_counter() - begin)
    found: dict[str, Any] = {}
    for name in names:
        ratios = [a / b for a, b in zip(seconds[names[0]], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {"speed": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
        found[name]["ms"] = round(1000 * statistics.median(seconds[name]), 1)
    runs.clear()
    for name in names:  # each alone: what the others hold is not its own
        alone = Run(name, workload)
        alone.step()
        found[name]["peak_bytes"] = alone.peak_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Parameters in planes beside autocast: time and bytes of a step.")
    parser.add_argument("--rounds", type=int, default=16, help="of all ways in turn (default: 16)")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "environment": {
            "torch": torch.__version__,
            "processor": platform.processor() or platform.machine(),
            "bf16": halfstep.hardware.detect("cpu").formats["bf16"].because,
            "threads": arguments.threads,
            "load": os.getloadavg()[0],
            "rounds": arguments.rounds,
        },
        "workloads": {},
    }
    for workload in arguments.workloads:
        results["workloads"][workload] = measure(workload, arguments.rounds, list(WAYS))
        for name, row in results["workloads"][workload].items():
            print(f"{workload:32} {name:32} {row['speed']:.2f} {row['quartiles']} {row['ms']} ms {row['peak_bytes']:,}")
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What observing a training step costs, level by level: ``python benchmarks/observation.py``.

A transformer of 20 M parameters (width 512, 6 layers, 8 heads, vocabulary 1000; batches of 4 x 256 tokens) trains with
AdamW on one thread. In every round each level takes one step, in rotating order, so that load on the machine falls on
all of them; a round gives one ratio of each level's time to that of the step with nothing watching, and the median
ratio is kept with its quartiles. ``nothing`` itself takes two steps a round, and the ratio of the two is the noise that
the others have to be read against. ``shadow`` is the examination of the doctor, every op also in FP32: it takes part in
the first rounds only. Time is the process's own processor time: on one thread that is the time of the step, without
what others on the machine take. Setting a level up (hooks, the first look at names) is not timed: a turn enters the
level, takes one step, and times the next, with reading what was seen.

Written to ``benchmarks/results/observation.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfstep import hardware
from halfstep.doctor.examination import Examination
from halfstep.observe.ops import OpObserver
from halfstep.observe.watch import GradientWatch
from halfstep.policy import parse
from halfstep.workloads.gpt import Block

RESULTS = Path(__file__).resolve().parent / "results" / "observation.json"
WIDTH, LAYERS, HEADS, CONTEXT, BATCH, VOCABULARY = 512, 6, 8, 256, 4, 1000
#: Ratios that halfstep promises, of step time under observation to step time.
TARGETS = {"watch": 1.02, "scan": 1.09, "profile": 1.30}
LEVELS = ("nothing", "nothing again", "watch", "scan", "profile", "profile, with a policy", "shadow")


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width, HEADS, 0.0) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


class Run:
    """One model that all levels watch in turn, and its optimizer."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        torch.manual_seed(0)
        self.model = Transformer(width, layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.ids = torch.randint(VOCABULARY, (BATCH, context + 1))

    def step(self) -> None:
        logits = self.model(self.ids[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, level: str) -> tuple[float, tuple[str, ...]]:
        """Seconds of one step at a level, with what it takes to read the result; and what failed inside."""
        with contextlib.ExitStack() as stack:
            read: Callable[[], Any] = lambda: None  # noqa: E731
            failures: list[str] = []
            if level == "watch":
                watch = GradientWatch(self.model.named_parameters())
                stack.callback(watch.remove)
                read = lambda: watch.take().read()  # noqa: E731
            elif level in ("scan", "profile", "profile, with a policy"):
                policy = parse("fp16-mixed:rules=cuda") if "policy" in level else None
                observer = stack.enter_context(OpObserver("scan" if level == "scan" else "profile", policy))
                read, failures = lambda: observer.profile, observer.failures
            elif level == "shadow":
                examination = stack.enter_context(Examination())
                read, failures = examination.findings, examination.attribution.failures
            self.step()
            begin = time.process_time()
            self.step()
            read()
            return time.process_time() - begin, tuple(failures)


def measure(run: Run, rounds: int, shadow_rounds: int) -> dict[str, list[float]]:
    """Seconds by level, one a round."""
    seconds: dict[str, list[float]] = {level: [] for level in LEVELS}
    for level in LEVELS:
        run.timed(level)  # warms up
    for number in range(rounds):
        taking_part = [level for level in LEVELS if level != "shadow" or number < shadow_rounds]
        first = number % len(taking_part)
        for level in taking_part[first:] + taking_part[:first]:
            taken, failures = run.timed(level)
            if failures:
                raise RuntimeError(f"{level}: {failures}")
            seconds[level].append(taken)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Of each level to nothing, round by round."""
    result: dict[str, Any] = {}
    for level in LEVELS[1:]:
        paired = [a / b for a, b in zip(seconds[level], seconds["nothing"], strict=False)]
        low, median, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else paired * 3
        result[level] = {
            "ratio": {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]},
            "rounds": len(paired),
            "target": TARGETS.get(level),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="What observing a training step costs, level by level.")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--shadow-rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two rounds, nothing written")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the numbers go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.smoke:
        run, rounds, shadow_rounds = Run(32, 1, 16), 2, 1
    else:
        run, rounds, shadow_rounds = Run(WIDTH, LAYERS, CONTEXT), args.rounds, args.shadow_rounds
    before = hardware.environment(hardware.detect("cpu"))
    seconds = measure(run, rounds, shadow_rounds)
    levels = ratios(seconds)
    result = {
        "model": {
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "width": WIDTH,
            "layers": LAYERS,
            "heads": HEADS,
            "tokens": [BATCH, CONTEXT],
            "vocabulary": VOCABULARY,
        },
        "threads": 1,
        "step_ms": round(1e3 * statistics.median(seconds["nothing"]), 1),
        "levels": levels,
        "environment": before,
    }
    for level, numbers in levels.items():
        print(f"{level:24s}", numbers)
    if not args.smoke:
        args.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

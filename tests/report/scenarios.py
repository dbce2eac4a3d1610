"""Run records as real comparisons leave them, for tests of what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from halfstep.compare import Comparison, compare
from halfstep.record import End, Header, Memory, Notice, RunRecord, Step

STEP_SECONDS = {"fp32": 0.4, "bf16-mixed": 0.24, "fp16-mixed": 1.9}
ACTIVATION_BYTES = {"fp32": 310_000_000, "bf16-mixed": 196_000_000, "fp16-mixed": 196_000_000}
ENVIRONMENT = {"torch": "2.13.0", "device": "CPU of a test", "cpu_flags": ["avx2", "amx_bf16"], "load": 0.3}

Scene = tuple[list[RunRecord], Comparison]


def record(
    policy: str = "fp32",
    seed: int = 0,
    steps: int = 60,
    *,
    optimizers: int = 1,
    error: str | None = None,
    memory: bool = True,
    command: Sequence[str] = ("train.py", "--layers", "6"),
    notices: Sequence[Notice] = (),
    requested: str | None = None,
) -> RunRecord:
    """A run whose loss falls, with the noise of its seed; fp16 starts at a loss scale that makes it skip steps."""
    shared, own = np.random.default_rng(seed), np.random.default_rng([seed, *policy.encode()])
    noise = shared.normal(0, 0.04, steps) + 0.02 * shared.normal()
    scale = 2.0**20 if policy.startswith("fp16") else None
    lines = []
    for index in range(steps):
        loss = 2.3 + 3 * math.exp(-7 * index / steps) + noise[index] + own.normal(0, 0.004)
        skip = scale is not None and index in (0, 1, steps // 2)
        seconds = None if index == 0 else STEP_SECONDS[policy] * (1 + 0.02 * abs(own.normal()))
        for optimizer in range(optimizers):
            lines.append(
                Step(index + 1, optimizer, loss + optimizer, seconds, not skip, scale, 1.0, 9**9, None, index == 2)
            )
        scale = scale / 2 if skip and scale else scale
    parts = {"parameters": 42_000_000, "gradients": 42_000_000, "optimizer state": 84_000_000}
    parts["activations and temporaries"] = ACTIVATION_BYTES[policy]
    return RunRecord(
        path=Path(f"{policy}.seed{seed}.jsonl"),
        header=Header(
            started=f"2026-01-01T{seed:02d}:00:00+00:00",
            command=tuple(command),
            policy_requested=requested or policy,
            policy=policy,
            reason=f"the reason for {policy}",
            seed=seed,
            environment=ENVIRONMENT,
        ),
        steps=tuple(lines),
        memory=Memory(3, sum(parts.values()), "aten::_log_softmax", parts) if memory else None,
        notices=tuple(notices),
        end=End("error", 1, 5.0, 10**9, error) if error else End("finished", 0, 20.0, 10**9),
    )


def _scene(*records: RunRecord) -> Scene:
    return list(records), compare(records)


def three_policies() -> Scene:
    """One of them FP16 with skipped steps and a notice, one of whose runs crashed."""
    slow = Notice("slow-fp16", "FP16 products are slow on this CPU", "train.py:41")
    crash = "RuntimeError: can't allocate 8 GB"
    runs = [record(policy, seed) for seed in range(3) for policy in ("fp32", "bf16-mixed")]
    runs += [record("fp16-mixed", seed, notices=[slow], memory=False) for seed in range(2)]
    return _scene(*runs, record("fp16-mixed", 2, 17, error=crash, memory=False))


def single_run() -> Scene:
    """``auto``, nothing to compare it with."""
    return _scene(record("bf16-mixed", requested="auto"))


def on_a_gpu() -> Scene:
    """Tensors in two kinds of memory, and an allocator that counts its own."""
    runs = []
    for policy, more in (("fp32", 1.0), ("bf16-mixed", 0.6)):
        run = record(policy)
        assert run.memory is not None
        steps = tuple(replace(step, device_bytes=int(more * (6 << 30) + step.step)) for step in run.steps)
        host = Memory(3, 7 << 30, "aten::stack", {"other tensors": 7 << 30}, "cpu")
        runs.append(replace(run, steps=steps, memory=replace(run.memory, device="cuda"), host_memory=host))
    return _scene(*runs)


def no_steps() -> Scene:
    return _scene(record("fp32", steps=0, memory=False), record("bf16-mixed", steps=0, memory=False))


def one_step() -> Scene:
    return _scene(record("fp32", steps=1), record("bf16-mixed", steps=1))


def one_seed() -> Scene:
    return _scene(record("fp32"), record("bf16-mixed"))


def gan() -> Scene:
    return _scene(*(record(p, seed, optimizers=2) for seed in range(3) for p in ("fp32", "fp16-mixed")))


def diverged() -> Scene:
    """Losses that rise to 10^300 and end as NaN."""

    def loss(step: Step) -> float | None:
        return step.loss if step.step < 30 else 10.0 ** min(300, (step.step - 29) ** 3) if step.step < 45 else math.nan

    runs = [record(policy, seed) for seed in range(2) for policy in ("fp32", "bf16-mixed")]
    return _scene(*(with_losses(run, loss) if run.header.policy != "fp32" else run for run in runs))


def baseline_diverged() -> Scene:
    return _scene(with_losses(record("fp32"), lambda step: math.inf), record("bf16-mixed"))


def no_losses() -> Scene:
    return _scene(*(with_losses(record(policy), lambda step: None) for policy in ("fp32", "bf16-mixed")))


def constant_losses() -> Scene:
    return _scene(*(with_losses(record(policy, seed), lambda step: 0.0) for seed in (0, 1) for policy in STEP_SECONDS))


def killed() -> Scene:
    """No end, a cut last line, a scale that has decayed to 0."""
    run = record("fp16-mixed")
    steps = tuple(replace(step, scale=0.0, applied=False) for step in run.steps)
    return _scene(replace(run, steps=steps, end=None, truncated=True), record("fp32"))


def hostile() -> Scene:
    """Words that would break a page, an SVG, matplotlib's mathematics or rich's markup."""
    words = "</script><script>alert(1)</script> $\\frac{1}{2}$ [red]<b>&\"' --> \udcff 模型"
    run = record("bf16-mixed", command=("<i>&.py", words), notices=[Notice("code", words, words)], error=words)
    header = replace(run.header, reason=words, environment={words: words})
    memory = Memory(3, 10**9, words, {words: 10**9})
    return _scene(record("fp32", command=("<i>&.py", words)), replace(run, header=header, memory=memory))


def long_runs(steps: int = 200_000) -> Scene:
    """Six runs that share their steps, to be quick to make; FP16's scale changes all the time, as it never would."""
    plain = record("fp32", steps=steps).steps
    restless = tuple(replace(s, scale=2.0 ** (8 + s.step % 7), applied=s.step % 3 > 0) for s in plain)
    runs = []
    for policy in STEP_SECONDS:
        run = replace(record(policy, steps=1), steps=restless if policy.startswith("fp16") else plain)
        runs += [replace(run, header=replace(run.header, seed=seed)) for seed in (0, 1)]
    return _scene(*runs)


def with_losses(run: RunRecord, loss: Callable[[Step], float | None]) -> RunRecord:
    """The run with another loss at every step."""
    return replace(run, steps=tuple(replace(step, loss=loss(step)) for step in run.steps))


ALL: list[Callable[[], Scene]] = [
    three_policies,
    single_run,
    on_a_gpu,
    no_steps,
    one_step,
    one_seed,
    gan,
    diverged,
    baseline_diverged,
    no_losses,
    constant_losses,
    killed,
    hostile,
]

"""Remedies are tried before they are recommended, and trying them leaves no trace."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import halfstep
from halfstep.autocast.islands import NoSuchModuleError
from halfstep.doctor import Finding, Severity, examine
from halfstep.doctor.finding import Trial
from halfstep.doctor.remedy import Constant, Line, Remedy, try_remedies
from halfstep.doctor.smallest import smallest
from halfstep.doctor.snapshot import Snapshot
from halfstep.observe.place import Place
from halfstep.policy import parse

FP16 = "fp16-mixed:emulate"


def above_note(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity > Severity.NOTE]


def verified(findings: Sequence[Finding], code: str) -> list[Trial]:
    return [t for finding in findings if finding.code == code for t in finding.trials if t.outcome == "verified"]


def island_of(findings: Sequence[Finding], code: str) -> tuple[str, ...]:
    """The modules in the policy that was verified."""
    (trial, *_) = [trial for trial in verified(findings, code) if trial.remedy.startswith("FP32 for")]
    assert trial.policy is not None
    return parse(trial.policy).keep_fp32


# ------------------------------------------------------------------ FP32 islands


def linear(gain: float) -> nn.Linear:
    """Multiplies by ``gain``."""
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8) * gain)
    return layer


class Chain(nn.Module):
    """Linear layers, each followed by the factor that undoes it: in FP32, as PyTorch's autocast leaves products."""

    def __init__(self, gains: Sequence[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(gain) for gain in gains)
        self.gains = gains

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            x = layer(x) * torch.tensor([1 / gain] * 8)
        return x


def healthy(model: nn.Module, x: Tensor, kept: Sequence[str]) -> bool:
    """What the remedies are checked with: the model under `halfstep.keep_fp32` and autocast, by itself."""
    with halfstep.keep_fp32(model, kept, "cpu"), halfstep.autocast(parse(FP16), "cpu"):
        return bool(model(x).isfinite().all())


@pytest.mark.parametrize("large", [[1], [0], [1, 3], [0, 2, 4]])
def test_the_modules_that_overflow_are_the_island(large: list[int]) -> None:
    count = 3 if len(large) == 1 else 5
    model = Chain([90000.0 if i in large else 2.0 for i in range(count)])
    x = torch.ones(2, 8)
    findings = examine(lambda: model(x), FP16, remedies=True)
    expected = tuple(f"layers.{i}" for i in large)
    assert set(island_of(findings, "HS101")) == set(expected)
    assert healthy(model, x, expected)
    assert not any(healthy(model, x, some) for some in itertools.combinations(expected, len(expected) - 1))
    assert all(verified([f], "HS101") for f in findings if f.code == "HS101")


class Inverse(nn.Module):
    """Takes what overflowed and makes it look healthy: an HS103 of its own, whose cause is elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)


def test_a_module_that_only_suffers_is_left_out() -> None:
    model = nn.Sequential(linear(2.0), linear(90000.0), Inverse(), linear(2.0))
    findings = examine(lambda: model(torch.ones(2, 8).abs() + 1.0), FP16, remedies=True)
    assert {f.code for f in above_note(findings)} == {"HS101", "HS103"}
    assert {f.place.module for f in above_note(findings) if f.place} == {"1", "2"}
    assert island_of(findings, "HS101") == ("1",) == island_of(findings, "HS103")


def test_a_nested_module_is_named_by_its_path() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(linear(1.0), Chain([2.0, 90000.0]))})
    findings = examine(lambda: model["encoder"](torch.ones(2, 8)), FP16, remedies=True)
    # The outermost module that was called is the root of all paths.
    assert island_of(findings, "HS101") == ("1.layers.1",)


class Residual(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.branch = linear(gain)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Stream(nn.Module):
    """A residual stream that outgrows fp16 where two halves of it meet."""

    def __init__(self) -> None:
        super().__init__()
        self.into = linear(40000.0)
        self.blocks = nn.Sequential(Residual(1.0), Residual(0.1))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.into(x)))


def test_a_sum_of_a_residual_stream() -> None:
    """The sum overflows in blocks.0. In FP32 it is 80000, which the next branch cannot read in fp16."""
    model, x = Stream(), torch.eye(8)
    findings = examine(lambda: model(x), FP16, remedies=True)
    first = next(f for f in findings if f.code == "HS101")
    assert first.place is not None and (first.place.module, first.place.op) == ("blocks.0", "add")
    kept = island_of(findings, "HS101")
    assert kept == ("blocks.0", "blocks.1.branch")
    assert healthy(model, x, kept)
    assert not any(healthy(model, x, some) for some in itertools.combinations(kept, len(kept) - 1))
    with halfstep.keep_fp32(model, kept, "cpu"):
        assert above_note(examine(lambda: model(x), FP16)) == []


def test_without_a_policy_the_island_is_a_call() -> None:
    model = Chain([2.0, 90000.0])

    def program() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return model(torch.ones(2, 8))

    (trial, *_) = verified(examine(program, remedies=True), "HS101")
    assert trial.remedy == 'FP32 for layers.1: halfstep.keep_fp32(model, ["layers.1"])' and trial.policy is None
    with halfstep.keep_fp32(model, ["layers.1"], "cpu"):
        assert above_note(examine(program)) == []


def test_a_line_outside_of_modules_in_fp32() -> None:
    def program() -> Tensor:
        x = torch.tensor([300.0, 2.0]).half()
        y = x * x
        return y.float() / 2

    (finding,) = above_note(examine(program, remedies=True))
    (trial,) = finding.trials
    assert trial.outcome == "verified" and re.fullmatch(r"compute mul on line \d+ in FP32", trial.remedy)
    assert finding.place is not None and f"line {finding.place.line} " in trial.remedy


# ------------------------------------------------------------------ bf16, scale, masters


def test_bf16_instead_of_fp16() -> None:
    model = Chain([90000.0])
    findings = examine(lambda: model(torch.ones(2, 8)), FP16, remedies=True)
    assert [t.policy for t in verified(findings, "HS101") if "bf16" in t.remedy] == ["bf16-mixed:emulate"]
    assert above_note(examine(lambda: model(torch.ones(2, 8)), "bf16-mixed:emulate")) == []


def test_a_loss_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(16, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def program() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(x).float().pow(2).mean() * 1e-6
        loss.backward()
        optimizer.step()

    (finding,) = above_note(examine(program, remedies=True))
    (trial,) = finding.trials
    scale = finding.numbers["suggested_scale"]
    assert (finding.code, trial.outcome) == ("HS201", "verified")
    assert trial.remedy == f"scale the loss by {scale:g}: GradScaler(init_scale={scale:g})"


def test_masters() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16).to(torch.bfloat16)
    x = torch.ones(4, 16).bfloat16()

    def training(optimizer: Any) -> Callable[[], None]:
        def program() -> None:
            for _ in range(2):
                optimizer.zero_grad()
                model(x).float().pow(2).mean().backward()
                optimizer.step()

        return program

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    examine(training(optimizer), remedies=True)
    assert "step" not in vars(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    step = optimizer.step
    findings = above_note(examine(training(optimizer), remedies=True))
    assert optimizer.step is step  # the scheduler's, as it was
    scheduler.step()
    assert {finding.code for finding in findings} == {"HS301"}
    for finding in findings:
        assert [t.outcome for t in finding.trials] == ["verified"] and "MasterWeights" in finding.trials[0].remedy
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    masters = halfstep.MasterWeights(torch.optim.SGD(model.parameters(), lr=1e-5))
    assert above_note(examine(training(masters))) == []


def test_an_optimizer_that_the_program_makes_itself_cannot_be_given_masters() -> None:
    weight = nn.Parameter(torch.ones(16).bfloat16())

    def program() -> None:
        weight.grad = torch.full_like(weight, 1e-4)
        torch.optim.SGD([weight], lr=1e-3).step()

    findings = above_note(examine(program, remedies=True))
    assert {f.code for f in findings} == {"HS301"} and all(t.outcome != "verified" for f in findings for t in f.trials)


# ------------------------------------------------------------------ constants, and a diff to apply

CONSTANTS = {
    "guard of a logarithm": ("(x + 1e-8).log()", "1e-8", "0.0001"),
    "guard of a division": ("1 / (x + 1e-9)", "1e-9", "0.0001"),
    "two on a line": ("(x * 1.5 + 1e-8).log() * 3.0", "1e-8", "0.0001"),
    "whole number": ("x + 100000", "100000", "65504"),
    "upper bound": ("(1 - (x + 0.99999).clamp(max=0.99999)).log()", "0.99999", "0.999"),
}


def patched(source: str, diff: str) -> str:
    """Apply a unified diff, line by line, as ``patch`` does: what it removes has to be there."""
    lines, result, at = source.splitlines(keepends=True), [], 0
    for line in diff.splitlines(keepends=True)[2:]:
        if match := re.match(r"@@ -(\d+)", line):
            result += lines[at : int(match[1]) - 1]
            at = int(match[1]) - 1
        elif line[0] in " -":
            assert lines[at] == line[1:]
            result += [line[1:]] if line[0] == " " else []
            at += 1
        else:
            result.append(line[1:])
    return "".join(result + lines[at:])


def loaded(path: Path) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program: Callable[[], Any] = module.program
    return program


@pytest.mark.parametrize("what", CONSTANTS)
def test_a_better_constant_comes_as_a_diff_that_applies(what: str, tmp_path: Path) -> None:
    expression, before, after = CONSTANTS[what]
    source = (
        "import torch\n\n\ndef program():\n"
        "    x = torch.tensor([0.0, 0.5]).half()\n"
        f"    return {expression}\n\n\nVERSION = 1e-8\n"
    )
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    findings = above_note(examine(loaded(script), remedies=True))
    (finding,) = [finding for finding in findings if finding.code in ("HS401", "HS402", "HS403")]
    (trial,) = [trial for trial in finding.trials if trial.diff is not None]
    assert trial.outcome == "verified" and trial.remedy == f"{float(after):g} instead of {float(before):g}"
    assert trial.diff is not None
    changed = tmp_path / "changed.py"
    changed.write_text(patched(source, trial.diff), encoding="utf-8")
    assert changed.read_text(encoding="utf-8") == source.replace(expression, expression.replace(before, after))
    assert above_note(examine(loaded(changed))) == []
    # The logarithm's inf came of it, and is cured by it.
    assert all(any(t.outcome == "verified" for t in finding.trials) for finding in findings)


def test_a_constant_that_is_not_on_the_line_has_no_diff() -> None:
    eps = 1e-8

    def program() -> Tensor:
        return (torch.tensor([0.0, 0.5]).half() + eps).log()

    trials = verified(examine(program, remedies=True), "HS401")
    assert [trial.diff for trial in trials if "instead of" in trial.remedy] == [None]


# ------------------------------------------------------------------ what does not help is said


def finding_at(module: str, code: str = "HS101", severity: Severity = Severity.ERROR) -> Finding:
    place = Place("mm", "forward", module, "Linear", "train.py", 7)
    return Finding(code, place, "as it is", "So.", "Then.", severity)


def test_what_does_not_help_is_said_with_what_was_seen() -> None:
    finding = finding_at("a")
    (got,) = try_remedies([finding], lambda remedy: [finding], parse("fp16-mixed"))
    assert {trial.outcome for trial in got.trials} == {"tried, did not help"}
    assert len(got.trials) >= 2 and all("HS101 is still there (as it is)" in trial.evidence for trial in got.trials)


def test_a_remedy_that_brings_something_as_bad_does_not_help() -> None:
    finding, other = finding_at("a"), finding_at("b", "HS105")
    (got,) = try_remedies([finding], lambda remedy: [other], parse("fp16-mixed"))
    assert {trial.outcome for trial in got.trials} == {"tried, did not help"}
    assert all("HS105 has come instead (as it is at mm in b" in trial.evidence for trial in got.trials)
    milder = finding_at("b", "HS105", Severity.WARNING)
    (got,) = try_remedies([finding], lambda remedy: [milder], parse("fp16-mixed"))
    assert {trial.outcome for trial in got.trials} == {"verified"}


def test_a_remedy_under_which_the_program_raises_does_not_help() -> None:
    model = Chain([90000.0])

    def program() -> Tensor:
        y = model.layers[0](torch.ones(2, 8))
        if y.dtype is not torch.float16:
            raise TypeError(f"expected float16, got {y.dtype}")
        return y

    (finding,) = above_note(examine(program, "fp16-mixed", remedies=True))
    assert {trial.outcome for trial in finding.trials} == {"tried, did not help"}
    assert any("it did not run: TypeError: expected float16" in trial.evidence for trial in finding.trials)


def test_notes_are_not_treated() -> None:
    note = finding_at("a", severity=Severity.NOTE)
    assert try_remedies([note], lambda remedy: pytest.fail("was run"), None) == [note]


@pytest.mark.parametrize("most_runs", [0, 1, 5])
def test_the_budget_is_kept(most_runs: int) -> None:
    findings = [finding_at(f"layers.{i}.part") for i in range(9)]
    runs: list[Remedy] = []

    def rerun(remedy: Remedy) -> list[Finding]:
        runs.append(remedy)
        return findings

    got = try_remedies(findings, rerun, parse("fp16-mixed"), most_runs=most_runs)
    assert len(runs) == most_runs == len(set(runs))
    assert [finding.code for finding in got] == ["HS101"] * 9
    assert sum(bool(finding.trials) for finding in got) <= most_runs * 9 and (most_runs > 0 or not got[0].trials)


# ------------------------------------------------------------------ no trace


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def draws() -> list[object]:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[object]:
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    for values in optimizer.state.values():
        tensors += values.values()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    numbers = [None if t is None else t.detach().clone().numpy().tobytes() for t in tensors]
    return [*numbers, len(optimizer.state), repr(groups)]


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("optimizer_of", [torch.optim.AdamW, halfstep.optim.AdamW])
def test_a_snapshot_restores_every_bit(warm: int, optimizer_of: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Everything()
    optimizer = optimizer_of(model.parameters(), lr=1e-2)

    def step() -> float:
        x = torch.randn(8, 8) + random.random() + float(np.random.rand())
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.5
        return loss.item()

    for _ in range(warm):
        step()
    before = state(model, optimizer)
    with Snapshot() as snapshot:
        first = [step(), step()]
    after, drawn = state(model, optimizer), draws()
    assert after != before
    for _ in range(2):  # as often as one likes
        snapshot.restore()
        assert state(model, optimizer) == before
        assert [step(), step()] == first
        assert state(model, optimizer) == after and draws() == drawn


def test_after_remedies_the_program_is_where_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(linear(1.0), nn.BatchNorm1d(8), linear(90000.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def program() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 8)).float().mean().backward()
        optimizer.step()

    before = state(model, optimizer)
    torch.manual_seed(5)
    drawn = draws()[0]
    torch.manual_seed(5)
    findings = examine(program, FP16, remedies=True)
    assert verified(findings, "HS101")
    assert state(model, optimizer) == before and torch.rand(3).tolist() == drawn
    assert not any(module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------ the smallest set


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.sets(st.integers(0, n - 1), min_size=1)))))
def test_no_item_of_the_smallest_set_can_be_left_out(case: tuple[int, list[set[int]]]) -> None:
    """Against brute force, where any superset of one of some sets helps."""
    count, causes = case
    asked: list[tuple[int, ...]] = []

    def enough(chosen: Sequence[int]) -> bool:
        return len(chosen) == count or any(cause <= set(chosen) for cause in causes)

    def helps(chosen: Sequence[int]) -> bool:
        asked.append(tuple(chosen))
        return enough(chosen)

    found = smallest(range(count), helps)
    subsets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
    minimal = [
        s for s in subsets if enough(s) and not any(enough(r) for r in itertools.combinations(s, len(s) - 1) if r)
    ]
    assert tuple(found) in minimal
    assert len(asked) == len(set(asked)) and tuple(range(count)) not in asked


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(0))
def test_no_item_can_be_left_out_whatever_helps(count: int, seed: int) -> None:
    """Even where more is not better: an island may break what it touches."""
    pick = random.Random(seed)
    subsets = [s for size in range(1, count) for s in itertools.combinations(range(count), size)]
    good = {s for s in subsets if pick.random() < 0.3} | {tuple(range(count))}
    found = tuple(smallest(range(count), lambda chosen: tuple(chosen) in good))
    assert found in good and not any(r in good for r in itertools.combinations(found, len(found) - 1))


@pytest.mark.parametrize("count", [16, 64])
def test_one_of_many_is_found_with_few_questions(count: int) -> None:
    for culprit in (0, count // 3, count - 1):
        asked: list[int] = []

        def helps(chosen: Sequence[int], culprit: int = culprit, asked: list[int] = asked) -> bool:
            asked.append(len(chosen))
            return culprit in chosen

        assert smallest(range(count), helps) == [culprit]
        assert len(asked) <= 2 * math.log2(count)


# ------------------------------------------------------------------ a remedy as text

LINES = st.builds(Line, st.text(), st.text(), st.integers(1))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Remedy,
        policy=st.none() | st.text(),
        islands=st.lists(st.text(), max_size=3).map(tuple),
        fp32_at=st.lists(LINES, max_size=3).map(tuple),
        constants=st.lists(st.builds(Constant, LINES, FLOATS, FLOATS), max_size=3).map(tuple),
        loss_scale=st.none() | FLOATS,
        masters=st.booleans(),
    )
)
def test_a_remedy_survives_json(remedy: Remedy) -> None:
    assert Remedy.from_json(json.loads(json.dumps(remedy.to_json()))) == remedy


def test_the_islands_of_the_policy_that_is_examined_hold_in_the_first_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(3e4)

    assert "HS101" in [finding.code for finding in examine(lambda: model(torch.ones(2, 4)), "fp16-mixed:emulate")]
    kept = examine(lambda: model(torch.ones(2, 4)), "fp16-mixed:keep_fp32=0+1:emulate")
    assert [finding.code for finding in kept] == []
    assert all("forward" not in vars(part) for part in model)  # taken back
    with pytest.raises(NoSuchModuleError, match="nowhere"):
        examine(lambda: model(torch.ones(2, 4)), "fp16-mixed:keep_fp32=nowhere:emulate")


class Averaging(nn.Module):
    """Keeps an average in a buffer that each forward pass assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.linear(x)
        self.average = self.average * 0.9 + h.detach().float().mean(0) * 0.1
        return h


def test_buffers_that_forward_assigns_anew_are_put_back() -> None:
    torch.manual_seed(0)
    net = Averaging()
    with torch.no_grad():
        net.linear.weight[2] = 3e4
    average = net.average

    def step() -> None:
        net(torch.ones(6, 8)).float().square().mean().backward()

    findings = examine(step, policy="fp16-mixed:emulate", remedies=True)
    assert any(finding.trials for finding in findings)
    assert net.average is average and not average.any()
    with Snapshot() as snapshot:
        step()
        net.register_buffer("other", torch.ones(1))
        snapshot.restore()
        assert net.average is average and not average.any() and "other" not in net._buffers

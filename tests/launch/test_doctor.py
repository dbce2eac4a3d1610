"""The doctor's stages: what they learn of a script, in time, and whatever becomes of it."""

from __future__ import annotations

import json
import math
import signal
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.doctor.finding import Finding, Severity, SilenceError, Trial
from halfstep.doctor.remedy import Remedy
from halfstep.launch import ScriptError, child, doctor, stage
from halfstep.launch.child import Request, run_stage
from halfstep.launch.doctor import Told, diagnose
from halfstep.policy import Policy, UnknownPolicyError

TRAIN = """
import os, sys, torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(net.parameters(), lr=1e-9)
x = torch.randn(64, 8)
for step in range(9):
    optimizer.zero_grad()
    loss = net(x).square().mean()
    loss.backward()
    optimizer.step()
    print("step", step)
"""
#: The first layer's weights and inputs fit in fp16; its outputs, about 1e6, are beyond 65504.
OVERFLOW = TRAIN.replace("x = ", "net[0].weight.data.mul_(1e4)\nx = 100 * ")
UNDER = "fp16-mixed"


def request(tmp_path: Path, kind: child.Stage, policy: str = UNDER) -> Request:
    return Request(kind, "script.py", (), policy, policy, "cpu", 3, (), str(tmp_path / "lines.jsonl"))


def lines(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    text = (tmp_path / "lines.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, text) if line["kind"] == kind]


# ---------------------------------------------------------------- whole diagnoses, in processes


def test_an_overflow_is_found_told_and_handed_to_the_remedies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(OVERFLOW)
    seen: dict[str, Any] = {}

    def try_remedies(findings: list[Finding], rerun: Any, policy: Policy, most_runs: int) -> list[Finding]:
        seen["given"] = findings
        seen["under bf16"] = rerun(Remedy(policy="bf16-mixed"))
        return [finding.with_trials([Trial("bf16", "verified", "gone")]) for finding in findings]

    monkeypatch.setattr(doctor, "try_remedies", try_remedies)
    told: list[Told] = []
    folder = tmp_path / "out"
    diagnosis, got_somewhere = diagnose(
        Path("train.py"), [], UNDER, folder, device_type="cpu", steps=2, silence=["HS5*"], tell=told.append
    )
    assert got_somewhere and diagnosis.notes == ()
    (overflow,) = [finding for finding in diagnosis.findings if finding.code == "HS101"]
    assert overflow.place is not None
    assert (overflow.place.op, overflow.place.module) == ("addmm", "0")
    assert str(overflow.place.file).endswith("train.py") and overflow.place.line == 12
    assert overflow.trials == (Trial("bf16", "verified", "gone"),)
    assert not any(
        finding.trials for finding in diagnosis.findings if finding.code == "HS107"
    )  # only what was examined
    assert not any(finding.code.startswith("HS5") for finding in diagnosis.findings)
    assert "HS101" in {finding.code for finding in seen["given"]} and not any(
        finding.code == "HS101" for finding in seen["under bf16"]
    )
    assert [step.step for step in diagnosis.steps] == [1, 2] and diagnosis.steps[0].scale == 65536
    assert diagnosis.profile is not None and diagnosis.predictions
    assert "HS107" in {finding.code for finding in diagnosis.findings}  # the profile's prediction of the same
    # Each finding is told once, in its stage; those of the remedies' own runs are not.
    where = [told.text.partition(":")[0] if told.kind == "stage" else told.finding.code for told in told]
    assert where.index("profile") < where.index("HS107") < where.index("examine") < where.index("HS101")
    assert where.count("HS101") == 1 and where.index("HS101") < where.index("remedy-1")
    assert "step 0" in (folder / "examine.log").read_text()
    assert {"profile.jsonl", "examine.jsonl", "remedy-1.jsonl", "remedy-2.jsonl"} <= {
        path.name for path in folder.iterdir()
    }


def test_what_was_found_before_a_kill_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(OVERFLOW.replace("    print", "    if step: os.kill(os.getpid(), 9)\n    print"))
    diagnosis, got_somewhere = diagnose(
        Path("train.py"), [], UNDER, tmp_path / "out", device_type="cpu", remedies=False
    )
    assert got_somewhere
    assert "HS101" in {finding.code for finding in diagnosis.findings}
    assert len(diagnosis.steps) == 2 and diagnosis.profile is not None
    killed = [note for note in diagnosis.notes if "killed by SIGKILL (memory ran out?) (after 2 of 3 steps)" in note]
    assert [note.partition(":")[0] for note in killed] == ["profile", "examine"]


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ScriptError, {"script": "nothing.py"}, "no script nothing.py"),
        (UnknownPolicyError, {"policy": "bf17-mixed"}, "unknown policy"),
        (SilenceError, {"silence": ["HS9*"]}, "silences nothing"),
        (FileExistsError, {"folder": "occupied"}, "never overwritten"),
        (OSError, {"folder": "train.py/out"}, "train.py"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path, monkeypatch, error, options, message):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    Path("occupied").mkdir()
    Path("occupied/doctor.json").write_text("{}")
    given = {"script": "train.py", "policy": "fp32", "folder": "new", "silence": []} | options
    told: list[Told] = []
    with pytest.raises(error, match=message):
        diagnose(
            Path(given["script"]),
            [],
            given["policy"],
            Path(given["folder"]),
            silence=given["silence"],
            tell=told.append,
        )
    assert not told and not list(Path("new").glob("*"))


# ---------------------------------------------------------------- one stage, in this process


def test_profile_stage_counts_from_the_first_module_call_on(launch, tmp_path):
    source = TRAIN.replace("for step", "prepared = torch.linalg.qr(x)\nfor step")
    watcher = stage.ProfileWatcher(request(tmp_path, "profile"))
    launch(source, "fp32", step_limit=1, watcher=watcher)
    *_, profile = lines(tmp_path, "profile")
    ops = {record.place.op for record in doctor.Profile.from_json(profile["profile"]).records.values()}
    assert "addmm" in ops and "linalg_qr" not in ops
    assert torch._C._len_torch_dispatch_stack() == 0


def test_lint_sees_what_the_script_uses(launch, tmp_path, monkeypatch):
    given: list[Any] = []

    def lint(*arguments: Any, **options: Any) -> list[Finding]:
        given.append((*arguments, options))
        return []

    monkeypatch.setattr(stage, "lint", lint)
    launch(TRAIN, "fp32", step_limit=2, watcher=stage.ProfileWatcher(request(tmp_path, "profile")))
    ((modules, optimizers, options),) = given
    assert [type(module) for module in modules] == [nn.Sequential]
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.SGD]
    assert str(options["policy"]) == UNDER and options["facts"].type == "cpu"
    assert options["scaler"].is_enabled()  # the policy brings one


def test_zero_gradients_are_counted_by_layer(launch, tmp_path):
    source = TRAIN.replace(
        "optimizer.step()", "net[0].weight.grad[:4] = net[0].bias.grad[:20] = 0\n    optimizer.step()"
    )
    launch(source, "fp32", step_limit=2, watcher=stage.StageWatcher(request(tmp_path, "profile")))
    first, _ = lines(tmp_path, "step")
    weights = 8 * 32
    zeros, total = first["zeros"]["0"]
    assert total == weights + 32 and 4 * 8 + 20 <= zeros < total
    assert first["zeros"]["2"] == [0, 33]


def test_underflow_is_what_fp32_does_not_have():
    steps = [
        {"step": n, "loss": "NaN", "applied": False, "scale": 4.0, "zeros": {"a": [30, 40], "b": [1, 4]}}
        for n in (1, 2)
    ]
    first, second = doctor._diagnosed(steps, [{"step": 1, "zeros": {"a": [10, 40], "b": [2, 4]}}])
    assert first.underflow == {"a": 0.5, "b": 0.0}
    assert math.isnan(first.loss) and first.scale == 4.0
    assert second.underflow == {}  # of this step FP32's share is not known


def test_the_sessions_own_sums_are_no_ops_of_the_script(launch, tmp_path):
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    class Watcher(stage.StageWatcher):
        def opened(self, session):
            super().opened(session)
            self.mode = Recorder()
            self.mode.__enter__()

        def closed(self):
            self.mode.__exit__(None, None, None)

    launch(TRAIN, "fp32", step_limit=2, watcher=Watcher(request(tmp_path, "profile")))
    assert "addmm.default" in seen and "mul.Tensor" in seen
    ours = ("norm", "stack", "eq.", "sum.default")  # of gradients, of losses, of zeros; the loss as a sum
    assert not [name for name in seen if any(part in name for part in ours)]


def test_a_failure_of_ours_is_a_note_and_the_script_goes_on(launch, tmp_path, monkeypatch, capfd):
    def lint(*arguments: Any, **options: Any) -> list[Finding]:
        raise LookupError("of ours")

    monkeypatch.setattr(stage, "lint", lint)
    monkeypatch.setattr(stage, "OpObserver", lint)
    ran = launch(TRAIN, "fp32", step_limit=3, watcher=stage.ProfileWatcher(request(tmp_path, "profile")))
    assert ran.run.steps == 3 and ran.run.outcome == "step limit"
    notes = [line["text"] for line in lines(tmp_path, "note")]
    assert notes == [
        "the profile could not start: LookupError: of ours",
        "the lint failed and was left out: LookupError: of ours",
    ]


def test_a_script_with_its_own_mode_keeps_it(launch, tmp_path):
    source = TRAIN.replace(
        "for step",
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n    net(x)\n"
        "torch.save({'flops': counter.get_total_flops()}, 'out.pt')\nfor step",
    )
    ran = launch(source, "fp32", step_limit=2, watcher=stage.ProfileWatcher(request(tmp_path, "profile")))
    assert ran.out["flops"] == 2 * 64 * (8 * 32 + 32) and ran.run.steps == 2
    *_, profile = lines(tmp_path, "profile")
    records = doctor.Profile.from_json(profile["profile"]).records.values()
    assert {record.place.phase for record in records} >= {"forward", "backward"}  # ours is still there after theirs


def examined(launch: Any, folder: Path, remedy: Remedy) -> set[str]:
    folder.mkdir()
    asked = replace(request(folder, "examine"), remedy=remedy.to_json())
    launch(OVERFLOW, UNDER, step_limit=1, watcher=stage.ExamineWatcher(asked))
    return {item["code"] for line in lines(folder, "findings") for item in line["findings"]}


def test_an_island_is_put_under_the_script(launch, tmp_path):
    assert "HS101" in examined(launch, tmp_path / "without", Remedy())
    assert "HS101" not in examined(
        launch, tmp_path / "with", Remedy(islands=("0", "2"))
    )  # "2" would round what "0" gives
    assert not lines(tmp_path / "with", "not tried")


@pytest.mark.parametrize(
    ("remedy", "why"),
    [
        (Remedy(islands=("nowhere",)), "no module is named nowhere"),
        (Remedy(loss_scale=2.0), "step on scaled gradients"),
    ],
)
def test_a_remedy_that_cannot_be_put_under_the_script_is_not_tried(launch, tmp_path, remedy, why):
    assert "HS101" in examined(launch, tmp_path / "with", remedy)
    (line,) = lines(tmp_path / "with", "not tried")
    assert why in line["why"]


def test_a_forked_child_writes_nothing_and_sees_nothing(tmp_path):
    watcher = stage.StageWatcher(request(tmp_path, "examine"))
    handler = signal.getsignal(signal.SIGTERM)

    class Mode(TorchDispatchMode):
        pass

    mode = Mode()
    mode.__enter__()
    try:
        watcher.forget()
        assert torch._C._len_torch_dispatch_stack() == 0
        watcher.note("from a worker")
        assert not (tmp_path / "lines.jsonl").exists()
    finally:
        signal.signal(signal.SIGTERM, handler)
        torch.utils._python_dispatch._push_mode(mode)
        mode.__exit__(None, None, None)


# ---------------------------------------------------------------- a stage's process


def run_python(tmp_path: Path, source: str, **options: Any) -> tuple[child.Ended, list[dict[str, Any]]]:
    script = tmp_path / "process.py"
    script.write_text(
        "import json, os, sys, time\n"
        "file = open(sys.argv[1], 'a')\n"
        "def say(text):\n    file.write(text); file.flush()\n" + textwrap.dedent(source)
    )
    got: list[dict[str, Any]] = []
    path = tmp_path / "lines.jsonl"
    command = [sys.executable, str(script), str(path)]
    given = {"environment": {}, "timeout": 60.0} | options
    return run_stage(command, path, tmp_path / "log", got.append, **given), got


def test_lines_come_one_by_one_and_a_cut_one_is_left_out(tmp_path):
    ended, got = run_python(
        tmp_path,
        """
        say('{"kind": "a"}\\nnot json\\n[1]\\n{"kind": "b"')
        time.sleep(0.3)
        say('}\\n{"kind": "end"}\\n{"kind": "cu')
        """,
    )
    assert [line["kind"] for line in got] == ["a", "b", "end"]
    assert ended.failure is None and ended.exit_code == 0


@pytest.mark.parametrize(
    ("source", "failure"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL (memory ran out?)"),
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        ("print('last words'); os._exit(7)", "ended without a last word, exit code 7"),
        ("raise MemoryError('no more')", "ended without a last word, exit code 1: MemoryError: no more"),
    ],
)
def test_a_process_that_dies_is_accounted_for(tmp_path, source, failure):
    ended, got = run_python(tmp_path, """say('{"kind": "a"}\\n')\n""" + source)
    assert [line["kind"] for line in got] == ["a"]
    assert ended.failure is not None and ended.failure.startswith(failure)


def test_a_process_past_its_time_is_told_and_then_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.5)
    waited: list[float] = []
    source = """
        import signal
        signal.signal(signal.SIGTERM, lambda *_: say('{"kind": "told"}\\n'))
        say('{"kind": "a"}\\n')
        while True: time.sleep(0.05)
        """
    ended, got = run_python(tmp_path, source, timeout=1.0, on_wait=waited.append)
    assert [line["kind"] for line in got] == ["a", "told"]
    assert ended.failure == "was stopped at its time limit" and ended.exit_code == -9
    assert waited == sorted(waited) and waited[-1] > 1.0


def test_a_process_that_hangs_after_its_last_line_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "LEAVING_SECONDS", 0.2)
    started = time.monotonic()
    ended, _ = run_python(tmp_path, """say('{"kind": "end"}\\n')\ntime.sleep(50)""")
    assert ended.failure is None and time.monotonic() - started < 40


def test_a_finding_that_was_taken_back_is_not_in_the_diagnosis(tmp_path):
    told: list[Told] = []
    work = doctor._Doctor(request(tmp_path, "examine"), tmp_path, 1.0, [], told.append)
    first = Finding("HS101", None, "first", "c", "r", Severity.ERROR)
    second = Finding("HS206", None, "second", "c", "r", Severity.NOTE)
    learnt = work._stages["examine"] = doctor._Learnt()
    encoded = [doctor.finding_text.to_json(item) for item in (first, second)]
    work._take(learnt, {"kind": "finding", "finding": encoded[0]}, quiet=False)
    work._take(learnt, {"kind": "finding", "finding": {"code": "HS000"}}, quiet=False)
    work._take(learnt, {"kind": "findings", "findings": encoded}, quiet=False)
    work._take(learnt, {"kind": "findings", "findings": [encoded[1]]}, quiet=False)
    assert work._all() == [second]
    assert [item.finding for item in told if item.kind == "finding"] == [first, second]
    assert [item.text for item in told if item.kind == "note"] == [
        "a line of a stage could not be read: KeyError: 'place'"
    ]

"""Real processes throughout: a small launcher stands in for the real one and writes real records."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.compare import (
    Event,
    Run,
    RunEnded,
    RunResult,
    RunStarted,
    ScheduleError,
    StepSeen,
    plan_runs,
    run_all,
)
from halfstep.record import read

RECORD_MODULE = importlib.util.find_spec("halfstep.record").origin  # type: ignore[union-attr]  # it is there

# Takes the arguments that `halfstep run` takes; the "script" is a word that says what to do. The record
# module is loaded by its path, without the package, so that no process waits for torch.
LAUNCHER = f"""
import argparse, importlib.util, json, os, signal, subprocess, sys, time
spec = importlib.util.spec_from_file_location("record", {RECORD_MODULE!r})
record = sys.modules["record"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)

parser = argparse.ArgumentParser()
parser.add_argument("--policy"); parser.add_argument("--seed-index", type=int)
parser.add_argument("--record")
parser.add_argument("--steps", type=int, default=4); parser.add_argument("--quiet", action="store_true")
parser.add_argument("script"); parser.add_argument("arguments", nargs="*")
args = parser.parse_args()
what = args.script if args.policy == "bf16-mixed" else "train"

print("running", *sys.argv[1:], flush=True)
print("stdin", repr(sys.stdin.read()), flush=True)
if what == "no-record":
    print("SomeError: cannot even start", file=sys.stderr)
    sys.exit(3)
writer = record.RecordWriter(args.record, record.Header(
    str(time.time()), (args.script, *args.arguments), args.policy, args.policy, "", args.seed_index, {{}}))

def step(number, loss=1.0):
    writer.write(record.Step(number, 0, loss, None if number == 1 else 0.01, True, None, None, 0, None))

if what == "forever":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    step(1)
    with open(args.record + ".pids", "w") as file:
        file.write(f"{{os.getpid()}} {{child.pid}}")
    try:
        os.rename(args.record + ".pids", args.record + ".ready")
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.4)  # a script that saves its work first
        writer.write(record.End("interrupted", 130, 1.0, 0))
        child.kill()
        sys.exit(130)
if what == "halting":  # each line comes in two pieces
    for number in range(1, args.steps + 1):
        with open(args.record, "a") as file:
            fields = {{"kind": "step", "step": number, "optimizer": 1, "loss": "Infinity", "seconds": None}}
            line = json.dumps(fields) + chr(10)
            file.write(line[:30]); file.flush(); time.sleep(0.15)
            file.write(line[30:]); file.flush(); time.sleep(0.15)
    sys.exit(0)
for number in range(1, args.steps + 1):
    if what == "crash" and number == 3:
        writer.write(record.End("error", 1, 0.1, 0, "ValueError: bad batch"))
        raise ValueError("bad batch")
    if what == "kill" and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    step(number, float("nan") if number == 2 else 1.0 / number)
writer.write(record.End("finished", 0, 0.1, 0))
"""


@pytest.fixture
def launcher(tmp_path: Path) -> tuple[str, ...]:
    path = tmp_path / "launcher.py"
    path.write_text(LAUNCHER)
    return (sys.executable, str(path))


@given(st.integers(1, 6), st.integers(1, 9))
def test_every_policy_takes_every_place_in_turn(count: int, seeds: int) -> None:
    policies = [f"p{i}" for i in range(count)]
    runs = plan_runs(policies, seeds)
    assert sorted(runs, key=str) == sorted((Run(p, k) for p in policies for k in range(seeds)), key=str)
    for seed in range(seeds):
        block = runs[seed * count : (seed + 1) * count]
        assert [run.seed for run in block] == [seed] * count
        assert [run.policy for run in block] == [policies[(seed + place) % count] for place in range(count)]


@pytest.mark.parametrize(("policies", "seeds"), [([], 1), (["fp32", "fp32"], 1), (["fp32"], 0)])
def test_a_plan_of_nothing_is_refused(policies: list[str], seeds: int) -> None:
    with pytest.raises(ValueError, match=r"policies must be named|at least 1 seed"):
        plan_runs(policies, seeds)


def test_runs_all_in_rotated_order_and_tells_of_it(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    folder, events = tmp_path / "new" / "folder", list[Event]()
    script = ["{seed}.py", "--seed", "{seed}", "--out=o{seed}/{seed}", "{other}"]
    results = run_all(
        ["train", *script], ["fp32", "bf16-mixed"], 2, 5, folder, on_event=events.append, launcher=launcher
    )
    order = [Run("fp32", 0), Run("bf16-mixed", 0), Run("bf16-mixed", 1), Run("fp32", 1)]
    assert [result.run for result in results] == order
    assert all((result.exit_code, result.failure, result.interrupted) == (0, None, False) for result in results)
    for result in results:
        assert result.record == folder / f"{result.run.policy}.seed{result.run.seed}.jsonl"
        record = read(result.record)
        seed = str(result.run.seed)
        assert record.header.command == (
            "train",
            f"{seed}.py",
            "--seed",
            seed,
            f"--out=o{seed}/{seed}",
            "{other}",
        )
        assert (record.header.policy_requested, record.header.seed) == (result.run.policy, result.run.seed)
        assert len(record.steps) == 5
        first, second = result.log_tail.splitlines()
        assert first == (
            f"running --policy {result.run.policy} --seed-index {seed} --record {result.record} --steps 5 "
            "--quiet -- " + " ".join(record.header.command)
        )
        assert second == "stdin ''"
    assert [event for event in events if isinstance(event, RunStarted)] == [
        RunStarted(run, number, 4) for number, run in enumerate(order, start=1)
    ]
    assert [event for event in events if isinstance(event, RunEnded)] == [RunEnded(run, 0) for run in order]
    seen = [event for event in events if isinstance(event, StepSeen)]
    assert [(event.run, event.step) for event in seen] == [(run, number) for run in order for number in range(1, 6)]
    assert seen[0] == StepSeen(order[0], 1, 0, 1.0, None, tracked=False)
    assert seen[1].loss is not None and seen[1].loss != seen[1].loss  # a NaN arrives as one
    assert seen[2].seconds == 0.01
    starts_and_ends = [event for event in events if not isinstance(event, StepSeen)]
    assert [type(event) for event in starts_and_ends] == [RunStarted, RunEnded] * 4


def test_the_script_itself_is_not_a_template(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    (result,) = run_all(["{seed}.py"], ["fp32"], 1, None, tmp_path / "runs", launcher=launcher)
    assert result.record is not None
    record = read(result.record)
    assert record.header.command == ("{seed}.py",)
    assert len(record.steps) == 4  # without a limit, as many as the script makes


@pytest.mark.parametrize(
    ("what", "exit_code", "steps", "failure"),
    [
        ("crash", 1, 2, "exit code 1: ValueError: bad batch"),
        ("kill", -9, 2, "killed by SIGKILL (memory ran out?)"),
        ("no-record", 3, None, "exit code 3, no record written: SomeError: cannot even start"),
    ],
)
def test_a_run_that_fails_is_a_result(
    tmp_path: Path, launcher: tuple[str, ...], what: str, exit_code: int, steps: int | None, failure: str
) -> None:
    events = list[Event]()
    results = run_all(
        [what], ["bf16-mixed", "fp32"], 1, None, tmp_path / "runs", on_event=events.append, launcher=launcher
    )
    bad, good = results
    assert (bad.run.policy, bad.exit_code, bad.failure) == ("bf16-mixed", exit_code, failure)
    assert (good.run.policy, good.exit_code, good.failure) == ("fp32", 0, None)
    assert RunEnded(bad.run, exit_code) in events
    if steps is None:
        assert bad.record is None
    else:
        assert bad.record is not None and len(read(bad.record).steps) == steps


def test_each_step_is_told_once_and_whole(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    events = list[Event]()
    run_all(["halting"], ["bf16-mixed"], 1, 5, tmp_path / "runs", on_event=events.append, launcher=launcher)
    seen = [event for event in events if isinstance(event, StepSeen)]
    assert [event.step for event in seen] == [1, 2, 3, 4, 5]
    assert (seen[0].optimizer, seen[0].loss, seen[0].seconds) == (1, float("inf"), None)


def test_no_run_can_read_our_input(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    ours, (reading, writing) = os.dup(0), os.pipe()
    os.write(writing, b"typed by the user\n")
    os.close(writing)
    os.dup2(reading, 0)
    try:
        (result,) = run_all(["train"], ["fp32"], 1, 1, tmp_path / "runs", launcher=launcher)
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(reading)
    assert result.log_tail.endswith("stdin ''")


def test_no_record_at_all_is_an_error(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    with pytest.raises(
        ScheduleError, match=r"none of the 2 runs wrote a record; the first, bf16-mixed, ended with exit"
    ):
        run_all(["no-record"], ["bf16-mixed"], 2, None, tmp_path / "runs", launcher=launcher)


def test_old_records_are_not_taken_for_new_ones(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    old = tmp_path / "fp32.seed1.jsonl"
    old.write_text("{}\n")
    with pytest.raises(ScheduleError, match=r"fp32\.seed1\.jsonl: is there already.*Choose another folder"):
        run_all(["train"], ["fp32"], 2, None, tmp_path, launcher=launcher)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32.seed1.jsonl", "launcher.py"]


def test_an_unusable_folder_is_named(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ScheduleError, match=r"file/runs: cannot be made: Not a directory"):
        run_all(["train"], ["fp32"], 1, None, tmp_path / "file" / "runs", launcher=launcher)


def test_an_exception_in_the_listener_leaves_no_process_behind(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    pids = tmp_path / "runs" / "bf16-mixed.seed0.jsonl.ready"

    def listener(event: Event) -> None:
        if isinstance(event, StepSeen):
            await_file(pids)
            assert alive(pids) == 2  # steps are told while the run lasts
            raise RuntimeError("display broke")

    with pytest.raises(RuntimeError, match="display broke"):
        run_all(["forever"], ["bf16-mixed"], 1, None, tmp_path / "runs", on_event=listener, launcher=launcher)
    assert_gone(pids)


STOPPABLE = """
import sys, types
package = sys.modules["halfstep"] = types.ModuleType("halfstep")  # without its __init__, which imports torch
source, folder, grace, *launcher = sys.argv[1:]
package.__path__ = [source]
from halfstep.compare import Interrupted, run_all

try:
    run_all(["forever"], ["fp32", "bf16-mixed"], 1, None, folder, launcher=launcher, grace=float(grace))
except Interrupted as stop:
    for result in stop.results:
        print(result.run.policy, result.exit_code, result.interrupted, result.record is not None)
"""


def stop_with(
    send: Callable[[int], None], grace: float, tmp_path: Path, launcher: tuple[str, ...]
) -> tuple[int, list[str]]:
    """Run two policies in another process, ``send`` it a signal in the second; its exit code and output."""
    source = str(Path(RECORD_MODULE or "").parent)
    program = [sys.executable, "-c", STOPPABLE, source, str(tmp_path / "runs"), str(grace), *launcher]
    process = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        await_file(tmp_path / "runs" / "bf16-mixed.seed0.jsonl.ready")
        send(process.pid)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert_gone(tmp_path / "runs" / "bf16-mixed.seed0.jsonl.ready")
    return process.returncode, output.splitlines()


def test_ctrl_c_lets_the_run_close_its_record(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    # A terminal's Ctrl-C reaches the whole process group.
    code, output = stop_with(lambda pid: os.killpg(pid, signal.SIGINT), 20, tmp_path, launcher)
    assert (code, output) == (0, ["fp32 0 False True", "bf16-mixed 130 True True"])
    record = read(tmp_path / "runs" / "bf16-mixed.seed0.jsonl")
    assert record.end is not None and record.end.outcome == "interrupted"


def test_a_run_that_does_not_hear_the_interrupt_is_terminated(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    code, output = stop_with(lambda pid: os.kill(pid, signal.SIGINT), 0.3, tmp_path, launcher)
    assert (code, output) == (0, ["fp32 0 False True", f"bf16-mixed {-signal.SIGTERM} True True"])


def test_sigterm_takes_the_run_along(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    code, output = stop_with(lambda pid: os.kill(pid, signal.SIGTERM), 20, tmp_path, launcher)
    assert (code, output) == (128 + signal.SIGTERM, [])


def test_the_callers_signal_handler_is_restored(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    def own(signum: int, frame: object) -> None:
        pass

    before = signal.getsignal(signal.SIGTERM)
    try:
        for number, handler in enumerate((signal.SIG_DFL, own)):
            signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]  # mypy joins the two to object
            run_all(["train"], ["fp32"], 1, 1, tmp_path / f"runs{number}", launcher=launcher)
            assert signal.getsignal(signal.SIGTERM) == handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_tail_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff\n" + b"".join(b"line %d\n" % i for i in range(10_000)) + b"\n\n")
    result = RunResult(Run("fp32", 0), None, log, 1)
    assert result.log_tail.splitlines() == [f"line {i}" for i in range(9980, 10_000)]
    assert result.failure == "exit code 1, no record written: line 9999"
    assert RunResult(Run("fp32", 0), None, tmp_path / "none", 0).failure == "exit code 0, no record written"
    assert RunResult(Run("fp32", 0), log, log, -250).failure == "killed by signal 250"


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def alive(pids: Path) -> int:
    """How many of the processes named in a file run; a zombie, waiting for its parent to look, does not."""
    running = 0
    for pid in map(int, pids.read_text().split()):
        with suppress(psutil.NoSuchProcess):
            running += psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return running


def assert_gone(pids: Path) -> None:
    deadline = time.monotonic() + 10
    while alive(pids):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.02)

"""What the commands print and leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfstep import hardware, record
from halfstep.cli import app
from halfstep.cli.demo import demo_policies
from halfstep.policy import choose

COMMANDS = ["check", "run", "compare", "doctor", "explain", "report", "demo"]


def test_check_names_formats_policy_and_reason(cli):
    facts = hardware.detect()
    policy, reason = choose(facts)
    shown = cli("check")
    assert shown.code == 0
    plain = " ".join(shown.out.split())
    assert f"policy {policy}" in plain and " ".join(reason.split()) in plain
    document = json.loads(cli("check", "--json").out)
    assert (document["policy"], document["reason"]) == (str(policy), reason)
    assert set(document["device"]["formats"]) == {"fp32", "tf32", "bf16", "fp16", "fp8"}


def test_run_announces_policy_keeps_stdout_and_summarises(cli):
    ended = cli("run", "--policy", "bf16-mixed", "--record", "r.jsonl", "train.py", "7")
    assert ended.code == 0
    assert ended.out == "trained\n"
    first, *_, last = ended.err.splitlines()
    assert first.startswith("halfstep: policy bf16-mixed: as asked")
    assert re.match(r"halfstep: finished: 7 optimizer steps in .* under bf16-mixed, last loss .*r\.jsonl", last)
    assert len(record.read("r.jsonl").steps) == 7


def test_run_json_comes_after_the_scripts_output(cli):
    ended = cli("run", "--policy", "fp32", "--json", "--quiet", "train.py", "4")
    first, document = ended.out.splitlines()
    assert first == "trained" and ended.err == ""
    summary = json.loads(document)
    assert summary["steps"] == 4 and summary["policy"] == "fp32" and Path(summary["record"]).exists()


def test_run_quiet_passes_the_scripts_options_through(cli):
    Path("show.py").write_text("import sys; print(sys.argv[1:]); sys.exit(5)")
    ended = cli("run", "--quiet", "--no-record", "show.py", "--policy", "mine", "--", "-x")
    assert ended.code == 5
    assert ended.out == "['--policy', 'mine', '--', '-x']\n"


def test_compare_runs_records_and_reports(cli):
    ended = cli("compare", "--policies", "fp32,bf16-mixed", "--seeds", "2", "--output", "c", "train.py", "24")
    assert ended.code == 0, ended.err
    names = {path.name for path in Path("c").iterdir()}
    runs = {f"{policy}.seed{seed}" for policy in ("fp32", "bf16-mixed") for seed in (0, 1)}
    assert names == {f"{run}.{ending}" for run in runs for ending in ("jsonl", "log")} | {"report.html"}
    assert all(Path("c", f"{run}.log").read_text() == "trained\n" for run in runs)
    losses = {run: record.read(Path("c", f"{run}.jsonl")).losses for run in runs}
    assert losses["fp32.seed0"] != losses["fp32.seed1"]
    # the same seed starts from the same weights and sees the same data under every policy
    assert losses["bf16-mixed.seed1"][0] == pytest.approx(losses["fp32.seed1"][0], rel=1e-2)
    assert "bf16-mixed" in ended.out and "fp32" in ended.out
    assert "[4/4] fp32, seed 1: step 24" in ended.err
    again = cli("compare", "--policies", "fp32,bf16-mixed", "--output", "c", "train.py", "24")
    assert again.code == 3 and "never overwritten" in again.err
    document = json.loads(cli("report", "c", "--output", "again.html", "--json").out)
    assert [policy["policy"] for policy in document["policies"]] == ["fp32", "bf16-mixed"]


def test_compare_shows_a_crash_as_a_result(cli):
    Path("fragile.py").write_text(
        Path("train.py")
        .read_text()
        .replace(
            "loss.backward()",
            "assert net[0](x).dtype == net[0](x).double().float().dtype and not CRASH(net, x)\n    loss.backward()",
        )
        .replace(
            "torch.manual_seed(0)",
            "torch.manual_seed(0)\n"
            "def CRASH(net, x):\n    seen = []\n"
            "    h = net[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))\n"
            "    net(x)\n    h.remove()\n    return seen[0] != torch.float32",
        )
    )
    ended = cli(
        "compare", "--policies", "fp32,bf16-mixed", "--seeds", "1", "--output", "c", "--json", "fragile.py", "9"
    )
    assert ended.code == 1
    comparison = json.loads(ended.out)
    baseline, crashed = comparison["policies"]
    assert baseline["outcomes"] == ["finished"] and crashed["outcomes"] == ["crashed"]
    assert "AssertionError" in " ".join(crashed["errors"])
    assert Path("c/report.html").exists()


def test_interrupted_comparison_reports_what_is_there(tmp_path, cli):
    Path("slow.py").write_text(
        Path("train.py").read_text().replace("loss.backward()", "loss.backward()\n    import time; time.sleep(0.05)")
    )
    command = [
        sys.executable,
        "-m",
        "halfstep",
        "compare",
        "--policies",
        "fp32,bf16-mixed",
        "--output",
        "c",
        "slow.py",
        "10000",
    ]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wanted = Path("c/fp32.seed0.jsonl")
    try:
        for _ in range(600):
            if wanted.exists() and wanted.read_text().count('"kind": "step"') > 5:
                break
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        out, err = running.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, err
    assert "interrupted" in err and "fp32" in out and "Traceback" not in err
    left = record.read(wanted)
    assert left.end is not None and left.end.outcome == "interrupted"
    assert Path("c/report.html").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_and_knows_json(command):
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200, env={"NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert "--json" in shown.output
    assert f"halfstep {command}" in shown.output.rpartition("Examples:")[2]


def test_demo_says_what_it_shows_where_bf16_is_not_native():
    def facts(bf16: hardware.Support, fp16: hardware.Support) -> hardware.DeviceFacts:
        formats = {"bf16": hardware.FormatSupport(bf16, "a"), "fp16": hardware.FormatSupport(fp16, "b")}
        return hardware.DeviceFacts("cpu", "x", 0, formats, "")

    assert demo_policies(facts("native", "slow"))[0] == ["fp32", "bf16-mixed", "bf16-master"]
    policies, why = demo_policies(facts("emulated", "native"))
    assert policies == ["fp32", "fp16-mixed"] and "fp16 with loss scaling" in why
    policies, why = demo_policies(facts("emulated", "slow"))
    assert policies == ["fp32", "bf16-mixed:emulate"] and "gain no time here" in why


def test_every_command_is_tested_for_its_help():
    registered = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert registered == set(COMMANDS)

"""Bad input: one clear line that says what, where and what to do; the right exit code; nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

USAGE, FAILED = 2, 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--policy", "bf17-mixed", "train.py"], "unknown policy 'bf17-mixed'. Did you mean 'bf16-mixed'?"),
        (["run", "nothing.py"], "no script nothing.py here"),
        (["run", "."], ". is a folder; name the script in it"),
        (["run", "--device", "tpu", "train.py"], "unknown device 'tpu'; known: cpu, cuda, mps, xpu"),
        (["check", "--device", "tpu"], "unknown device 'tpu'"),
        (["compare", "--policies", "fp32,fp64", "train.py"], "unknown policy 'fp64'"),
        (["compare", "--policies", "fp32", "train.py"], "needs two different policies"),
        (["compare", "nothing.py"], "no script nothing.py here"),
        (["report", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
        (["report", "."], "no run records (*.jsonl) in this folder"),
        (["report", "train.py"], "train.py:1: is not JSON"),
    ],
)
def test_one_line_and_exit_code_2(cli, arguments, message):
    before = sorted(Path().iterdir())
    ended = cli(*arguments)
    assert ended.code == USAGE
    (line,) = [line for line in ended.err.splitlines() if "error" in line]
    assert line.startswith("halfstep: error: ") and message in line
    assert "Traceback" not in ended.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(cli):
    ended = cli("run", "--device", "cuda", "train.py")
    assert ended.code == USAGE
    assert "no cuda device" in ended.err and "this machine has: cpu" in ended.err


def test_syntax_error_names_file_and_line(cli):
    Path("broken.py").write_text("x = 1\nif x\n    pass\n")
    ended = cli("run", "broken.py")
    assert ended.code == USAGE
    assert "broken.py:2: SyntaxError: expected ':'" in ended.err
    assert not Path("halfstep-runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; the run ended before its header was written"),
        ('{"kind": "header", "sch', "ends inside its first line"),
        ('{"kind": "step"}\n', "step line lacks or has unknown fields"),
        ("[1]\n", "is not a line of a run record"),
        ('{"kind": "header", "schema": 99}\n', "record schema 99, this halfstep reads 1"),
    ],
)
def test_records_that_are_none(cli, content, message):
    Path("r.jsonl").write_text(content)
    ended = cli("report", "r.jsonl")
    assert ended.code == USAGE
    assert f"r.jsonl{':1' if 'header was' not in message and 'ends inside' not in message else ''}: " in ended.err
    assert message in ended.err
    assert not Path("report.html").exists()


def test_truncated_record_still_reports(cli):
    assert cli("run", "--policy", "fp32", "--record", "r.jsonl", "train.py", "6").code == 0
    whole = Path("r.jsonl").read_text()
    Path("r.jsonl").write_text(whole[: whole.index('"kind": "end"')])
    ended = cli("report", "r.jsonl")
    assert ended.code == 0
    assert "fp32" in ended.out
    assert Path("report.html").stat().st_size > 1000


def test_unwritable_output(cli):
    Path("occupied").write_text("a file where a folder is wanted")
    ended = cli("run", "--record", "occupied/r.jsonl", "train.py")
    assert ended.code == FAILED
    assert "occupied" in ended.err and "Traceback" not in ended.err and "trained" not in ended.out
    ended = cli("compare", "--output", "occupied", "--policies", "fp32,bf16-mixed", "train.py")
    assert ended.code == FAILED
    assert "occupied" in ended.err and "trained" not in ended.out
    cli("run", "--quiet", "--policy", "fp32", "--record", "r.jsonl", "train.py", "4")
    ended = cli("report", "--output", "occupied/report.html", "r.jsonl")
    assert ended.code == FAILED and "occupied" in ended.err


def test_a_record_is_never_overwritten(cli):
    Path("r.jsonl").write_text("precious")
    ended = cli("run", "--record", "r.jsonl", "train.py")
    assert ended.code == FAILED and "r.jsonl" in ended.err
    assert Path("r.jsonl").read_text() == "precious"


def test_script_that_never_trains_is_told_so(cli):
    Path("idle.py").write_text("print('hello')")
    ended = cli("run", "--no-record", "--policy", "bf16-mixed", "idle.py")
    assert ended.code == 0 and ended.out == "hello\n"
    assert "backward was never called" in ended.err


def test_baseline_that_no_record_is_of(cli):
    assert cli("run", "--policy", "fp32", "--record", "r.jsonl", "train.py", "4").code == 0
    ended = cli("report", "--baseline", "bogus", "r.jsonl")
    assert ended.code == USAGE and "no run of baseline 'bogus' among these records; there are: fp32" in ended.err
    assert not Path("report.html").exists()


def test_report_into_a_folder_names_what_was_asked_for(cli):
    cli("run", "--policy", "fp32", "--record", "r.jsonl", "train.py", "4")
    Path("folder").mkdir()
    ended = cli("report", "--output", "folder", "r.jsonl")
    assert ended.code == FAILED and "folder: is a folder; name a file in it" in ended.err
    ended = cli("report", "--output", "nowhere/report.html", "r.jsonl")
    assert ended.code == FAILED and "nowhere/report.html: the report cannot be written here" in ended.err
    assert list(Path("folder").iterdir()) == []


def test_summary_of_a_nan_run_is_strict_json(cli):
    Path("nan.py").write_text(
        Path("train.py").read_text().replace(".square().mean()\n    loss", ".mean() * float('nan')\n    loss")
    )
    ended = cli("run", "--json", "--quiet", "--no-record", "--policy", "fp32", "nan.py", "4")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    assert json.loads(ended.out.splitlines()[-1], parse_constant=refuse)["last_loss"] == "NaN"

"""``halfstep doctor``: what it prints, writes and ends with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from halfstep.cli import doctor as command
from halfstep.doctor import diagnosis as documents
from halfstep.doctor.diagnosis import Diagnosis
from halfstep.doctor.finding import Finding, Severity
from halfstep.launch import doctor as launched
from halfstep.launch.doctor import InterruptedDiagnosisError, Told

BLANK = Diagnosis(("train.py",), "auto", "bf16-mixed", "because", "2026-01-01T00:00:00+00:00", {"torch": "2"})


def finding(severity: Severity) -> Finding:
    return Finding("HS101", None, "what is wrong", "what follows", "what helps", severity)


def test_an_overflow_ends_in_exit_code_1_a_document_and_a_page(cli):
    source = Path("train.py").read_text()
    Path("train.py").write_text(source.replace("x = ", "net[0].weight.data.mul_(1e4)\nx = 100 * ", 1))
    ended = cli(
        "doctor",
        "--policy",
        "fp16-mixed",
        "--steps",
        "1",
        "--output",
        "out",
        "--no-remedies",
        "--json",
        "train.py",
        "9",
    )
    assert ended.code == 1, ended.err
    document = json.loads(ended.out)
    overflow = [item for item in document["findings"] if item["code"] == "HS101" and item["severity"] == "error"]
    assert overflow and overflow[0]["place"]["op"] == "addmm" and overflow[0]["place"]["line"] == 14
    assert json.loads(Path("out/doctor.json").read_text()) == document
    assert "HS101" in Path("out/doctor.html").read_text()
    streamed = [line for line in ended.err.splitlines() if line.startswith("halfstep: HS101 error: ")]
    assert len(streamed) == 1 and streamed[0].endswith("train.py:14]")
    assert document["command"] == ["train.py", "9"] and document["policy"] == "fp16-mixed"
    # The report command reads the document or its folder, and finds the same.
    again = cli("report", "out", "--output", "again.html")
    assert again.code == 0 and "HS101" in again.out
    assert "HS101" in Path("again.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "bf17-mixed", "train.py"], "unknown policy 'bf17-mixed'. Did you mean 'bf16-mixed'?"),
        (["nothing.py"], "no script nothing.py here"),
        (["--silence", "HS9*", "train.py"], "'HS9*' silences nothing: no code matches"),
        (["--silence", "HS101@", "train.py"], "names no place after '@'"),
        (["--device", "tpu", "train.py"], "unknown device 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli, arguments, message):
    ended = cli("doctor", *arguments)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("halfstep: error: ") and message in line
    assert sorted(path.name for path in Path().iterdir()) == ["train.py"]


def test_a_file_where_the_folder_should_be(cli):
    Path("occupied").write_text("precious")
    ended = cli("doctor", "--output", "occupied", "train.py")
    assert ended.code == 3 and "occupied" in ended.err and Path("occupied").read_text() == "precious"


def test_a_document_that_is_none(cli):
    Path("doctor.json").write_text('{"schema": 99}')
    ended = cli("report", "doctor.json")
    assert ended.code == 2 and "diagnosis schema 99, this halfstep reads 1" in ended.err
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("severities", "got_somewhere", "ranks", "code"),
    [
        ([], True, 1, 0),
        ([Severity.NOTE], True, 1, 0),
        ([Severity.NOTE, Severity.WARNING], True, 1, 1),
        ([Severity.ERROR], False, 1, 1),
        ([], False, 1, 3),
        ([Severity.ERROR], True, 2, 0),
        ([], False, 2, 3),
    ],
)
def test_exit_codes(cli, monkeypatch, severities, got_somewhere, ranks, code):
    """Stages are left out here: what they find is given."""
    made: list[Path] = []

    def diagnose(script, arguments, policy, folder, *, tell, **options):
        folder.mkdir(parents=True)
        made.append(folder)
        tell(Told("note", "said on\nthe way"))
        return replace(BLANK, findings=tuple(map(finding, severities))), got_somewhere

    monkeypatch.setattr(launched, "diagnose", diagnose)
    if ranks > 1:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("RANK", "1")
    ended = cli("doctor", "--output", "out", "train.py")
    assert ended.code == code
    first, *_ = ended.err.splitlines()
    assert first == ("halfstep: rank 1: note: said on the way" if ranks > 1 else "halfstep: note: said on the way")
    assert made == [Path("out.rank1" if ranks > 1 else "out")]
    assert len(documents.read(made[0] / "doctor.json").findings) == len(severities)
    assert cli("doctor", "--quiet", "--output", "other", "train.py").err == ""


def test_what_was_found_before_ctrl_c_is_written(cli, monkeypatch):
    def diagnose(script, arguments, policy, folder, **options):
        folder.mkdir(parents=True)
        raise InterruptedDiagnosisError(replace(BLANK, findings=(finding(Severity.ERROR),)))

    monkeypatch.setattr(launched, "diagnose", diagnose)
    assert cli("doctor", "--output", "out", "train.py").code == 130
    assert documents.read("out/doctor.json").findings == (finding(Severity.ERROR),)


def test_a_finding_is_told_in_one_line():
    long = replace(finding(Severity.WARNING), what="one\n  two")
    assert command._line(Told("finding", "", long)) == "HS101 warning: one two"


def test_a_page_that_fails_does_not_take_the_document_with_it(tmp_path, monkeypatch, capsys):
    from halfstep.report import diagnosis as page

    def write(path: Path, diagnosis: Diagnosis) -> Path:
        raise ZeroDivisionError("in a figure")

    monkeypatch.setattr(page, "write", write)
    command.conclude(BLANK, tmp_path, as_json=False)
    assert documents.read(tmp_path / "doctor.json") == BLANK
    assert "doctor.html could not be written: ZeroDivisionError: in a figure" in capsys.readouterr().err

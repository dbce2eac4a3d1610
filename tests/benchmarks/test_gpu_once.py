"""The program for fifteen minutes of a GPU: sections end without each other, nothing that was learnt is lost."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "benchmarks" / "gpu_once.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package of sections, without those that need torch."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    package = importlib.import_module("gpu")
    for name in ("plan", "records", "running"):
        importlib.import_module(f"gpu.{name}")
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu"]:
        del sys.modules[name]  # too common a name to be left behind


def program(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


# --- the whole program ------------------------------------------------------------------------------------------------


def test_sections_run_on_a_cpu_and_leave_lines_a_document_and_a_summary(gpu: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = program("--tiny", "--device", "cpu", "--only", "gemm,seven_billion", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((out / "gpu-all.json").read_text())
    assert document == json.loads(json.dumps(gpu.records.document(gpu.records.read(out / "gpu_once.jsonl"))))
    assert {name: section["status"] for name, section in document["sections"].items()} == {
        "gemm": "ok",
        "seven_billion": "ok",
    }
    assert (document["run"]["tiny"], document["run"]["device"], document["crashes"]) == (True, "cpu", [])
    assert {"bf16 256", "fp8 256"} < document["measured"]["gemm"].keys()
    fits = {name: row["fits"] for name, row in document["measured"]["seven_billion"].items()}
    assert len(fits) == 9 and all(fits.values())
    summary = (out / "summary.txt").read_text()
    assert summary.startswith("0 of 0 checks hold\ngemm:") and summary.rstrip() in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "gem"), "there is no section gem; there are environment, numerics"),
        (("--skip", "speed"), "there is no section speed"),
        (("--only", "gemm", "--skip", "gemm"), "no section is left"),
        (("--set", "both"), "invalid choice: 'both'"),
        (("--budget", "0"), "--budget is seconds in all, not 0"),
        (("--budget", "long"), "invalid float value"),
        (("--out", str(PROGRAM)), "--out is a folder"),
        (("--device", "cpu"), "add --tiny"),
    ],
)
def test_wrong_arguments_end_before_anything_runs(arguments: Sequence[str], said: str, tmp_path: Path) -> None:
    device = () if "--device" in arguments else ("--device", "cpu", "--tiny")
    out = () if "--out" in arguments else ("--out", str(tmp_path / "out"))
    done = program(*device, *out, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2 and "no CUDA device here" in done.stderr and "--tiny --device cpu" in done.stderr


# --- sections, one at a time ------------------------------------------------------------------------------------------

#: What a section of these tests does, after it has written down that it began.
DEEDS = {
    "ends": "",
    "hangs": "import time; time.sleep(600)",
    "hangs and will not go": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
    "hangs with a child": "import subprocess; child = subprocess.Popen(['sleep', '600'])\n"
    "records.append(path, 'hangs with a child', 'child', 'measure', pid=child.pid)\nchild.wait()",
    "crashes": "raise RuntimeError('no')",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "cut while writing": "open(path, 'a').write('{\"section\": \"cut whi')",
}


def run(gpu: Any, out: Path, sections: Sequence[Any], budget: float = 60.0) -> dict[str, Any]:
    """Run sections that do what `DEEDS` says of their name."""

    def command(planned: Any, limit: float) -> list[str]:
        source = f"""
            import os
            from pathlib import Path
            from gpu import records
            path = Path({str(out / "gpu_once.jsonl")!r})
            records.append(path, {planned.name!r}, "began", "measure", limit={limit}, pid=os.getpid())
        """
        return [sys.executable, "-c", textwrap.dedent(source) + DEEDS[planned.name]]

    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    running = gpu.running.Run(out, "test", command, budget, environment)
    document: dict[str, Any] = running.sections(sections, {"started": "today"})
    assert document == json.loads((out / "gpu-test.json").read_text())
    return document


@pytest.mark.parametrize("how", ["hangs", "hangs and will not go", "hangs with a child"])
def test_a_section_that_is_killed_at_its_limit_loses_nothing_of_the_others(how: str, gpu: Any, tmp_path: Path) -> None:
    Planned = gpu.plan.Planned
    sections = [Planned(how, 6, "main"), Planned("ends", 600, "main")]
    document = run(gpu, tmp_path, sections)
    assert document["sections"][how]["status"] == "limit"
    assert document["sections"]["ends"]["status"] == "ok"
    assert document["measured"][how]["began"]["limit"] == 6
    assert "began" in document["measured"]["ends"]
    assert f"  {how}: limit\n" in (tmp_path / "summary.txt").read_text()
    assert not gpu.records.holds(document)
    for begun in document["measured"][how].values():  # it and what it started are gone
        assert not is_running(begun["pid"])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_section_that_breaks_is_told_and_the_next_one_runs(gpu: Any, tmp_path: Path) -> None:
    sections = [gpu.plan.Planned(name, 10, "main") for name in ("crashes", "dies", "cut while writing", "ends")]
    document = run(gpu, tmp_path, sections)
    states = {name: section["status"] for name, section in document["sections"].items()}
    assert states["crashes"] == "exit code 1" and states["dies"] == "exit code -9" and states["ends"] == "ok"
    assert set(document["measured"]) == {"crashes", "dies", "cut while writing", "ends"}


def test_what_a_section_does_not_need_goes_to_the_next(gpu: Any, tmp_path: Path) -> None:
    Planned = gpu.plan.Planned
    document = run(gpu, tmp_path, [Planned("ends", 100, "main"), Planned("crashes", 100, "main")], budget=300)
    limits = [document["measured"][name]["began"]["limit"] for name in ("ends", "crashes")]
    assert 190 < limits[0] <= 200  # all but what is sure to the second
    assert 200 < limits[1] <= 300


def test_sections_without_time_are_left_out_and_named(gpu: Any, tmp_path: Path) -> None:
    Planned = gpu.plan.Planned
    document = run(gpu, tmp_path, [Planned("hangs", 6, "main"), Planned("ends", 6, "main")], budget=7)
    assert document["sections"]["hangs"]["status"] == "limit"
    assert document["sections"]["ends"]["status"].startswith("not run")


def test_one_section_runs_beside_the_others(gpu: Any, tmp_path: Path) -> None:
    Planned = gpu.plan.Planned
    document = run(gpu, tmp_path, [Planned("hangs", 12, "smoke", beside=True), Planned("ends", 10, "smoke")], budget=30)
    assert {name: section["status"] for name, section in document["sections"].items()} == {
        "ends": "ok",
        "hangs": "limit",
    }
    assert (tmp_path / "hangs.log").exists()


def test_a_folder_used_twice_shows_the_last_run(gpu: Any, tmp_path: Path) -> None:
    run(gpu, tmp_path, [gpu.plan.Planned("crashes", 10, "main")])
    document = run(gpu, tmp_path, [gpu.plan.Planned("ends", 10, "main")])
    assert set(document["sections"]) == set(document["measured"]) == {"ends"}
    assert gpu.records.holds(document)


# --- what is planned, and what is written -----------------------------------------------------------------------------


def test_each_set_fits_its_budget_and_smoke_tries_what_main_measures(gpu: Any) -> None:
    smoke, main = gpu.plan.chosen("smoke"), gpu.plan.chosen("main")
    assert sum(section.seconds for section in smoke if not section.beside) <= 240
    assert sum(section.seconds for section in main) <= 455
    assert {section.name for section in main} < {section.name for section in smoke}
    assert all(section.tiny for section in smoke if section.in_set == "main")
    assert not any(section.tiny for section in main)
    assert [section.name for section in gpu.plan.chosen("all")] == list(gpu.plan.NAMES)
    for section in gpu.plan.SECTIONS:
        source = (ROOT / "benchmarks" / "gpu" / f"{section.code}.py").read_text()
        assert f"\ndef {section.name}(s: Section) -> None:" in source


def test_values_that_json_lacks_are_written_as_text(gpu: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    gpu.records.append(path, "a", "b", "measure", ms=float("nan"), where={Path("x"): {1}}, tiny=False)
    (line,) = gpu.records.read(path)
    assert line["ms"] == "nan" and line["where"] == {"x": [1]}
    assert gpu.records.values(line) == {"ms": "nan", "where": {"x": [1]}, "tiny": False}


def test_a_summary_is_short_enough_to_come_back(gpu: Any) -> None:
    line = {"section": "gemm", "kind": "measure", "t": 0.0, "tiny": False, "said": "x" * 150}
    document = gpu.records.document([{**line, "name": f"{index}"} for index in range(300)])
    assert len(gpu.records.summary(document)) < 12_000

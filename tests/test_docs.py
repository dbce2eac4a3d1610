"""The code in README and docs runs, and the numbers in the README are those of the results file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = [(page.name, block) for page in PAGES for block in blocks(page, "python")]
COMMANDS = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("halfstep ")
]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_block_runs(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, page, "exec"), {"__name__": "__main__"})


def test_commands_of_the_readme_run_on_the_script_of_the_readme(tmp_path: Path) -> None:
    (script,) = [block for _, block in PYTHON if block.startswith("# train.py")]
    (tmp_path / "train.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
    assert len(COMMANDS) >= 4
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "compare":
            arguments[1:1] = ["--output", "halfstep-runs"]  # so that the report command after it finds records
        done = subprocess.run(
            [sys.executable, "-m", "halfstep", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (0, 1), f"{command}: {done.stderr}"
        assert "Traceback" not in done.stderr
        if arguments[0] == "run":  # its record would be a second one of the same policy and seed
            for record in (tmp_path / "halfstep-runs").glob("*.jsonl"):
                record.unlink()
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text()):
        path = target[0] or target[1]
        if not path.startswith("http"):
            assert (page.parent / path).exists(), f"{page.name} links to {path}"


def test_numbers_in_the_readme_are_those_of_the_results_file() -> None:
    place = ROOT / "benchmarks" / "demo.py"
    specification = importlib.util.spec_from_file_location("demo_benchmark", place)
    assert specification is not None and specification.loader is not None
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    readme = (ROOT / "README.md").read_text()
    result = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.render(readme, result) == readme, "run: python benchmarks/demo.py --render"
    slower = json.loads(benchmark.RESULTS.read_text())
    slower["comparison"]["policies"][1]["speed"]["median_seconds"] *= 2
    assert benchmark.render(readme, slower) != readme


def test_numbers_of_the_optimizers_page_are_those_of_the_results_files() -> None:
    place = ROOT / "benchmarks" / "optimizer_page.py"
    specification = importlib.util.spec_from_file_location("optimizer_page", place)
    assert specification is not None and specification.loader is not None
    page = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(page)
    text = page.PAGE.read_text()
    assert page.render(text, *page.load()) == text


def test_numbers_of_the_page_on_planes_are_those_of_the_results_file() -> None:
    place = ROOT / "benchmarks" / "planes_page.py"
    specification = importlib.util.spec_from_file_location("planes_page", place)
    assert specification is not None and specification.loader is not None
    page = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(page)
    text = page.PAGE.read_text()
    assert page.render(text, json.loads(page.RESULT.read_text())) == text


def test_the_newest_pytorch_that_is_called_tested_has_passed_the_suite() -> None:
    from halfstep.version import TESTED_TORCH

    rows = json.loads((ROOT / "benchmarks" / "results" / "tested.json").read_text())
    passed = [row["torch"].partition("+")[0] for row in rows if row["failed"] == 0 and row["passed"] > 1000]
    assert TESTED_TORCH in passed
    page = (ROOT / "docs" / "tested.md").read_text()
    assert all(f"| {row['torch']} | {row['triton']} |" in page for row in rows)

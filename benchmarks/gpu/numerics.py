"""The project's tests that are marked ``gpu``, on many processes: most of their time is Triton's compiler.

What each test says is written down as it ends (`gpu.each_test`), and pytest is interrupted before the section's limit,
so that ``junit.xml`` is written too: however it ends, the results of what ran are there. On a CPU the same files run in
the form that they have for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpu import each_test, records
from gpu.section import Section

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that pytest gets to write its report when it is interrupted.
TO_END = 10.0


def numerics(s: Section) -> None:
    results = s.out / "tests.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.each_test"]
    command += [
        "-o",
        "filterwarnings=default",
        f"--junitxml={s.out.resolve() / 'junit.xml'}",
        *_processes(s),
        *_tests(s),
    ]
    environment = {**os.environ, each_test.RESULTS: str(results.resolve()), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    code: int | None = None
    try:
        code = process.wait(timeout=max(5.0, s.left() - TO_END))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
    lines = records.read(results)
    outcomes = Counter(line["outcome"] for line in lines)
    failures = {line["name"]: line["said"] for line in lines if line["outcome"] == "failed"}
    s.check("the tests ended in time", code is not None, **outcomes)
    s.check(
        "the tests marked gpu pass" if s.cuda else "the tests that are marked gpu on a GPU pass on this CPU",
        code == 0 and not failures and outcomes["passed"] > 0,
        **outcomes,
        code=code,
        failed_tests=sorted(failures)[:40],
        failures=failures,
    )
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:10]
    s.measure("tests", **outcomes, slowest={line["name"]: line["seconds"] for line in slowest})


def _tests(s: Section) -> list[str]:
    """Only files that have such tests: to collect all the others would take a good part of the time."""
    if s.cuda:
        found = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    else:
        found = [*(ROOT / "tests").rglob("test_*_on_cuda.py")]
    return [*(["-m", "gpu"] if s.cuda else []), *sorted(str(path.relative_to(ROOT)) for path in found)]


def _processes(s: Section) -> list[str]:
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "load"] if s.cuda else []

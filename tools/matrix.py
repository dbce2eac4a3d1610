"""The whole test suite over versions of Python and PyTorch, and on an emulated CPU with AVX2: docs/tested.md.

    python tools/matrix.py                     every row: hours, and 6 GB for each version of PyTorch that is new here
    python tools/matrix.py 3.13:pins 3.12:2.11.0 3.11:pins:avx2

A row is PYTHON:TORCH, where TORCH is `pins` (constraints.txt), a version, or `newest`; `:avx2` after it holds the
libraries to AVX2. Each gets an environment under build/matrix, from the public registry alone, for a Python that is on
the PATH; rows that were run keep their place in the table until they are run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time

from resolve import PINS, ROOT, pythons

PAGE = ROOT / "docs" / "tested.md"
RESULTS = ROOT / "benchmarks" / "results" / "tested.json"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
HEAD = """\
# What the tests were run on

`make matrix` runs the whole suite over versions of Python and PyTorch, each in an environment of its own, and writes
this page. PyTorch is the one that the public registry gives, CUDA's libraries included; there was no GPU. "AVX2" is a
CPU whose libraries are held to AVX2 by environment variables, as on most laptops. A failure in the table was found by
its run and may be mended since: the date says when that was.

| Python | PyTorch | Triton | CPU | passed | skipped | failed | minutes | date |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="PYTHON:TORCH or PYTHON:TORCH:avx2; default: all")
    rows = parser.parse_args().rows or every_row()
    known = {row["row"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    for row in rows:
        print(f"{row} …", flush=True)
        known[row] = run(row)
        print("  {passed} passed, {skipped} skipped, {failed} failed in {minutes} min".format(**known[row]))
        ordered = sorted(known.values(), key=lambda r: (r["row"].count(":"), r["python"], r["torch"]))
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(HEAD + "".join(line(r) for r in ordered))
    return 1 if any(known[row]["failed"] for row in rows) else 0


def every_row() -> list[str]:
    oldest, *_, newest = pythons()
    return [*(f"{p}:pins" for p in pythons()), f"{oldest}:{minimum()}", f"{newest}:newest", f"{oldest}:pins:avx2"]


def minimum() -> str:
    """The oldest PyTorch that the project promises."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return found[1] + ".0" * (2 - found[1].count("."))


def run(row: str) -> dict[str, str | int]:
    python, torch, *rest = row.split(":")
    environment = ROOT / "build" / "matrix" / f"{python}-{torch}"
    uv = [sys.executable, "-m", "uv", "--no-config"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", python, environment], env=plain, check=True)
    wanted = ["--constraint", PINS] if torch == "pins" else ["torch" if torch == "newest" else f"torch=={torch}"]
    interpreter = environment / "bin" / "python"
    install = [*uv, "pip", "install", "--quiet", "--python", interpreter]
    subprocess.run([*install, *wanted, "-e", f"{ROOT}[dev]"], env=plain, check=True)

    plain |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(environment / ("-".join(["inductor", *rest])))}
    plain |= AVX2 if "avx2" in rest else {}
    start = time.monotonic()
    command = [interpreter, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "--max-worker-restart", "0"]
    suite = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, env=plain, capture_output=True, text=True)
    (environment / "pytest.txt").write_text(suite.stdout + suite.stderr)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped|failed|error)", suite.stdout[-300:])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    ask = "import torch, importlib.metadata as m; print(torch.__version__, m.version('triton'))"
    versions = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return {
        "row": row,
        "python": python,
        "torch": versions[0],
        "triton": versions[1],
        "cpu": "AVX2" if "avx2" in rest else cpu(),
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": failed or int(suite.returncode != 0),  # a run that ended before its tests did has failed
        "minutes": round((time.monotonic() - start) / 60),
        "date": datetime.date.today().isoformat(),
    }


def cpu() -> str:
    from halfstep.hardware import cpu_flags

    return f"{platform.machine()}: {', '.join(cpu_flags())}"


def line(row: dict[str, str | int]) -> str:
    columns = ("python", "torch", "triton", "cpu", "passed", "skipped", "failed", "minutes", "date")
    return "| " + " | ".join(str(row[column]) for column in columns) + " |\n"


if __name__ == "__main__":
    sys.exit(main())

"""``halfstep run`` and ``halfstep compare`` on the built-in GPT, as a user calls them, beside the script alone."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import halfstep
from gpu.section import Section

SCRIPT = Path(halfstep.__file__).parent / "workloads" / "gpt.py"
SMALL = "--layers 2 --width 64 --heads 2 --context 64 --batch 4 --eval-batches 1"
FULL = "--layers 12 --width 768 --heads 12 --context 512 --batch 16 --eval-batches 1"


def comparison(s: Section) -> None:
    size = [*(SMALL if s.tiny else FULL).split(), "--device", s.device, "--eval-every", "1000"]
    policies = "fp32,bf16-mixed" if s.tiny or not s.cuda else "fp32,bf16-mixed,bf16-master"
    steps = "8" if s.tiny else "40"
    with tempfile.TemporaryDirectory() as folder, s.part("halfstep compare"):
        asked = f"--policies {policies} --steps {steps} --seeds 1 --device {s.device} --json --output {folder}/runs"
        command = [sys.executable, "-m", "halfstep", "compare", *asked.split(), str(SCRIPT), *size]
        done = _call(s, command)
        page = Path(folder, "runs", "report.html").exists()
        s.check("halfstep compare writes its report", page, code=done.returncode, said=done.stderr[-300:])
        for policy in json.loads(done.stdout)["policies"]:
            s.measure(f"compare {policy['policy']}", **_told(policy))
    if s.has_time("the script alone", 10):
        with s.part("the script alone"):
            command = [sys.executable, str(SCRIPT), *size, "--steps", steps, "--log-every", "1"]
            found = [float(ms) for ms in re.findall(r"^step +\d+ +loss .* (\d+) ms$", _call(s, command).stdout, re.M)]
            s.measure("the script alone", ms=statistics.median(found[3:]), steps=len(found))


def _told(policy: dict[str, Any]) -> dict[str, Any]:
    """Of a policy in a comparison's JSON, what is compared here; a run's loss is not, with one seed."""
    speed = policy["speed"] or {}
    ratio = speed.get("speed_up") or {}
    return {
        "ms": None if not speed else round(1e3 * speed["median_seconds"], 3),
        "speed_up": ratio.get("estimate"),
        "peak_mib": None if policy["peak_bytes"] is None else round(policy["peak_bytes"] / 2**20, 1),
        "memory_ratio": policy["memory_ratio"],
    }


def _call(s: Section, command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, s.left()), check=False)
    print(f"--- {' '.join(command)}: exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-2500:]}")
    return done

"""Time to the first word about an overflow: ``python benchmarks/doctor.py``.

The built-in GPT gets one outlier channel in the MLP of its middle block: its hidden value and its weights fit in fp16,
their product does not, and the loss becomes NaN. The same plant runs, each time in a process of its own, under

* ``halfstep doctor --policy fp16-mixed`` (the script as it is),
* ``torch.autograd.set_detect_anomaly(True)``,
* ``transformers.debug_utils.DebugUnderflowOverflow(model)``,

the latter two with ``torch.autocast`` to fp16 and a ``GradScaler`` written into the script, as their user would. Time
runs from the start of the process to its first line that says something about the numbers; that line is kept word for
word, and so is what came after it. Who says nothing within the script's steps is recorded as silent.

Rounds are interleaved; the result is each tool's median and range. Written to ``benchmarks/results/doctor.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from halfstep.workloads import gpt

#: Left out of what tools say: where packages are on this machine is nobody's business.
PACKAGES = str(Path(torch.__file__).parents[1]) + os.sep
RESULTS = Path(__file__).resolve().parent / "results" / "doctor.json"
SIZE = ["--layers", "4", "--width", "128", "--heads", "4", "--context", "128", "--batch", "2", "--steps", "3"]
#: Hidden values of the channel grow to about 1e4 and its weights to about 60: 6e5, beyond fp16's 65504.
PLANT = """
    with torch.no_grad():
        block = model.blocks[args.layers // 2]
        block.mlp[0].weight[7] *= 2e4
        block.mlp[2].weight[:, 7] *= 3e3
"""
MODULE = "blocks.2.mlp.2"
MADE = "    model = GPT(args).to(args.device)\n"
FORWARD = "            loss = next_byte_loss(model, x, y) / args.accumulate\n            loss.backward()\n"
STEP = "        optimizer.step()\n"

#: Per tool: code after the model is made, and what its first word looks like.
TOOLS = {
    "halfstep doctor": ("", r"^halfstep: HS\d+ (warning|error): "),
    "detect_anomaly": ("    torch.autograd.set_detect_anomaly(True)\n", r"Error detected in|returned nan values"),
    "DebugUnderflowOverflow": (
        "    from transformers.debug_utils import DebugUnderflowOverflow\n    debug = DebugUnderflowOverflow(model)\n",
        r"Detected inf/nan|inf or nan",
    ),
}


def planted(tool: str) -> str:
    """The GPT's source with the plant, and for the peers with mixed precision and the peer itself."""
    source = Path(gpt.__file__).read_text(encoding="utf-8")
    inserted, _ = TOOLS[tool]
    source = _replaced(source, MADE, MADE + PLANT + inserted)
    if tool == "halfstep doctor":
        return source
    source = _replaced(source, MADE, MADE + "    scaler = torch.amp.GradScaler(args.device)\n")
    source = _replaced(
        source,
        FORWARD,
        "            with torch.autocast(args.device, torch.float16):\n"
        "                loss = next_byte_loss(model, x, y) / args.accumulate\n"
        "            scaler.scale(loss).backward()\n",
    )
    return _replaced(source, STEP, "        scaler.step(optimizer)\n        scaler.update()\n")


def _replaced(source: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        raise SystemExit(f"gpt.py has changed: {old!r} is there {source.count(old)} times")
    return source.replace(old, new)


def run(tool: str, folder: Path, number: int, device: str) -> dict[str, Any]:
    """One process: seconds to its first word and to the end, and its words."""
    script = folder / f"{tool.replace(' ', '_')}.py"
    script.write_text(planted(tool), encoding="utf-8")
    command = [sys.executable, "-u"]
    if tool == "halfstep doctor":
        command += ["-m", "halfstep", "doctor", "--policy", "fp16-mixed", "--steps", "1", "--no-remedies"]
        command += ["--output", str(folder / f"doctor{number}")]
    pattern = re.compile(TOOLS[tool][1])
    first: float | None = None
    said: list[str] = []
    names: float | None = None
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, str(script), *SIZE, "--device", device],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        now = time.perf_counter() - started
        if first is None and pattern.search(line):
            first = now
        if first is not None:
            said.append(line.rstrip())
            if names is None and MODULE in line:
                names = now
    process.wait()
    return {
        "seconds_to_first_word": first,
        "seconds_to_name_the_module": names,
        "seconds_in_all": time.perf_counter() - started,
        "exit_code": process.returncode,
        "said": [line.replace(str(folder) + os.sep, "").replace(PACKAGES, "") for line in said[:40]],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over rounds; the words are the first round's."""
    result: dict[str, Any] = {"said": runs[0]["said"], "exit_code": runs[0]["exit_code"]}
    for key in ("seconds_to_first_word", "seconds_to_name_the_module", "seconds_in_all"):
        values = [item[key] for item in runs if item[key] is not None]
        result[key] = (
            {"median": round(statistics.median(values), 2), "range": [round(min(values), 2), round(max(values), 2)]}
            if values
            else None
        )
    result["silent"] = result["seconds_to_first_word"] is None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tools = [tool for tool in TOOLS if tool != "DebugUnderflowOverflow" or importlib.util.find_spec("transformers")]
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for tool in tools[number % len(tools) :] + tools[: number % len(tools)]:
                runs[tool].append(run(tool, Path(folder), number, options.device))
    from halfstep import hardware
    from halfstep.version import __version__

    transformers = None
    if "DebugUnderflowOverflow" in tools:
        from importlib.metadata import version

        transformers = version("transformers")
    result = {
        "environment": {
            "halfstep": __version__,
            "torch": torch.__version__,
            "transformers": transformers,
            "python": platform.python_version(),
            "cpu": hardware.cpu_name(),
            "cpus": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "load_at_start": round(load, 2),
        },
        "rounds": options.rounds,
        "script": ["halfstep/workloads/gpt.py", *SIZE],
        "planted_in": MODULE,
        "tools": {tool: summary(values) for tool, values in runs.items()},
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for tool, values in result["tools"].items():
        first, names = values["seconds_to_first_word"], values["seconds_to_name_the_module"]
        print(f"{tool:25} first word {first['median'] if first else 'none':>8}  names {MODULE} after", end=" ")
        print(names["median"] if names else "(never)")
        print("    " + (values["said"][0][:200] if values["said"] else "(said nothing)"))


if __name__ == "__main__":
    main()

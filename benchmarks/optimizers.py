"""Time and memory of optimizers, halfstep's beside PyTorch's and others: ``python benchmarks/optimizers.py``.

All rows of `optimizer_rows` do AdamW on the parameters of one GPT: 46.7 million in 148 tensors of 9 shapes.

Time: a few rows live in one process, PyTorch's fused FP32 AdamW always among them, and step in turn, round after round,
in an order drawn anew for each round; a row's figure is the median over rounds of its time divided by that of the fused
one *in the same round*, with the quartiles. A step of a slow row takes seconds: such rows sit out rounds, evenly. Where
a process's memory lies decides for its whole life how fast it is, and one full of other rows' memory is slower: so each
set of rows goes through several processes, and all their rounds count together.

Memory: `optimizer_memory`, a process for each row. Bytes that a step moves follow from the storages found there, and
GB/s from these, beside what copying and multiplying in place reach: the ceiling.

Written to ``benchmarks/results/optimizers.json`` (``optimizers-cuda.json`` on a GPU). A full run takes about half an
hour and wants an idle machine. Packages to compare with are optional: see `optimizer_rows`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optimizer_memory import measure_memory
from optimizer_rows import BASELINE, PEERS, SIZES, Parameters, Row, Step, parameters_of, refusal, rows, shapes
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from halfstep.hardware import detect, environment

RESULTS = Path(__file__).resolve().parent / "results"
#: Gradients are normal with this deviation.
GRADIENT = 1e-3
#: Seconds between two looks at the clock: a row whose step is shorter takes several.
BLOCK = 0.05
MEMORY_KEYS = ("weights", "master_and_state", "gradients", "total", "resident", "peak_resident")


# --- time -------------------------------------------------------------------------------------------------------------


#: Rows that share a process, besides those that they are divided by.
TOGETHER = 5


def sets_of(wanted: list[Row], device: str) -> list[list[str]]:
    """Names of rows that share a process: few at a time, each with the row that it is divided by."""
    by_name = {row.name: row for row in rows(device)}
    own = [row for row in wanted if row.name != BASELINE]
    found = []
    for begin in range(0, max(len(own), 1), TOGETHER):
        chosen = own[begin : begin + TOGETHER]
        names = [BASELINE, *(row.against for row in chosen), *(row.name for row in chosen)]
        found.append([name for name in by_name if name in names])
    return found


def measure_times(wanted: list[Row], options: argparse.Namespace, threads: int, common: list[str]) -> dict[str, Any]:
    """For each row its time and its ratio to another row's, or why it does not run here."""
    limits = ["--rounds", str(-(-options.rounds // options.processes))]
    limits += ["--seconds", str(options.seconds / options.processes), "--threads", str(threads)]
    times: dict[str, dict[str, float]] = {}
    told: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"threads": threads, "load_before": round(os.getloadavg()[0], 2)}
    for process in range(options.processes):
        for number, names in enumerate(sets_of(wanted, options.device)):
            print(f"{threads} threads, process {process + 1}: {', '.join(names)}", file=sys.stderr)
            own = ["--times-of", json.dumps(names)]
            done = in_own_process([*own, *common, *limits], {"OMP_NUM_THREADS": str(threads)})
            if "failed" in done:
                result["failed"] = done["failed"]
            for name, measured in done.get("rows", {}).items():
                for index, seconds in measured.pop("seconds", {}).items():
                    times.setdefault(name, {})[f"{process} {number} {index}"] = seconds
                told.setdefault(name, measured)
    count = sum(torch.Size(shape).numel() for shape in shapes(**SIZES[options.size]))
    for row in rows(options.device):
        if row.name in times:
            told[row.name].update(summary(row, times, count))
    return {
        **result,
        "load_after": round(os.getloadavg()[0], 2),
        "rows": {row.name: told[row.name] for row in rows(options.device) if row.name in told},
    }


def times_of(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: the seconds of each row's step in each round, or why it does not run here."""
    torch.set_num_threads(options.threads[0])
    chosen = [row for row in rows(options.device) if row.name in json.loads(options.times_of)]
    gradients: dict[torch.dtype, list[Tensor]] = {}
    steps: dict[str, Step] = {}
    results: dict[str, dict[str, Any]] = {}
    for row in chosen:
        parameters = parameters_of(options.size, row.dtype, options.device)
        if row.dtype not in gradients:  # shared: an optimizer only reads them
            gradients[row.dtype] = [GRADIENT * torch.randn_like(p) for p in parameters]
        for parameter, gradient in zip(parameters, gradients[row.dtype], strict=True):
            parameter.grad = gradient
        before = [p.detach().clone() for p in parameters]
        try:
            step = row.start(parameters)
            results[row.name] = {"first_step_seconds": round(timed(step, 1), 3)}
            step()
        except Exception as error:  # whatever a package raises is this row's result
            results[row.name] = {"unavailable": refusal(error)}
            continue
        if row.family != "ceiling":
            check_moved(row, parameters, before)
        steps[row.name] = step
    for name, seconds in interleave(steps, options.rounds, options.seconds).items():
        results[name]["seconds"] = seconds
    return {"rows": results}


def check_moved(row: Row, parameters: Parameters, before: list[Tensor]) -> None:
    """An optimizer that does nothing would be the fastest of all."""
    for number, (parameter, old) in enumerate(zip(parameters, before, strict=True)):
        moved = (parameter.detach() != old).float().mean().item()
        if moved < 0.5 or not parameter.isfinite().all():
            where = f"parameter {number} of shape {tuple(parameter.shape)}"
            sys.exit(f"{row.name}: {where}: {moved:.0%} of it moved in two steps, or not all of it is finite")


def interleave(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, dict[int, float]]:
    """Seconds per step of each row in each round that it took part in; every row spends about ``seconds`` at most.

    However slow, a row takes part in every tenth round at least: a spread over fewer would say little.
    """
    draw = random.Random(0)
    repeat, every = {}, {}
    for name, step in steps.items():
        once = timed(step, 1)
        repeat[name] = max(1, round(BLOCK / once))
        every[name] = min(max(1, round(rounds * repeat[name] * once / seconds)), 10)
    times: dict[str, dict[int, float]] = {name: {} for name in steps}
    for index in range(rounds):
        order = [name for name in steps if index % every[name] == 0]
        draw.shuffle(order)
        for name in order:
            times[name][index] = timed(steps[name], repeat[name])
    return times


def timed(step: Step, repeat: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeat


def summary(row: Row, times: dict[str, dict[str, float]], count: int) -> dict[str, Any]:
    """Median and quartiles: nanoseconds for each parameter, and the ratio to the row that this one is held against.

    ``times``: of each row the seconds by round, a round's name being the same for all rows that took part in it.
    """
    own, other = times[row.name], times.get(row.against, {})
    result: dict[str, Any] = {
        "rounds": len(own),
        "nanoseconds_per_parameter": spread([1e9 * t / count for t in own.values()]),
    }
    ratios = [t / other[index] for index, t in own.items() if index in other]
    if ratios:
        result |= {"against": row.against, "ratio": spread(ratios)}
    if row.goal is not None:
        result["goal"] = row.goal
    return result


def spread(values: list[float]) -> dict[str, Any]:
    quartiles = np.percentile(values, [25, 75])
    return {"median": round(statistics.median(values), 4), "quartiles": [round(float(q), 4) for q in quartiles]}


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row that is wanted, each in its processes."""
    wanted = [row for row in rows(options.device) if re.search(options.rows, f"{row.family} {row.name}")]
    if options.quick or options.smoke:
        wanted = [row for row in wanted if not row.compiles]
    result = settings(options)
    common = ["--size", options.size, "--device", options.device]
    if "time" in options.parts:
        timed_rows = [row for row in wanted if not row.releases]
        result["runs"] = [measure_times(timed_rows, options, threads, common) for threads in options.threads]
    if "memory" in options.parts:
        kept = [row for row in wanted if row.family != "ceiling"]
        if options.smoke:  # a process for each would take minutes
            kept = [next(row for row in kept if row.family == family) for family in ("torch", "halfstep")]
        # Large blocks go back to the system as soon as they are freed, so that the resident set shows what is in use.
        variables = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        for row in kept:
            print(f"memory of {row.name}", file=sys.stderr)
            result["memory"][row.name] = in_own_process(["--memory-of", row.name, *common], variables)
    add_bandwidth(result, options.device)
    return result


def in_own_process(arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """Run this file with ``arguments`` in a process of its own; what it measured, or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "measured.json")
        command = [sys.executable, __file__, *arguments, "--out", str(kept)]
        # What packages print while they are imported is no part of this program's output.
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, env={**os.environ, **variables}, check=False, **streams)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            return {"failed": f"exit code {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"}
        measured: dict[str, Any] = json.loads(kept.read_text())
        return measured


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the model."""
    facts = environment(detect(options.device))
    facts = {key: value for key, value in facts.items() if key not in ("threads", "load")}
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    every = shapes(**SIZES[options.size])
    counts = {"parameters": sum(torch.Size(s).numel() for s in every), "tensors": len(every), "shapes": len(set(every))}
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            **facts,
            "transparent_hugepages": pages.read_text().strip() if pages.exists() else None,
            "packages": {name: version(name) for name in (*PEERS, "triton")},
        },
        "model": {**SIZES[options.size], **counts},
        "rounds": options.rounds,
        "processes": options.processes,
        "seconds_per_row": options.seconds,
        "runs": [],
        "memory": {},
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_bandwidth(result: dict[str, Any], device: str) -> None:
    """Add to each row what a step moves, and GB/s: weights and state are read and written, gradients are read."""
    for row in rows(device):
        memory = result["memory"].get(row.name, {})
        moved = row.moved
        if moved is None and "total" in memory:
            moved = round(2 * (memory["weights"] + memory["master_and_state"]) + memory["gradients"], 2)
        for run in result["runs"]:
            measured = run.get("rows", {}).get(row.name, {})
            if moved is not None and "rounds" in measured:
                rate = moved / measured["nanoseconds_per_parameter"]["median"]
                measured |= {"bytes_moved_per_parameter": moved, "gigabytes_per_second": round(rate, 1)}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table of times for each number of threads, and one of memory; below each, what does not run."""
    for run in result["runs"]:
        heads: tuple[str, ...] = (
            "ns/parameter",
            "ratio",
            "quartiles",
            "goal",
            "B moved",
            "GB/s",
            "first step, s",
            "rounds",
        )
        title = f"threads: {run['threads']}, load before: {run['load_before']}"
        show_table(console, title, heads, {name: time_cells(row) for name, row in run.get("rows", {}).items()}, run)
    if not result["memory"]:
        return
    cells = {name: [number(row.get(key), 2) for key in MEMORY_KEYS] for name, row in result["memory"].items()}
    heads = tuple(key.replace("_", " ") for key in MEMORY_KEYS)
    show_table(console, "bytes per parameter", heads, cells, {"rows": result["memory"]})


def show_table(
    console: Console, title: str, heads: tuple[str, ...], cells: dict[str, list[str]], run: dict[str, Any]
) -> None:
    reasons = {name: row.get("unavailable", row.get("failed")) for name, row in run.get("rows", {}).items()}
    table = Table(title=title, title_justify="left")
    table.add_column("row", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, texts in cells.items():
        if reasons[name] is None:
            table.add_row(name, *texts)
    console.print(table)
    for name, reason in [*reasons.items(), ("all rows", run.get("failed"))]:
        if reason is not None:
            console.print(f"{name}: [dim]{escape(reason)}[/]")


def time_cells(row: dict[str, Any]) -> list[str]:
    ratio, goal = row.get("ratio"), row.get("goal")
    return [
        number(row.get("nanoseconds_per_parameter", {}).get("median"), 3),
        "" if ratio is None else number(ratio["median"], 3),
        "" if ratio is None else "–".join(number(q, 3) for q in ratio["quartiles"]),
        "" if goal is None else str(goal),
        number(row.get("bytes_moved_per_parameter"), 1),
        number(row.get("gigabytes_per_second"), 1),
        number(row.get("first_step_seconds"), 2),
        str(row.get("rounds", "")),
    ]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="", help="regular expression: only rows whose family and name it finds")
    parser.add_argument("--parts", default="time,memory", help="time, memory or both (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=4, help="that share the rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="default: 40")
    parser.add_argument("--seconds", type=float, help="for the steps of a row, about (default: 15)")
    parser.add_argument("--quick", action="store_true", help="12 rounds, 5 seconds for a row, nothing that compiles")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, 1 round: only shows that rows run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="file for the results (default: under results/; --smoke: none)")
    parser.add_argument("--size", default="full", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--times-of", help=argparse.SUPPRESS)  # the processes for time and for memory
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.times_of or options.memory_of:
        warnings.simplefilter("ignore")  # those of other packages
        memory_of = (options.memory_of, options.size, options.device)
        measured = times_of(options) if options.times_of else measure_memory(*memory_of)
        options.out.write_text(json.dumps(measured))
        return
    if options.smoke:
        options.size, options.rounds, options.processes, options.threads = "smoke", 1, 1, options.threads[:1]
    options.rounds = options.rounds or (12 if options.quick else 40)
    options.seconds = options.seconds or (5.0 if options.quick else 15.0)
    result = measure(options)
    show(result, Console(width=None if sys.stdout.isatty() else 150))
    default = None if options.smoke else RESULTS / f"optimizers{'' if options.device == 'cpu' else '-cuda'}.json"
    if out := options.out or default:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    if broken := defects(result, options.device):
        sys.exit(f"rows of halfstep that failed: {', '.join(broken)}")


def defects(result: dict[str, Any], device: str) -> list[str]:
    """Rows of halfstep that did not run, for another reason than that a backend is missing here."""
    parts = [*result["runs"], {"rows": result["memory"]}]
    found = ["all"] if any("failed" in part for part in parts) else []
    for row in rows(device):
        told = {part.get("rows", {}).get(row.name, {}).get("unavailable") for part in parts} - {None}
        if row.family == "halfstep" and any(not reason.startswith("BackendUnavailableError") for reason in told):
            found.append(row.name)
    return found


if __name__ == "__main__":
    main()

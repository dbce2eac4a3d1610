"""One run on a GPU: what of halfstep works there, and how fast. For a machine that is lent for minutes.

    python benchmarks/gpu_once.py --set smoke --budget 240 --out OUT    # is it right? tests, waits, all sections tried
    python benchmarks/gpu_once.py --set main --budget 455 --out OUT     # how fast is it?
    python benchmarks/gpu_once.py --tiny --device cpu --out OUT         # the program itself, without a GPU

Each section is a process of its own with its own limit (`gpu.plan` lists them, `gpu` says what they are). OUT gets

    gpu_once.jsonl      a line for everything that was learnt, as it was learnt
    gpu-SET.json        all of it as one document, written anew after each section
    summary.txt         what went wrong, then a line a measurement; printed at the end as well
    gpu_once.log        what sections printed; numerics.log and junit.xml: the tests

``benchmarks/gpu_page.py`` puts a document that was copied to ``benchmarks/results/`` into docs/gpu.md. Exit codes: 0
fine, 1 something failed or did not end, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu import plan, records
from gpu.plan import Planned
from gpu.running import Run, say

HERE = Path(__file__).resolve()
SOURCE = HERE.parents[1] / "src"
#: How much longer a section may take on a CPU, where it also waits for other sections' processors.
STRETCH_ON_A_CPU = 10.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--set", default="all", choices=("smoke", "main", "all"), help="which sections (default: all)")
    add("--only", type=_names, default=[], help="these sections, by commas, in the sizes of the set that has them")
    add("--skip", type=_names, default=[], help="not these, by commas")
    add("--budget", type=float, default=600.0, help="seconds in all (default: 600)")
    add(
        "--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")), help="folder (default: $OUT or build/gpu)"
    )
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="sizes of a second: tries the program, measures nothing")
    add("--section", help=argparse.SUPPRESS)  # the process of a section
    add("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    return made


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    options = made.parse_args(arguments)
    if options.section:
        return section(options)
    try:
        sections = plan.chosen(options.set, options.only, options.skip, options.tiny)
    except ValueError as error:
        made.error(str(error))
    if options.budget <= 0:
        made.error(f"--budget is seconds in all, not {options.budget:g}")
    if options.device == "cpu" and not options.tiny:
        made.error("the sizes are a GPU's: on a CPU add --tiny, which tries the program and measures nothing")
    if options.out.exists() and not options.out.is_dir():
        made.error(f"--out is a folder, and {options.out} is a file")
    if options.device == "cuda" and (missing := _absent()):
        made.error(f"no CUDA device here: {missing}. --tiny --device cpu tries the program without one")
    return run(options, sections, arguments)


def run(options: argparse.Namespace, sections: Sequence[Planned], arguments: Sequence[str]) -> int:
    """Run the sections and say what came of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # sections end with this process, and the document is whole

    def command(planned: Planned, limit: float) -> list[str]:
        asked: list[Any] = ["--section", planned.name, "--limit", f"{limit:.1f}", "--device", options.device]
        return [sys.executable, str(HERE), *asked, "--out", str(options.out), *(["--tiny"] if planned.tiny else [])]

    stretch = 1.0 if options.device == "cuda" else STRETCH_ON_A_CPU
    if options.device == "cpu":  # tests would take the processors from the others
        sections = [replace(planned, beside=False) for planned in sections]
    here = Run(options.out, options.set, command, options.budget, _environment(), stretch)
    described = {"arguments": [*arguments], "set": options.set, "device": options.device, "tiny": options.tiny}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    document = here.sections(sections, {**described, "budget": options.budget, "started": started})
    say(records.summary(document))
    return 0 if records.holds(document) else 1


def section(options: argparse.Namespace) -> int:
    """Be the process of one section."""
    from gpu.section import Section

    here = Section(options.section, options.out, options.device, options.tiny, options.limit)
    planned = next(p for p in plan.SECTIONS if p.name == options.section)
    try:
        getattr(importlib.import_module(f"gpu.{planned.code}"), planned.name)(here)
    except BaseException as error:
        here.crashed("the section", error)
        return 1
    return 0


def _environment() -> dict[str, str]:
    """Of the sections' processes: halfstep from this checkout, output as it comes."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    threads = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", str(min(14, os.cpu_count() or 1)))
    own = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "TORCHINDUCTOR_COMPILE_THREADS": threads}
    return {**os.environ, **own, "PYTHONPATH": path}


def _absent() -> str:
    """Why there is no CUDA device; empty where there is one."""
    import torch

    if torch.cuda.is_available():
        return ""
    return (
        f"PyTorch {torch.__version__} finds none" if torch.version.cuda else f"PyTorch {torch.__version__} has no CUDA"
    )


if __name__ == "__main__":
    sys.exit(main())

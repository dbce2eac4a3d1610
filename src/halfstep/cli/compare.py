"""``halfstep compare``: one script under several policies, each run in its own process, and a verdict."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfstep.compare import RunResult

EPILOG = (
    "Examples:  [bold]halfstep compare train.py --lr 3e-4[/]   ·   "
    "[bold]halfstep compare --policies fp32,bf16-mixed,bf16-master --steps 200 --seeds 5 train.py[/]   ·   "
    "[bold]halfstep compare --steps 200 train.py --seed '{seed}'[/]  ({seed} becomes 0, 1, 2, …)"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG, context_settings={"allow_interspersed_args": False})(compare)


def compare(
    script: Annotated[Path, typer.Argument(help="A PyTorch training script, unmodified.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    policies: Annotated[str, typer.Option(help="Policies to run, by commas; the first is the baseline.")] = "fp32,auto",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps per run (default: as the script).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per policy; quality needs at least 3.")] = 3,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for records, logs and report (default: halfstep-runs/SCRIPT-TIME)."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="The device that auto chooses for: cpu, cuda, mps, xpu.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Compare policies on a training script: speed, memory, and whether the loss stays the same.

    Every run is recorded; the folder also gets report.html. Exit code 1: a run crashed or diverged, or a
    policy's loss is worse than the baseline's.
    """
    raise typer.Exit(compare_script(script, arguments or [], policies, steps, seeds, output, device, as_json))


def compare_script(
    script: Path,
    arguments: Sequence[str],
    policies: str,
    steps: int | None,
    seeds: int,
    output: Path | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Run, conclude, show; returns the exit code. Everything that can be wrong is found before the first run."""
    from halfstep.cli.progress import progress
    from halfstep.compare import Interrupted, run_all
    from halfstep.launch.script import load

    load(script)
    names = resolve_policies(policies, device)
    if output is not None and output.exists() and not output.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, where a folder for records and report is wanted", output)
    folder = output or Path("halfstep-runs") / f"{script.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    print(
        f"halfstep: comparing {', '.join(names)} on {script}: {seeds} seeds each, into {folder}",
        file=sys.stderr,
    )
    with progress(names, steps) as show:
        try:
            results = run_all([str(script), *arguments], names, seeds, steps, folder, on_event=show)
        except Interrupted as stopped:
            show.close()
            print("halfstep: interrupted; this is what is there so far", file=sys.stderr)
            conclude(stopped.results, names[0], folder, as_json)
            return 130
    return conclude(results, names[0], folder, as_json)


def resolve_policies(policies: str, device: str | None) -> list[str]:
    """Policy names in the order asked, "auto" replaced by what it chooses here, each once.

    Raises:
        UnknownPolicyError, DeviceUnavailableError: as in `halfstep.policy` and `halfstep.hardware`.
        CompareError: fewer than two policies are left.
    """
    from halfstep import hardware
    from halfstep.compare import CompareError
    from halfstep.policy import parse, resolve

    facts = hardware.detect(device)
    names: list[str] = []
    for asked in filter(None, (part.strip() for part in policies.split(","))):
        policy, reason = resolve(asked, facts)
        if asked.startswith("auto"):
            print(f"halfstep: {asked} is {policy}: {reason}", file=sys.stderr)
            name = str(policy)
        else:
            name = str(parse(asked))  # as asked: a run that gets another policy than that says so itself
        if name not in names:
            names.append(name)
    if len(names) < 2:
        raise CompareError(
            f"a comparison needs two different policies, and {policies!r} is only {', '.join(names) or 'nothing'} "
            "here; name them, for example --policies fp32,bf16-mixed"
        )
    return names


def conclude(results: Sequence[RunResult], baseline: str, folder: Path, as_json: bool) -> int:
    """Read the records, write the report, print the verdict; returns the exit code."""
    from rich.console import Console

    from halfstep import record
    from halfstep.compare import compare, to_json
    from halfstep.report import html, terminal

    records = [record.read(result.record) for result in results if result.record is not None]
    if not records:
        print("halfstep: no run got as far as a record", file=sys.stderr)
        return 3
    comparison = compare(records, baseline=baseline, runs=results)
    html.write(folder / "report.html", records, comparison)
    if as_json:
        print(json.dumps(to_json(comparison), indent=2))
    else:
        terminal.print_comparison(Console(highlight=False), comparison)
    print(f"halfstep: report: {folder / 'report.html'}", file=sys.stderr)
    return 1 if comparison.findings else 0

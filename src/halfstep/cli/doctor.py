"""``halfstep doctor``: an unmodified script linted, profiled, examined; findings as they come, and a report."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfstep.doctor.diagnosis import Diagnosis
    from halfstep.launch.doctor import Told

EPILOG = (
    "Examples:  [bold]halfstep doctor train.py --lr 3e-4[/]   ·   "
    "[bold]halfstep doctor --policy fp16-mixed --steps 5 train.py[/]   ·   "
    "[bold]halfstep doctor --silence 'HS4*@encoder.*' --json train.py[/]"
)


def register(app: typer.Typer) -> None:
    # Options end at the script's name: whatever follows it is the script's.
    app.command(epilog=EPILOG, context_settings={"allow_interspersed_args": False})(doctor)


def doctor(
    script: Annotated[Path, typer.Argument(help="A PyTorch training script, unmodified.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    policy: Annotated[str, typer.Option(help="The policy to examine the script under, as in run.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per stage.")] = 3,
    device: Annotated[str | None, typer.Option(help="The device that auto chooses for: cpu, cuda, mps, xpu.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for doctor.json, doctor.html and logs (default: halfstep-runs/SCRIPT-doctor-TIME)."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds per stage; then it ends with what it has.")] = 900.0,
    silence: Annotated[
        list[str] | None,
        typer.Option(help="Drop findings by code and place: HS408, 'HS4*@*.router', '*@train.py:41'. Repeatable."),
    ] = None,
    no_remedies: Annotated[bool, typer.Option("--no-remedies", help="Try nothing that could help.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on the way.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the diagnosis as one JSON document.")] = False,
) -> None:
    """Find what is wrong with a script's numbers: which op, which module, which line, why, and what helps.

    Exit code 1: findings above "note". 3: the script failed before anything could be seen.
    """
    from halfstep.launch.doctor import InterruptedDiagnosisError, diagnose

    folder = output or Path("halfstep-runs") / f"{script.stem}-doctor-{time.strftime('%Y%m%d-%H%M%S')}"
    several_ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    rank = os.environ.get("RANK", "0")
    if several_ranks:
        folder = folder.with_name(f"{folder.name}.rank{rank}")
    prefix = f"halfstep: rank {rank}: " if several_ranks else "halfstep: "

    def tell(told: Told) -> None:
        if not quiet:
            print(f"{prefix}{_line(told)}", file=sys.stderr, flush=True)

    interrupted = False
    try:
        diagnosis, got_somewhere = diagnose(
            script,
            arguments or [],
            policy,
            folder,
            device_type=device,
            steps=steps,
            timeout=timeout,
            silence=silence or (),
            remedies=not no_remedies,
            tell=tell,
        )
    except InterruptedDiagnosisError as stopped:
        diagnosis, got_somewhere, interrupted = stopped.diagnosis, True, True
    conclude(diagnosis, folder, as_json, quiet)
    code = 130 if interrupted else _exit_code(diagnosis, got_somewhere)
    # A launcher ends every rank when one of them fails; a finding of this rank must not cut off another's diagnosis.
    raise typer.Exit(0 if several_ranks and code == 1 else code)


def conclude(diagnosis: Diagnosis, folder: Path, as_json: bool, quiet: bool = False) -> None:
    """Write ``doctor.json`` and ``doctor.html`` into ``folder``, and print."""
    from rich.console import Console

    from halfstep.report import diagnosis as page
    from halfstep.report.findings_table import prediction_table, print_findings

    document = json.dumps(diagnosis.to_json(), allow_nan=False)
    (folder / "doctor.json").write_text(document + "\n", encoding="utf-8")  # first: the data outlive a faulty page
    if as_json:
        print(document)
    else:
        console = Console(highlight=False)
        print_findings(console, diagnosis.findings, policy=diagnosis.policy, looked_at=page.looked_at(diagnosis))
        if diagnosis.predictions:
            console.print()
            console.print(prediction_table(diagnosis.predictions))
    try:
        page.write(folder / "doctor.html", diagnosis)
    except Exception as error:
        print(f"halfstep: doctor.html could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return
    if not quiet:
        print(f"halfstep: report: {folder / 'doctor.html'}", file=sys.stderr)


def _exit_code(diagnosis: Diagnosis, got_somewhere: bool) -> int:
    from halfstep.doctor.finding import Severity

    if any(finding.severity > Severity.NOTE for finding in diagnosis.findings):
        return 1
    return 0 if got_somewhere else 3


def _line(told: Told) -> str:
    """One line; of a finding code, severity, what and where: the rest follows at the end."""
    if told.finding is None:
        text = told.text if told.kind in ("stage", "wait") else f"note: {told.text}"
    else:
        finding = told.finding
        text = f"{finding.code} {finding.severity}: {finding.what}"
        text += f" [{finding.place}]" if finding.place is not None else ""
    return " ".join(text.split())

"""``halfstep run``: an unmodified script under a policy."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfstep.launch import Run
    from halfstep.policy import Policy

EPILOG = (
    "Examples:  [bold]halfstep run train.py --lr 3e-4[/]   ·   "
    "[bold]halfstep run --policy bf16-mixed --record out.jsonl train.py[/]   ·   "
    "[bold]torchrun --nproc-per-node 2 --no-python halfstep run train.py[/]"
)


def register(app: typer.Typer) -> None:
    # Options end at the script's name: whatever follows it is the script's.
    app.command(epilog=EPILOG, context_settings={"allow_interspersed_args": False})(run)


def run(
    script: Annotated[Path, typer.Argument(help="A PyTorch training script, unmodified.", show_default=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own arguments.")] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="auto, fp32, tf32, bf16-mixed, fp16-mixed, bf16-master, fp16-master or fp8-mixed:emulate, "
            "with options: bf16-mixed:keep_fp32=head."
        ),
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="The device that auto chooses for: cpu, cuda, mps, xpu.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the run record here (default: halfstep-runs/SCRIPT-POLICY-TIME.jsonl)."),
    ] = None,
    no_record: Annotated[bool, typer.Option("--no-record", help="Write no run record.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="End after this many optimizer steps.")] = None,
    seed_index: Annotated[
        int | None,
        typer.Option(min=0, help="Seed all generators by this, and shift the script's seeds by it."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing unless something is wrong.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary, after the script's output.")] = False,
) -> None:
    """Run a training script under a policy: autocast, loss scaling, master weights, without changing it.

    Ends with the script's own exit code.
    """
    from halfstep.launch import run_under_policy
    from halfstep.policy import file_name
    from halfstep.record import strict_json

    def say(message: str) -> None:
        if not quiet:
            print(f"halfstep: {message}", file=sys.stderr, flush=True)

    def announce(chosen: Policy, reason: str) -> None:
        asked = "" if policy == str(chosen) else f" (asked: {policy})"
        say(f"policy {chosen}{asked}: {reason}")

    if record is None and not no_record:
        record = (
            Path("halfstep-runs")
            / f"{script.stem}-{file_name(policy)}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.jsonl"
        )
    if record is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        record = record.with_suffix(f".rank{os.environ.get('RANK', '0')}{record.suffix}")
    done = run_under_policy(
        script,
        arguments or [],
        policy,
        device_type=device,
        record=record,
        step_limit=steps,
        seed=seed_index,
        announce=announce,
    )
    for notice in done.notices:
        say(f"note: {notice.message}" + (f" [{notice.where}]" if notice.where else ""))
    say(_summary(done))
    if as_json:
        summary = asdict(done) | {
            "policy": str(done.policy),
            "record": None if record is None else str(record),
        }
        print(json.dumps(strict_json(summary), allow_nan=False))
    raise typer.Exit(done.exit_code)


def _summary(done: Run) -> str:
    skipped = f" ({done.skipped} skipped)" if done.skipped else ""
    loss = "" if done.last_loss is None else f", last loss {done.last_loss:.4g}"
    kept = "" if done.record is None else f"; record: {done.record}"
    return (
        f"{done.outcome}: {done.steps} optimizer steps{skipped} in {done.seconds:.1f} s under {done.policy}{loss}{kept}"
    )

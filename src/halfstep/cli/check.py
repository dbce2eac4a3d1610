"""``halfstep check``: this machine's formats, the recommended policy and why, and what the installation lacks."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from halfstep.hardware import DeviceFacts

EPILOG = "Examples:  [bold]halfstep check[/]   ·   [bold]halfstep check --device cpu --measure --json[/]"

_STYLES = {"native": "green", "emulated": "yellow", "slow": "yellow", "missing": "dim", "unknown": "magenta"}


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(check)


def check(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps or xpu; default: what scripts usually take.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this CPU's products again, and remember that.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what this machine computes in, and the policy it should train under."""
    from halfstep import hardware
    from halfstep.policy import choose

    if measure:
        hardware.product_rates(anew=True)
    facts = hardware.detect(device)
    notes = installation_notes(facts)
    policy, reason = choose(facts)
    if as_json:
        answer = {
            "device": asdict(facts),
            "policy": str(policy),
            "reason": reason,
            "environment": hardware.environment(facts),
            "notes": notes,
        }
        print(json.dumps(answer, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{facts.name}[/] ({facts.type}, {facts.memory_bytes / 2**30:.1f} GiB): {facts.detail}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("format", "support", "because"):
        table.add_column(heading)
    for name, support in facts.formats.items():
        style = _STYLES[support.support]
        table.add_row(name, f"[{style}]{support.support}[/]", support.because)
    console.print(table)
    console.print(f"policy   [bold]{policy}[/]")
    console.print(f"because  {reason}")
    for note in notes:
        console.print(f"note     {note}")


def installation_notes(facts: DeviceFacts) -> list[str]:
    """What this installation lacks, or nobody has tried: what it means, and what to do."""
    import torch

    from halfstep.autocast.rules import unlisted
    from halfstep.optim import backends
    from halfstep.version import TESTED_TORCH

    notes = []
    reason = backends.lacking(facts.type)
    if reason:
        notes.append(f"halfstep.optim steps many times slower than it could: {reason}")
    if _release(torch.__version__) > _release(TESTED_TORCH):
        notes.append(
            f"PyTorch {torch.__version__} is newer than any that halfstep was tested with ({TESTED_TORCH}); "
            "nothing is known to be wrong with it"
        )
    if unlisted():
        notes.append(
            f"CUDA's autocast of this PyTorch lists ops that halfstep does not know ({', '.join(sorted(unlisted()))}): "
            "rules=cuda leaves them to type promotion"
        )
    return notes


def _release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13)."""
    return tuple(int(number) for number in version.split(".")[:2])

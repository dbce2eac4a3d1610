"""``halfstep check``: this machine's formats, the recommended policy, and why."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

EPILOG = "Examples:  [bold]halfstep check[/]   ·   [bold]halfstep check --device cpu --json[/]"

_STYLES = {"native": "green", "emulated": "yellow", "slow": "yellow", "missing": "dim", "unknown": "magenta"}


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(check)


def check(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps or xpu; default: what scripts usually take.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what this machine computes in, and the policy it should train under."""
    from halfstep import hardware
    from halfstep.policy import choose

    facts = hardware.detect(device)
    policy, reason = choose(facts)
    if as_json:
        answer = {
            "device": asdict(facts),
            "policy": str(policy),
            "reason": reason,
            "environment": hardware.environment(facts),
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

"""``halfstep demo``: the built-in GPT through ``compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfstep.hardware import DeviceFacts

EPILOG = "Examples:  [bold]halfstep demo[/]   ·   [bold]halfstep demo --steps 300 --seeds 5[/]"


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(demo)


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per policy.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Folder for records and report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as one JSON document.")] = False,
) -> None:
    """Train the built-in GPT on English text under several policies, and compare.

    About five minutes on two cores. The text is the language reference that every Python ships.
    """
    import halfstep.workloads
    from halfstep import hardware
    from halfstep.cli.compare import compare_script

    facts = hardware.detect()
    policies, why = demo_policies(facts)
    print(f"halfstep: {facts.name}: {why}", file=sys.stderr)
    script = Path(halfstep.workloads.__file__).parent / "gpt.py"
    arguments = ["--steps", str(steps)]
    raise typer.Exit(compare_script(script, arguments, ",".join(policies), steps, seeds, output, None, as_json))


def demo_policies(facts: DeviceFacts) -> tuple[list[str], str]:
    """What the demo shows on a device, and why."""
    bf16, fp16 = facts.formats["bf16"], facts.formats["fp16"]
    if bf16.support == "native":
        return ["fp32", "bf16-mixed", "bf16-master"], f"bf16 is native ({bf16.because})"
    if fp16.support == "native":
        return [
            "fp32",
            "fp16-mixed",
        ], f"bf16 is {bf16.support} ({bf16.because}), so fp16 with loss scaling is shown"
    # Its own kernels would take an hour here; rounding around FP32 arithmetic has the same losses.
    return ["fp32", "bf16-mixed:emulate"], (
        f"bf16 is {bf16.support} ({bf16.because}), so 16 bits gain no time here; emulated, they show the loss"
    )

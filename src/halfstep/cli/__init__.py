"""The command line: one file per command, and here what they share.

Exit codes: 0 fine, 1 findings, 2 usage, 3 failed; ``run`` ends with the script's own. What a command produces goes to
stdout (one JSON document with ``--json``), everything said along the way to stderr.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from halfstep.cli import check, compare, demo, doctor, explain, report, run
from halfstep.version import __version__

app = typer.Typer(
    name="halfstep",
    help="Mixed-precision training of PyTorch models: automatic, measured, explained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (check, run, compare, doctor, report, explain, demo):
    command.register(app)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"halfstep {__version__}")
        raise typer.Exit


def main() -> None:
    """The ``halfstep`` command: bad input ends in one line on stderr, never in a traceback of ours."""
    from halfstep.compare import CompareError, ScheduleError
    from halfstep.doctor.codes import UnknownCodeError
    from halfstep.doctor.diagnosis import DiagnosisError
    from halfstep.doctor.finding import SilenceError
    from halfstep.hardware import DeviceUnavailableError
    from halfstep.launch import ScriptError, UnsupportedError
    from halfstep.policy import UnknownPolicyError
    from halfstep.record import RecordError

    try:
        app()
    except (
        ScriptError,
        SilenceError,
        DiagnosisError,
        UnknownPolicyError,
        DeviceUnavailableError,
        UnsupportedError,
        RecordError,
        CompareError,
        UnknownCodeError,
    ) as error:
        print(f"halfstep: error: {error}", file=sys.stderr)
        sys.exit(2)
    except ScheduleError as error:
        print(f"halfstep: error: {error}", file=sys.stderr)
        sys.exit(3)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"halfstep: error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        print("halfstep: interrupted", file=sys.stderr)
        sys.exit(130)

"""The run record: one append-only JSONL file per run, and its reader.

A record is what is known of a run after the process is gone. The first line is the header (schema version,
policy and reason, command, environment); then one line per optimizer step, with notices and the memory
measurement between them; the last line says how the run ended. Every line is written and flushed by itself, so
a killed run leaves a readable file with at most its last line lost. Comparison and report read records and
nothing else.

JSON has no NaN or infinity, and a diverged loss is exactly what a record must keep, so non-finite numbers are
written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and read back as floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

#: Since 2 the memory of an accelerator and the host's have lines of their own.
SCHEMA_VERSION = 2
READABLE_SCHEMAS = (1, 2)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(ValueError):
    """A file is not a readable run record; the message says which, what and where."""


@dataclass(frozen=True)
class Header:
    """What was run, under which policy and why, on what."""

    started: str  #: UTC, ISO 8601
    command: tuple[str, ...]  #: script and its own arguments
    policy_requested: str
    policy: str  #: the policy in effect
    reason: str  #: why this policy
    seed: int  #: index of the seed: 0 leaves the script's own seeds alone
    environment: Mapping[str, Any]  #: versions, device, CPU flags, load, git revision
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Step:
    """One call of ``step()`` on one optimizer, applied or skipped."""

    step: int  #: 1, 2, … counted per optimizer
    optimizer: int  #: 0, 1, … in the order in which optimizers first stepped
    loss: float | None  #: sum of the losses passed to backward since the previous step of any optimizer
    seconds: float | None  #: since this optimizer's previous step; None for its first
    applied: bool
    scale: float | None  #: loss scale of this step's gradients; None without loss scaling
    grad_norm: float | None  #: 2-norm of the unscaled gradients before the script's own clipping
    rss_bytes: int  #: resident memory of the process
    device_bytes: int | None  #: peak bytes allocated on the accelerator so far; None on the CPU
    tracked: bool = False  #: the memory tracker slowed this step down: leave its time out


@dataclass(frozen=True)
class Memory:
    """Bytes of live tensors at the peak of one training step, in the memory of one kind of device."""

    step: int
    peak_bytes: int
    at_op: str | None  #: the op whose output made the peak
    by_category: Mapping[str, int]  #: parameters, masters, gradients, optimizer state, buffers, activations
    device: str | None = None  #: "cpu" for the host's memory, "cuda", …; None: of all together, in records of schema 1


@dataclass(frozen=True)
class Notice:
    """Something the user should know about how the policy met the script."""

    code: str  #: a stable slug, e.g. ``own-autocast``
    message: str
    where: str | None = None  #: file:line or parameter name


@dataclass(frozen=True)
class End:
    """How the run ended."""

    outcome: str  #: finished, step limit, interrupted or error
    exit_code: int
    seconds: float
    peak_rss_bytes: int
    error: str | None = None  #: ``Type: message`` of the exception that ended the script


Line = Header | Step | Memory | Notice | End
_KINDS: dict[str, type[Line]] = {
    "header": Header,
    "step": Step,
    "memory": Memory,
    "notice": Notice,
    "end": End,
}
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}
#: The fields in which the string "NaN" is a number; elsewhere it is text.
_NUMBERS = {cls: {f.name for f in fields(cls) if "float" in str(f.type)} for cls in _KIND_OF}


@dataclass(frozen=True)
class RunRecord:
    """A record as read back."""

    path: Path
    header: Header
    steps: tuple[Step, ...] = ()
    memory: Memory | None = None  #: of the accelerator where tensors were on one, else the host's
    notices: tuple[Notice, ...] = ()
    end: End | None = None  #: None: the process was killed, or still runs
    truncated: bool = field(default=False)  #: the last line was cut and left out
    host_memory: Memory | None = None  #: the host's, beside an accelerator's

    @property
    def losses(self) -> list[float]:
        """Loss per step of the first optimizer; NaN where a step had none."""
        return [math.nan if s.loss is None else s.loss for s in self.steps if s.optimizer == 0]


class RecordWriter:
    """Appends lines to a new record, each flushed to the operating system as it is written."""

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        """Create ``path`` and its folder and write the header.

        Raises:
            FileExistsError: the file is there already; a record is never overwritten.
            OSError: the folder cannot be written.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("x", encoding="utf-8")
        self.write(header)

    def write(self, line: Line) -> None:
        """Append one line."""
        values = {"kind": _KIND_OF[type(line)], **vars(line)}
        # One write call per line: a kill leaves whole lines and at most one cut one. ASCII, because command lines
        # and error messages may hold what UTF-8 cannot (Python's stand-ins for undecodable bytes).
        self._file.write(json.dumps(strict_json(values), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: str | os.PathLike[str]) -> RunRecord:
    """Read a record; a cut last line is left out and reported as ``truncated``.

    Raises:
        RecordError: the file is missing, empty, not a record, of a newer schema, or damaged before its last line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    raw = text.split("\n")
    complete, tail = raw[:-1], raw[-1]
    if not complete:
        what = "is empty" if not tail else "ends inside its first line"
        raise RecordError(f"{path}: {what}; the run ended before its header was written. Run it again.")
    lines = [_parse(path, number, text) for number, text in enumerate(complete, start=1)]
    header, *rest = lines
    if not isinstance(header, Header):
        raise RecordError(f"{path}:1: is not a run record: the first line is not a header")
    # The accelerator's first, whatever the order of the lines.
    measured = sorted((line for line in rest if isinstance(line, Memory)), key=lambda line: line.device == "cpu")
    return RunRecord(
        path=path,
        header=header,
        steps=tuple(line for line in rest if isinstance(line, Step)),
        memory=measured[0] if measured else None,
        host_memory=next((line for line in measured[1:] if line.device == "cpu"), None),
        notices=tuple(line for line in rest if isinstance(line, Notice)),
        end=next((line for line in rest if isinstance(line, End)), None),
        truncated=bool(tail),
    )


def find(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Record files among ``paths``: files as they are, folders by their ``*.jsonl``, sorted.

    Raises:
        RecordError: a path does not exist, or a folder holds no record.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(path.glob("*.jsonl"))
            if not inside:
                raise RecordError(f"{path}: no run records (*.jsonl) in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise RecordError(f"{path}: no such file or folder")
    return found


def _parse(path: Path, number: int, text: str) -> Line:
    where = f"{path}:{number}"
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RecordError(f"{where}: is not JSON ({error}); the record is damaged") from error
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RecordError(f"{where}: is not a line of a run record")
    cls = _KINDS[kind]
    if cls is Header and values.get("schema") not in READABLE_SCHEMAS:
        raise RecordError(
            f"{where}: record schema {values.get('schema')!r}, this halfstep reads "
            f"{' and '.join(map(str, READABLE_SCHEMAS))}; "
            "use the halfstep that wrote it, or run again"
        )
    try:
        decoded = {key: _decode(value) if key in _NUMBERS[cls] else value for key, value in values.items()}
        if cls is Header:
            decoded["command"] = tuple(decoded["command"])
        return cls(**decoded)
    except (TypeError, KeyError) as error:
        raise RecordError(f"{where}: a {cls.__name__.lower()} line lacks or has unknown fields: {error}") from error


def strict_json(value: Any) -> Any:
    """``value`` with non-finite floats as the strings that records use for them, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value

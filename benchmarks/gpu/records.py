"""What sections write, a JSON object a line, and what is made of it: one JSON document and a short summary.

A line is on the disk before the section goes on, and the document is made of lines alone, so whatever cuts a run short
(a limit, a crash, the machine taken away) loses nothing that was learnt before. Every line has ``section``, ``name``,
``kind`` and ``t`` (seconds since 1970), and its values beside them:

======= ===============================================================================================
kind    holds
======= ===============================================================================================
run     how a run was started; the document is of the last one in the file
check   ``ok``, with what was expected and what came
measure numbers
note    anything else
crash   ``error`` and ``where`` of a part that failed
status  how a section ended: ``ok``, ``limit``, ``not run: …`` or its exit code
======= ===============================================================================================
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]

SCHEMA = 1
#: In every line, beside its values.
FRAME = ("section", "name", "kind", "t", "ok")
#: What a summary leaves out.
LONG = ("where", "failures", "slowest", "tiny")
#: Characters of a summary: of what a borrowed machine prints, 12,000 come back.
SUMMARY = 11_000


def append(path: Path, section: str, name: str, kind: str, **values: Any) -> None:
    """Write a line and wait until it is on the disk; lines of several processes do not mix."""
    line = {"section": section, "name": name, "kind": kind, "t": round(time.time(), 2), **values}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(plain(line), allow_nan=False) + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any) -> Any:
    """The same in JSON's types; inf, NaN and objects as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def read(path: Path) -> list[Line]:
    """All whole lines of a file; none where there is no file."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last one of a machine that was taken away
            found.append(json.loads(text))
    return found


def document(lines: Iterable[Line]) -> dict[str, Any]:
    """The last run in these lines as one document.

    ``run``, ``environment`` and ``notes`` hold values as they were written; ``sections`` how each ended, and whether it
    was only tried (``tiny``); ``checks`` and ``crashes`` are lists of lines; ``measured`` is values by section, name.
    """
    lines = list(lines)
    begin = max((i for i, line in enumerate(lines) if line["kind"] == "run"), default=0)
    lines = lines[begin:]

    def of(kind: str) -> list[Line]:
        return [line for line in lines if line["kind"] == kind]

    measured: dict[str, dict[str, Any]] = {}
    for line in of("measure"):
        measured.setdefault(line["section"], {})[line["name"]] = values(line)
    environment = [values(line) for line in of("note") if line["name"] == "environment"]
    return {
        "schema": SCHEMA,
        "run": next((values(line) for line in of("run")), {}),
        "environment": environment[-1] if environment else {},
        "sections": {line["section"]: values(line) for line in of("status")},
        "checks": of("check"),
        "crashes": of("crash"),
        "measured": measured,
        "notes": [line for line in of("note") if line["name"] != "environment"],
    }


def values(line: Line) -> Line:
    """A line without its frame."""
    return {key: value for key, value in line.items() if key not in FRAME}


def holds(document: Mapping[str, Any]) -> bool:
    """Whether everything that was begun ended well and found what it expected."""
    ended = all(section["status"] == "ok" for section in document["sections"].values())
    return ended and not document["crashes"] and all(check["ok"] for check in document["checks"])


def summary(document: Mapping[str, Any]) -> str:
    """What went wrong first, then a line for each measurement."""
    checks = document["checks"]
    wrong = [check for check in checks if not check["ok"]]
    text = [f"{len(checks) - len(wrong)} of {len(checks)} checks hold"]
    text += [f"  FAILED {line['section']}: {line['name']}: {short(values(line), 260)}" for line in wrong[:40]]
    text += [f"  CRASH {line['section']}: {line['name']}: {line.get('error')}" for line in document["crashes"][:20]]
    states = {name: section["status"] for name, section in document["sections"].items()}
    text += [f"  {name}: {state}" for name, state in states.items() if state != "ok"]
    for section, found in document["measured"].items():
        text.append(f"{section}:")
        text += [f"  {name}: {short(numbers, 220)}" for name, numbers in found.items()]
    whole = "\n".join(text)
    return (whole if len(whole) <= SUMMARY else whole[:SUMMARY] + "\n… (the rest is in the document)") + "\n"


def short(values: Mapping[str, Any], limit: int) -> str:
    """Values on a line of at most so many characters."""
    told = {key: value for key, value in values.items() if value is not None and key not in LONG}
    text = " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in told.items()
    )
    return text if len(text) <= limit else text[:limit] + "…"


def json_text(document: Mapping[str, Any]) -> str:
    """As it stands in a file."""
    return json.dumps(document, indent=1) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that nobody finds half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)

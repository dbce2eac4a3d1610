"""The environments of several runs, as one list of facts: what they share once, what differs as a range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfstep.report.wording import count, number, size

_NAMES = {
    "cpu": "CPU",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "git": "Git",
    "gpu": "GPU",
    "halfstep": "halfstep",
    "numpy": "NumPy",
    "os": "OS",
    "pytorch": "PyTorch",
    "torch": "PyTorch",
}


def summary(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, value) of every fact that any environment has, in the order in which they first appear.

    Nested mappings become one line per leaf. Numbers that differ between runs are shown from the smallest to
    the largest; other values that differ are listed.
    """
    values: dict[str, list[Any]] = {}
    for environment in environments:
        for key, value in _flat(environment):
            values.setdefault(key, []).append(value)
    return [(_label(key), _value(key, found)) for key, found in values.items()]


def _flat(environment: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    for key, value in environment.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        facts += _flat(value, name) if isinstance(value, Mapping) else [(name, value)]
    return facts


def _label(key: str) -> str:
    words = key.removesuffix("_bytes").replace(".", ": ").replace("_", " ").split(" ")
    named = [_NAMES.get(word.rstrip(":"), word.rstrip(":")) + ":" * word.endswith(":") for word in words]
    if words[0].rstrip(":") not in _NAMES:
        named[0] = named[0].capitalize()
    return " ".join(named)


def _value(key: str, found: Sequence[Any]) -> str:
    distinct = list(dict.fromkeys(_text(key, value) for value in found))
    if len(distinct) == 1:
        return distinct[0]
    numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(found):
        return f"{_text(key, min(numbers))} to {_text(key, max(numbers))} over {count(len(found), 'run')}"
    return "; ".join(distinct)


def _text(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(key, item) for item in value) or "none"
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return size(value)
    if isinstance(value, float):
        return number(value, 3)
    return str(value)

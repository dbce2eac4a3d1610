"""Which rows a figure has when it shows a model layer by layer.

A model of a hundred layers has a thousand modules, and a reader takes in two dozen rows. Where there are more, module
paths are cut to the deepest level that fits; if that leaves only a few rows (all the layers of a transformer in one),
the next level is taken and its numbered neighbours share a row: ``blocks.0–3``. The rule that was used is always said.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

MOST_ROWS = 24
_FEW = 8  #: rows of which a coarse level has fewer than this give way to merged rows of the next level
OUTSIDE = "(outside of modules)"


@dataclass(frozen=True)
class Rows:
    """The rows from top to bottom."""

    of: Mapping[str, tuple[str, ...]]  #: a row's name -> the module paths in it
    rule: str  #: one sentence; empty where every module has a row of its own


def rows(paths: Iterable[str], most: int = MOST_ROWS) -> Rows:
    """At most ``most`` rows for these module paths, in the order in which they first appear."""
    names = list(dict.fromkeys(paths))
    levels = max((len(name.split(".")) for name in names), default=1)
    level = next((n for n in range(levels, 0, -1) if len(_cut(names, n)) <= most), 0)
    groups = _cut(names, level) if level else {}
    if level == levels:
        return Rows(_named(groups), "")
    if len(groups) < min(_FEW, most):
        groups, level, together = _merged(names, level + 1, most)
    else:
        together = 1
    cut = f"paths are cut to {level} {'part' if level == 1 else 'parts'}" if level < levels else ""
    merged = f"{together} numbered neighbours share a row" if together > 1 else ""
    if len(groups) > most:
        size = -(-len(groups) // most)
        chunks = list(groups.values())
        groups = {at: [*chain(*chunks[at : at + size])] for at in range(0, len(chunks), size)}
        merged = f"{size} neighbours share a row"
    how = ", ".join(filter(None, (cut, merged)))
    return Rows(_named(groups, level), f"{len(names):,} modules in {len(groups)} rows: {how}.")


def _cut(names: list[str], level: int) -> dict[Hashable, list[str]]:
    return _grouped(names, lambda name: ".".join(name.split(".")[:level]))


def _merged(names: list[str], level: int, most: int) -> tuple[dict[Hashable, list[str]], int, int]:
    """Groups at this level with as few numbered neighbours together as fit; one by one where none are numbered."""
    single = _cut(names, level)
    numbers = [int(part) for name in names for part in name.split(".")[:level] if part.isdecimal()]
    for together in range(2, max(numbers, default=0) + 2):
        merged = _grouped(names, lambda name, size=together: _chunk(name, level, size))  # type: ignore[misc]
        if len(merged) <= most:
            return merged, level, together
    return single, level, 1


def _chunk(name: str, level: int, size: int) -> Hashable:
    parts = name.split(".")[:level]
    at = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    return tuple(parts) if at is None else (*parts[:at], int(parts[at]) // size, *parts[at + 1 :])


def _grouped(names: list[str], key: Callable[[str], Hashable]) -> dict[Hashable, list[str]]:
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return groups


def _named(groups: Mapping[Hashable, list[str]], level: int | None = None) -> dict[str, tuple[str, ...]]:
    """The groups under the names of their rows; names stay different."""
    named: dict[str, tuple[str, ...]] = {}
    for members in groups.values():
        label = _label(members, level)
        while label in named:
            label += "′"
        named[label] = tuple(members)
    return named


def _label(members: list[str], level: int | None) -> str:
    """``blocks.0–3.mlp`` for what is alike but for a number, else the first and the last."""
    names = list(dict.fromkeys(".".join(member.split(".")[:level]) for member in members))
    first, last = names[0].split("."), names[-1].split(".")
    if len(names) == 1:
        return names[0] or OUTSIDE
    differ = [at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b]
    if len(first) == len(last) and len(differ) == 1:
        at = differ[0]
        numbers = sorted(int(part) for part in (name.split(".")[at] for name in names) if part.isdecimal())
        if len(numbers) == len(names):
            return ".".join([*first[:at], f"{numbers[0]}–{numbers[-1]}", *first[at + 1 :]])
    return f"{names[0] or OUTSIDE} … {names[-1] or OUTSIDE}"

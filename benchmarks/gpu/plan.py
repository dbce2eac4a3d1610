"""Which sections there are, in the order of running: what matters most comes first.

The two sets fit a machine that is lent for fifteen minutes, each start of it included. ``smoke`` asks whether things
are right: the tests, where steps wait, and every section of ``main`` in sizes of a second, so that code which has never
met a GPU breaks here and not in the call that measures. ``main`` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

SetName = Literal["smoke", "main", "all"]


@dataclass(frozen=True)
class Planned:
    """A section of a run.

    ``seconds`` is what it is sure to get, start of its process included; what sections before it did not need is added.
    Its code is ``run`` of the module of the same name in this folder, or of ``module``.
    """

    name: str
    seconds: float
    in_set: SetName  #: ``all``: in both
    module: str = ""
    beside: bool = False  #: runs beside the others, where nothing that they do is timed
    tiny: bool = False  #: in sizes that show that it runs, and nothing else
    long_addresses: bool = False  #: allocate in segments that can grow: the memory is nearly full

    @property
    def code(self) -> str:
        return self.module or self.name


SECTIONS = (
    Planned("environment", 20, "all"),
    Planned("numerics", 180, "smoke", beside=True),
    Planned("waits", 40, "smoke"),
    Planned("gemm", 25, "main"),
    Planned("optimizers", 50, "main"),
    Planned("training", 95, "main"),
    Planned("seven_billion", 60, "main", long_addresses=True),
    Planned("training_large", 60, "main", module="training"),
    Planned("float8", 30, "main"),
    Planned("comparison", 40, "main"),
    Planned("training_compiled", 75, "main", module="training"),
)
NAMES = tuple(section.name for section in SECTIONS)
#: Seconds for a section of `main` that is only tried: most of it is the start of its process.
REHEARSAL = 20.0


def chosen(wanted: SetName, only: Sequence[str] = (), skip: Sequence[str] = (), tiny: bool = False) -> list[Planned]:
    """The sections of a set, or ``only`` these, without those to skip; in the order of `SECTIONS`.

    Raises:
        ValueError: a name is of no section, or nothing is left.
    """
    if unknown := [name for name in [*only, *skip] if name not in NAMES]:
        raise ValueError(f"there is no section {', '.join(unknown)}; there are {', '.join(NAMES)}")
    found = []
    for section in SECTIONS:
        if section.name in skip or (only and section.name not in only):
            continue
        if only or wanted == "all" or section.in_set in ("all", wanted):
            found.append(replace(section, tiny=tiny))
        elif wanted == "smoke":
            found.append(replace(section, tiny=True, seconds=REHEARSAL))
    if not found:
        raise ValueError("no section is left to run")
    return found

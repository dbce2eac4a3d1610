"""Ordinary things that people do around a training loop, as small functions of plain PyTorch.

No file here knows halfstep. Each function trains, writes, copies or saves as scripts do and returns a few numbers;
`scenario_table` runs it without a policy and under each, and the numbers must be the same. A function's docstring says
what is done, and `scenario` what must hold.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Numbers = dict[str, float]


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    group: str  #: the name of its file
    name: str
    title: str  #: what the script does
    holds: str  #: what must be as under plain PyTorch
    act: Callable[..., Numbers]
    #: How far a number may lie from plain PyTorch's, relative to it, where the policy computes in 16 bits. Under fp32
    #: nothing may differ, and what is 0 under plain PyTorch must be 0 everywhere.
    within: float
    library: bool  #: all of its training goes through `training.step`, so that the library can do it
    #: A script that is run several times in one folder, as ``act(0)``, ``act(1)`` …: under what, "" for the policy.
    parts: tuple[str, ...]
    needs: str  #: a module without which it cannot run
    refuses: Mapping[str, str]  #: by column, the error that is raised instead
    differs: Mapping[str, str]  #: by column, what happens instead and why, where numbers differ


ALL: list[Scenario] = []


def scenario(
    holds: str,
    within: float = 0.02,
    *,
    library: bool = False,
    parts: tuple[str, ...] = (),
    needs: str = "",
    refuses: Mapping[str, str] | None = None,
    differs: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., Numbers]], Callable[..., Numbers]]:
    """Put a function into the table; see `Scenario`."""

    def put(act: Callable[..., Numbers]) -> Callable[..., Numbers]:
        group, title = act.__module__.rpartition(".")[2], (inspect.getdoc(act) or "").rstrip(".").replace("\n", " ")
        assert title and act.__name__ not in {known.name for known in ALL}
        other = refuses or {}, differs or {}
        ALL.append(Scenario(group, act.__name__, title, holds, act, within, library, parts, needs, *other))
        return act

    return put

"""Runs the scenarios without and with a policy, and writes docs/scenarios.md from what must be found.

A row of the page says "as plain" where a test has found so, and else what happens instead: each test runs all cells of
a row and compares them with what is declared beside the scenario, and `render` writes just that.

To write the page again: ``python tests/launch/scenario_table.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import halfstep
from halfstep.launch import run_under_policy

sys.path.insert(0, str(Path(__file__).parent))
from training_scripts import ALL, Numbers, Scenario, training

PAGE = Path(__file__).parents[2] / "docs" / "scenarios.md"
GROUPS = {
    "optimizers": "Optimizers, wrappers, averages",
    "gradients": "Hooks and gradients",
    "writes": "Writing to weights and reading them",
    "modules": "Models that change, share, or compute their weights",
    "losses": "Losses and derivatives",
    "files": "Files, copies and programs",
    "several": "Several models",
}
for _group in GROUPS:
    if importlib.util.find_spec(f"training_scripts.{_group}"):
        importlib.import_module(f"training_scripts.{_group}")

#: `halfstep run` with these; fp16 is emulated, since it is slow where a CPU has no unit for it.
RUN = ("fp32", "bf16-mixed", "bf16-master", "fp16-mixed:emulate", "fp16-master:emulate")
#: `halfstep.MixedPrecision` with these.
LIBRARY = ("lib bf16-mixed", "lib bf16-master", "lib fp16-master:emulate")


def of_group(group: str) -> list[Scenario]:
    return [scenario for scenario in ALL if scenario.group == group]


def columns(scenario: Scenario) -> tuple[str, ...]:
    """Those in which a row has a cell."""
    return (*RUN, *LIBRARY) if scenario.library else RUN


def check(scenario: Scenario, folder: Path, enter: Callable[[Path], None]) -> None:
    """Run every cell of a row.

    Args:
        folder: an empty one.
        enter: makes a folder the current one.

    Raises:
        AssertionError: which cells are not as declared, with their numbers.
    """

    def cell(name: str, run: Callable[[Scenario, Path], Numbers]) -> Numbers:
        place = folder / name.replace(":", "-").replace(" ", "-")
        place.mkdir()
        enter(place)
        return run(scenario, place)

    hook = sys.excepthook  # torch.distributed sets one that names the rank
    try:
        _check(scenario, cell)
    finally:
        sys.excepthook = hook


def _check(scenario: Scenario, cell: Callable[[str, Callable[[Scenario, Path], Numbers]], Numbers]) -> None:
    plain = cell("plain", _without_policy)
    assert all(math.isfinite(value) for value in plain.values()), plain
    wrong = []
    for column in columns(scenario):
        refused = scenario.refuses.get(column)
        try:
            numbers = cell(column, lambda scenario, place, column=column: _under(scenario, column, place))
        except ScriptFailedError as error:
            if refused is None or refused not in str(error):
                wrong.append(f"{column}: {error}")
            continue
        if refused is not None:
            wrong.append(f"{column}: no error any more; was expected to say {refused!r}")
        all_fp32 = column == "fp32" and {*scenario.parts} <= {"", "fp32", "plain"}
        found = _deviations(scenario, plain, numbers, all_fp32)
        if column not in scenario.differs:
            wrong += [f"{column}: {line}" for line in found]
        elif not found:
            wrong.append(f"{column}: as plain now; was expected: {scenario.differs[column]}")
    assert not wrong, "\n".join([f"{scenario.name} (within {scenario.within:.1%}):", *wrong])


class ScriptFailedError(Exception):
    """A scenario raised under a policy."""


def _deviations(scenario: Scenario, plain: Numbers, numbers: Numbers, exact: bool) -> list[str]:
    """The numbers that are not as under plain PyTorch."""
    assert numbers.keys() == plain.keys()
    within = 0.0 if exact else scenario.within
    return [
        f"{name} is {numbers[name]:.7g}, plain {value:.7g}"
        for name, value in plain.items()
        if not abs(numbers[name] - value) <= within * abs(value)
    ]


def _parts(scenario: Scenario) -> list[tuple[int, str]]:
    return list(enumerate(scenario.parts)) if scenario.parts else [(-1, "")]


def _act(scenario: Scenario, part: int) -> Numbers:
    return scenario.act() if part < 0 else scenario.act(part)


def _without_policy(scenario: Scenario, folder: Path) -> Numbers:
    numbers = {}
    for part, _ in _parts(scenario):
        numbers = _act(scenario, part)
    return numbers


def _under(scenario: Scenario, column: str, folder: Path) -> Numbers:
    if column not in LIBRARY:
        return _by_launcher(scenario, column, folder)
    try:
        return _by_library(scenario, column.removeprefix("lib "))
    except Exception as error:
        raise ScriptFailedError(f"{type(error).__name__}: {error}") from error


def _by_launcher(scenario: Scenario, policy: str, folder: Path) -> Numbers:
    """Each part as a script of its own, that `halfstep run` runs."""
    out = folder / "numbers.pt"
    for part, under in _parts(scenario):
        if under == "plain":
            numbers = _act(scenario, part)
            continue
        script = folder / f"script{part}.py"
        call = f"{scenario.name}({part if part >= 0 else ''})"
        script.write_text(
            f"import torch\nfrom training_scripts.{scenario.group} import {scenario.name}\n"
            f"torch.save({call}, {str(out)!r})\n"
        )
        run = run_under_policy(script, (), under or policy, device_type="cpu", record=folder / f"record{part}.jsonl")
        if run.exit_code:
            raise ScriptFailedError(halfstep.record.read(run.record).end.error)
        numbers = torch.load(out, weights_only=True)
    return numbers


def _by_library(scenario: Scenario, policy: str) -> Numbers:
    """With the library's three calls in the place of the loop's own."""
    precision: weakref.WeakKeyDictionary[Optimizer, halfstep.MixedPrecision] = weakref.WeakKeyDictionary()

    def step(model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> float:
        mp = precision.get(optimizer)
        if mp is None:
            mp = precision[optimizer] = halfstep.MixedPrecision(model, optimizer, policy)
        optimizer.zero_grad()
        with mp.autocast():
            value = loss()
        mp.backward(value)
        mp.step()
        return value.item()

    by_hand, training.step = training.step, step
    try:
        return scenario.act()
    finally:
        training.step = by_hand


HEAD = """\
# What people do around a training loop, under each policy

Each row is a script of plain PyTorch in `tests/launch/training_scripts/`; it knows nothing of halfstep. A test runs it
without a policy and under each, and compares the numbers it returns: "as plain" means the same bits under `fp32`, and
else within the tolerance of its row, which weights of 16 bits alone exceed wherever updates or writes are small. What
plain PyTorch gives as 0 (a resumed run beside an uninterrupted one, a value that is written and read) must be 0 under
every policy. What is not as plain says so.

The first five columns are `halfstep run` (`e`: `:emulate`); a row that names other policies is one script run several
times in one folder, under the column's policy (P) and those. The last three are `halfstep.MixedPrecision` in the
place of the loop's own three calls; "–" where the row's loop is more than these.
"""


def render() -> str:
    """The whole page."""
    lines = [HEAD]
    for group, title in GROUPS.items():
        lines += [
            f"## {title}",
            "",
            _row(["what the script does", "what must hold", *RUN, *LIBRARY]),
        ]
        lines += [_row(["---"] * (2 + len(RUN) + len(LIBRARY)))]
        for scenario in of_group(group):
            did = scenario.title + (
                f" ({', '.join(under or 'P' for under in scenario.parts)})" if scenario.parts else ""
            )
            holds = f"{scenario.holds}; {scenario.within:.0%}" if scenario.within else scenario.holds
            cells = [_cell(scenario, column) for column in (*RUN, *LIBRARY)]
            lines.append(_row([did, holds, *cells]))
        lines.append("")
    return "\n".join(lines).replace(":emulate", ":e").replace("`e`: `:e`", "`:e`: `:emulate`").rstrip() + "\n"


def _cell(scenario: Scenario, column: str) -> str:
    if column not in columns(scenario):
        return "–"
    if column in scenario.refuses:
        return f"refused: “{scenario.refuses[column]}”"
    return scenario.differs.get(column, "as plain")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(render())

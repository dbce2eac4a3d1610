"""Remedies that were tried: what a finding suggests is run again before it is recommended.

    range (HS1xx), cancellation, decisions   FP32 for the modules concerned, as few as possible; bf16 for fp16
    gradients flush (HS201)                  a loss scale
    constants, casts (HS40x)                 another constant; this line in FP32
    updates lost (HS301)                     FP32 masters

A remedy is *verified* if the finding is gone when it runs again, and nothing as bad has come in its place; else it was
*tried, did not help*. Both are said, with what was seen.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfstep import formats
from halfstep.doctor.finding import Finding, Severity, Trial
from halfstep.doctor.smallest import smallest
from halfstep.policy import Policy, PolicyOptionError, UnknownPolicyError, parse

#: Runs that may be spent on remedies of one diagnosis.
MOST_RUNS = 24

#: Times that a set of islands is made larger before it is given up.
_ROUNDS = 6

_ISLANDS = {"HS101", "HS103", "HS105", "HS106", "HS406", "HS407", "HS408"}
_NARROW = {"HS101", "HS103", "HS106", "HS201", "HS203", "HS205"}  # what fp16's small range does and bf16's does not
_LINES = _ISLANDS | {"HS404", "HS405"}
_CONSTANTS = {"HS401", "HS402", "HS403"}


class NotTriedError(RuntimeError):
    """A remedy cannot be put to this program from outside; the message says why."""


@dataclass(frozen=True)
class Line:
    """An op on a line of the script."""

    op: str
    file: str
    line: int


@dataclass(frozen=True)
class Constant:
    """A constant at an op on a line, and what to put in its place."""

    at: Line
    value: float
    better: float


@dataclass(frozen=True)
class Remedy:
    """What is done otherwise when the program runs again; nothing by default."""

    policy: str | None = None  #: under this policy instead
    islands: tuple[str, ...] = ()  #: modules in FP32, where no policy can say so
    fp32_at: tuple[Line, ...] = ()  #: ops computed in FP32
    constants: tuple[Constant, ...] = ()
    loss_scale: float | None = None  #: multiply losses by it
    masters: bool = False  #: FP32 masters for the optimizers

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Remedy:
        """The remedy that `to_json` wrote."""
        given = dict(values)
        given["islands"] = tuple(given["islands"])
        given["fp32_at"] = tuple(Line(**line) for line in given["fp32_at"])
        given["constants"] = tuple(Constant(Line(**c["at"]), c["value"], c["better"]) for c in given["constants"])
        return cls(**given)


#: Runs the program again with a remedy, and says what is found then. What it raises means that it did not run.
Rerun = Callable[[Remedy], Sequence[Finding]]


@dataclass(frozen=True)
class _Option:
    """A remedy for some findings, and how it is said."""

    remedy: Remedy
    said: str
    policy: str | None = None
    diff: str | None = None


def try_remedies(
    findings: Sequence[Finding], rerun: Rerun, policy: Policy | None, *, most_runs: int = MOST_RUNS
) -> list[Finding]:
    """The findings, those above note with the remedies that were tried for them.

    Args:
        findings: of a run under ``policy``.
        policy: None: the program chose its formats itself.
        most_runs: what is left when they are used up goes untried.
    """
    return list(_Trials(findings, rerun, policy, most_runs).run())


class _Trials:
    def __init__(self, findings: Sequence[Finding], rerun: Rerun, policy: Policy | None, most_runs: int) -> None:
        self._findings = findings
        self._rerun = rerun
        self._policy = policy
        self._left = most_runs
        self._seen: dict[Remedy, Sequence[Finding] | Exception] = {}
        self._before = {_key(finding): finding.severity for finding in findings}

    def run(self) -> Iterator[Finding]:
        bad = [finding for finding in self._findings if finding.severity > Severity.NOTE]
        islands = self._islands([f for f in bad if f.code in _ISLANDS and _module(f)])
        options = {
            id(finding): [*(option for option, whom in islands if finding in whom), *self._options(finding)]
            for finding in bad
        }
        tried = {id(f): [t for option in options[id(f)] if (t := self._tried(option, [f])) is not None] for f in bad}
        for finding in self._findings:
            trials = tried.get(id(finding), [])
            if finding in bad and all(trial.outcome != "verified" for trial in trials):
                # What has helped elsewhere may be the cause of this too: a logarithm fails because a constant vanished.
                everything = [option for known in options.values() for option in known]
                others = [option for option in everything if self._helps(option.remedy, [finding])]
                trials += [t for option in others[:1] if (t := self._tried(option, [finding])) is not None]
            trials = sorted(dict.fromkeys(trials), key=lambda trial: trial.outcome != "verified")
            yield finding.with_trials(trials) if trials else finding

    # ------------------------------------------------------------------ what could help

    def _options(self, finding: Finding) -> Iterator[_Option]:
        if finding.code in _NARROW and (wide := _in_bf16(self._policy)) is not None:
            yield _Option(Remedy(policy=wide), f"bf16 instead of fp16: policy {wide}", policy=wide)
        if finding.code == "HS201":
            scale = finding.numbers.get("suggested_scale")
            if isinstance(scale, float) and (self._policy is None or not self._policy.loss_scaling):
                said = f"scale the loss by {scale:g}: GradScaler(init_scale={scale:g})"
                yield _Option(Remedy(loss_scale=scale), said)
        if finding.code in ("HS301", "HS304", "HS305"):
            yield _Option(Remedy(masters=True), "FP32 masters: optimizer = halfstep.MasterWeights(optimizer)")
        place = finding.place
        if place is None or place.file is None or place.line is None or place.phase != "forward":
            return
        line = Line(place.op, place.file, place.line)
        if finding.code in _CONSTANTS and (constant := _better(finding, line)) is not None:
            said = f"{constant.better:g} instead of {constant.value:g}"
            yield _Option(Remedy(constants=(constant,)), said, diff=_diff(constant))
        if finding.code in _LINES | _CONSTANTS and not _module(finding):
            yield _Option(Remedy(fp32_at=(line,)), f"compute {place.op} on line {place.line} in FP32")

    def _islands(self, findings: Sequence[Finding]) -> list[tuple[_Option, Sequence[Finding]]]:
        """FP32 for as few modules as help all of these findings; or for each one's, where no set helps all."""
        if not findings:
            return []
        modules = _modules(findings)
        for _ in range(_ROUNDS):
            remedy = self._island(modules).remedy
            if self._helps(remedy, findings):
                fewest = smallest(modules, lambda some: self._helps(self._island(some).remedy, findings))
                return [(self._island(fewest), findings)]
            after = self._after(remedy)
            if after is None or isinstance(after, Exception):
                break
            # What an island gives in FP32, the next module cannot take: it needs to be one too. Where nothing new has
            # come, an op overflows because of what the module around it adds up.
            further = [path for path in _modules([f for f in after if f.code in _ISLANDS]) if path not in modules]
            wider = list(dict.fromkeys([*modules, *further])) if further else _around(modules)
            if wider == modules:
                break
            modules = wider
        return [(self._island([path]), [finding]) for finding in findings if (path := _module(finding))]

    def _island(self, modules: Sequence[str]) -> _Option:
        names = ", ".join(modules)
        if self._policy is not None and self._policy.lowers:
            kept = tuple(dict.fromkeys([*self._policy.keep_fp32, *modules]))
            text = str(replace(self._policy, keep_fp32=kept))
            return _Option(Remedy(policy=text), f"FP32 for {names}", policy=text)
        listed = ", ".join(f'"{name}"' for name in modules)
        return _Option(Remedy(islands=tuple(modules)), f"FP32 for {names}: halfstep.keep_fp32(model, [{listed}])")

    # ------------------------------------------------------------------ trying it

    def _tried(self, option: _Option, findings: Sequence[Finding]) -> Trial | None:
        after = self._after(option.remedy)
        if after is None or isinstance(after, NotTriedError):
            return None
        if isinstance(after, Exception):
            evidence = f"it did not run: {type(after).__name__}: {str(after).splitlines()[0] if str(after) else ''}"
            return Trial(option.said, "tried, did not help", evidence, option.policy, option.diff)
        worse = self._worse(after, findings)
        left = sum(finding.severity > Severity.NOTE for finding in after)
        before = sum(finding.severity > Severity.NOTE for finding in self._findings)
        if worse is None:
            evidence = f"run again: {findings[0].code} is gone; {left} findings above note, {before} before"
            return Trial(option.said, "verified", evidence, option.policy, option.diff)
        return Trial(option.said, "tried, did not help", f"run again: {worse}", option.policy, option.diff)

    def _helps(self, remedy: Remedy, findings: Sequence[Finding]) -> bool:
        after = self._after(remedy)
        return after is not None and not isinstance(after, Exception) and self._worse(after, findings) is None

    def _worse(self, after: Sequence[Finding], findings: Sequence[Finding]) -> str | None:
        """What speaks against a remedy: one of the findings is still there, or another one as bad has come."""
        there = {_key(finding): finding for finding in after}
        for finding in findings:
            same = there.get(_key(finding))
            if same is not None and same.severity >= finding.severity:
                return f"{finding.code} is still there ({same.what})"
        worst = max(finding.severity for finding in findings)
        new = [f for f in after if f.severity >= worst and f.severity > self._before.get(_key(f), Severity.NOTE)]
        return f"{new[0].code} has come instead ({new[0].what} at {new[0].place})" if new else None

    def _after(self, remedy: Remedy) -> Sequence[Finding] | Exception | None:
        """What is found with a remedy, run once; None when all runs are used up."""
        if remedy not in self._seen:
            if self._left == 0:
                return None
            self._left -= 1
            try:
                self._seen[remedy] = self._rerun(remedy)
            except Exception as error:
                self._seen[remedy] = error
        return self._seen[remedy]


def _key(finding: Finding) -> tuple[str, str, str | None, int | None]:
    """What makes it the same finding in another run: a remedy may change the op."""
    place = finding.place
    return (finding.code, "", None, None) if place is None else (finding.code, place.module, place.file, place.line)


def _module(finding: Finding) -> str | None:
    """The path of the module that it is in; None outside of modules and in the outermost one."""
    place = finding.place
    if place is None or not place.module or place.module == place.module_type or place.phase == "optimizer":
        return None
    return place.module


def _modules(findings: Iterable[Finding]) -> list[str]:
    return list(dict.fromkeys(path for finding in findings if (path := _module(finding))))


def _around(modules: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[0] or path for path in modules))


def _in_bf16(policy: Policy | None) -> str | None:
    """A policy's text with bf16 for fp16; None where it has no fp16."""
    if policy is None or policy.compute != "fp16":
        return None
    text = str(policy).replace("fp16", "bf16", 1)
    try:
        return str(parse(text))
    except (UnknownPolicyError, PolicyOptionError):
        return None


# ------------------------------------------------------------------ constants


def _better(finding: Finding, line: Line) -> Constant | None:
    """A constant that the format can hold, for one that it cannot: a round number, as people write them."""
    value, name = finding.numbers.get("constant"), finding.numbers.get("format")
    if not isinstance(value, float) or not isinstance(name, str):
        return None
    format = formats.of(name)
    if finding.code == "HS401":
        better = math.copysign(10.0 ** math.ceil(math.log10(format.tiny)), value)
    elif finding.code == "HS402":
        better = math.copysign(1 - 10.0 ** math.ceil(math.log10(format.eps / 2)), value)
    else:
        better = math.copysign(format.max, value)
    return Constant(line, value, better)


def _diff(constant: Constant) -> str | None:
    """The change to the source line, where the constant stands in it as a number."""
    try:
        lines = Path(constant.at.file).read_text(encoding="utf-8").splitlines(keepends=True)
        before = lines[constant.at.line - 1]
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    after = "".join(_replaced(before, constant))
    if after == before:
        return None
    changed = [*lines[: constant.at.line - 1], after, *lines[constant.at.line :]]
    name = constant.at.file
    return "".join(difflib.unified_diff(lines, changed, f"a/{name}", f"b/{name}", n=1))


_NUMBER = re.compile(r"(?<![\w.])(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")


def _replaced(text: str, constant: Constant) -> Iterable[str]:
    end = 0
    for match in _NUMBER.finditer(text):
        yield text[end : match.start()]
        same = float(match.group()) == abs(constant.value)
        yield f"{abs(constant.better):g}" if same else match.group()
        end = match.end()
    yield text[end:]

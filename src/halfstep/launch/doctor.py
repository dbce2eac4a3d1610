"""`diagnose`: a script through the doctor's stages, each in a process of its own, and what they learnt as one document.

::

    profile   the script in FP32, a few steps: exponents of every op; the lint at the first optimizer step
    predict   from the profile, without running anything: what each format would do to it
    examine   the script under the asked policy, a few steps: every op beside its FP32 shadow
    remedies  what helps against the findings: tried by examining again under another policy

A stage reports as it goes (`halfstep.launch.child`), so a script that raises, crashes in a kernel, is killed for its
memory or never trains loses nothing that was found before; the diagnosis says in its notes what happened.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfstep import hardware
from halfstep.doctor import finding as finding_text
from halfstep.doctor.diagnosis import DiagnosedStep, Diagnosis
from halfstep.doctor.finding import Finding, Severity, Silence, ordered, without_silenced
from halfstep.doctor.predict import findings_of, predict
from halfstep.doctor.prediction import FormatPrediction
from halfstep.doctor.remedy import NotTriedError, Remedy, try_remedies
from halfstep.launch.child import Ended, Request, Stage, last_line, run_stage
from halfstep.launch.script import load
from halfstep.launch.session import Session
from halfstep.observe.ops import Profile
from halfstep.policy import parse, resolve
from halfstep.processes import sigterm_raises

DEFAULT_STEPS = 3
DEFAULT_TIMEOUT = 900.0
#: A stage that runs so long is spoken of, and again each time that its time has doubled.
SLOW_SECONDS = 60.0
#: Each is a process that starts the script again.
MOST_REMEDY_RUNS = 12


@dataclass(frozen=True)
class Told:
    """Something to say while the doctor works: a stage that starts, a finding, a note, a long wait."""

    kind: str  #: stage, finding, note or wait
    text: str
    finding: Finding | None = None


class InterruptedDiagnosisError(KeyboardInterrupt):
    """The user stopped the doctor; ``diagnosis`` holds what was found so far."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__("interrupted")
        self.diagnosis = diagnosis


@dataclass
class _Learnt:
    """What one stage's lines said so far."""

    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)
    shown: set[tuple[str, str]] = field(default_factory=set)
    steps: list[dict[str, Any]] = field(default_factory=list)
    profile: Profile | None = None
    end: dict[str, Any] | None = None
    failure: str | None = None
    not_tried: str | None = None  #: why a remedy could not be put to the script

    @property
    def got_somewhere(self) -> bool:
        """Whether an optimizer step was seen, or a script that takes none came to its end."""
        return bool(self.steps) or self.failure is None


def diagnose(
    script: Path,
    arguments: Sequence[str],
    policy: str,
    folder: Path,
    *,
    device_type: str | None = None,
    steps: int = DEFAULT_STEPS,
    timeout: float = DEFAULT_TIMEOUT,
    silence: Sequence[str] = (),
    remedies: bool = True,
    tell: Callable[[Told], None] = lambda told: None,
) -> tuple[Diagnosis, bool]:
    """Take ``script`` through all stages; the diagnosis, and whether at least one stage got somewhere.

    Args:
        folder: made if missing; takes the stages' lines and the script's own output, ``profile.log`` and so on.
        steps: optimizer steps per stage, of the script's first optimizer.
        timeout: seconds per stage, after which it ends with what it has.
        silence: rules for findings to drop.
        tell: told of stages, findings and notes as they come.

    Raises:
        ScriptError, UnknownPolicyError, DeviceUnavailableError, UnsupportedError, SilenceError, OSError: before the
            script starts.
        InterruptedDiagnosisError: Ctrl-C; carries what was found so far.
    """
    load(script)
    facts = hardware.detect(device_type)
    chosen, reason = resolve(policy, facts)
    Session(policy, chosen, facts.type, lambda line: None)  # says of a policy that it cannot be put under a script
    doctor = _Doctor(
        Request("profile", str(script), tuple(arguments), str(chosen), policy, device_type, steps, tuple(silence), ""),
        folder,
        timeout,
        [Silence.parse(rule) for rule in silence],
        tell,
    )
    prepare(folder)
    doctor.enter()
    blank = Diagnosis(
        command=(str(script), *arguments),
        policy_requested=policy,
        policy=str(chosen),
        reason=reason,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=hardware.environment(facts),
    )
    with sigterm_raises():
        try:
            doctor.work(remedies)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM
            doctor.note("the doctor was interrupted; this is what was found until then")
            raise InterruptedDiagnosisError(doctor.diagnosis(blank)) from None
    return doctor.diagnosis(blank), doctor.got_somewhere


def prepare(folder: Path) -> None:
    """Make the folder.

    Raises:
        OSError: it cannot be written, or holds a diagnosis already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "cannot be written; name another folder with --output", str(folder))
    there = [path for path in (folder / "doctor.json", folder / "profile.jsonl") if path.exists()]
    if there:
        raise FileExistsError(17, "is there already, and is never overwritten; name another folder", str(there[0]))


class _Doctor:
    """The stages of one diagnosis, and what came of them."""

    def __init__(
        self,
        request: Request,
        folder: Path,
        timeout: float,
        silence: Sequence[Silence],
        tell: Callable[[Told], None],
    ) -> None:
        self._request = request
        self._folder = folder
        self._timeout = timeout
        self._silence = silence
        self._tell = tell
        self._stages: dict[str, _Learnt] = {}
        self._number = 0
        self._predictions: tuple[FormatPrediction, ...] = ()
        self._predicted: list[Finding] = []
        self._tried: list[tuple[Finding, Finding]] = []  # before and after remedies were tried
        self._notes: list[str] = []

    def enter(self) -> None:
        """Know the folder by its full path: a script may go elsewhere."""
        self._folder = self._folder.resolve()

    def work(self, remedies: bool) -> None:
        profile = self._stage("profile", "profile", self._request.requested)
        self._predict(profile.profile)
        examined = self._stage("examine", "examine", self._request.requested)
        findings = without_silenced(examined.findings.values(), self._silence)
        if not remedies or not any(item.severity > Severity.NOTE for item in findings):
            return
        if _world_size() > 1:
            self.note("remedies are not tried under several ranks: what one rank finds, the others may not")
            return
        try:
            # What does not come back without a remedy cannot be verified to have gone by one.
            again = {(item.code, item.place) for item in self._rerun(Remedy())}
            old = [item for item in findings if (item.code, item.place) in again]
            new = try_remedies(old, self._rerun, parse(self._request.policy), most_runs=MOST_REMEDY_RUNS)
            self._tried = list(zip(old, new, strict=True))
        except Exception as error:
            self.note(f"remedies could not be tried: {type(error).__name__}: {error}")

    @property
    def got_somewhere(self) -> bool:
        return any(learnt.got_somewhere for learnt in self._stages.values())

    def diagnosis(self, blank: Diagnosis) -> Diagnosis:
        """What is known now."""
        profile, examine = self._stages.get("profile", _Learnt()), self._stages.get("examine", _Learnt())
        ran = (examine.end or {}).get("policy", blank.policy)
        return replace(
            blank,
            policy=ran,
            findings=tuple(ordered(self._all())),
            predictions=self._predictions,
            profile=profile.profile,
            steps=_diagnosed(examine.steps, profile.steps),
            notes=tuple(self._notes),
        )

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
            self._say("note", text)

    def _all(self) -> list[Finding]:
        """In the order of the stages: linted, predicted, examined."""
        lint, examined = (self._stages.get(name, _Learnt()).findings.values() for name in ("profile", "examine"))
        tried = {id(old): new for old, new in self._tried}
        now = [tried.get(id(item), item) for item in examined]
        return without_silenced([*lint, *self._predicted, *now], self._silence)

    # ------------------------------------------------------------------ stages

    def _predict(self, profile: Profile | None) -> None:
        if profile is None:
            self.note("nothing was predicted: no FP32 step was profiled")
            return
        try:
            self._predictions = predict(profile)
            self._predicted = list(findings_of(self._predictions, parse(self._request.policy)))
        except Exception as error:
            self.note(f"nothing was predicted: {type(error).__name__}: {error}")
        for item in self._predicted:
            self._show(item)

    def _rerun(self, remedy: Remedy) -> list[Finding]:
        """Examine again with ``remedy``."""
        name = f"remedy-{sum(name.startswith('remedy-') for name in self._stages) + 1}"
        learnt = self._stage(name, "examine", remedy.policy or self._request.requested, remedy)
        if learnt.not_tried is not None:
            raise NotTriedError(learnt.not_tried)
        if learnt.failure is not None:
            raise RuntimeError(f"the script {learnt.failure}")
        return without_silenced(learnt.findings.values(), self._silence)

    def _stage(self, name: str, stage: Stage, policy: str, remedy: Remedy | None = None) -> _Learnt:
        quiet = remedy is not None
        self._number += 1
        learnt = self._stages[name] = _Learnt()
        chosen = self._request.policy if policy == self._request.requested else policy
        lines, log = self._folder / f"{name}.jsonl", self._folder / f"{name}.log"
        request = replace(
            self._request,
            stage=stage,
            policy=chosen,
            requested=policy,
            lines=str(lines),
            number=self._number,
            remedy=None if remedy is None else remedy.to_json(),
        )
        under = "fp32" if stage == "profile" else chosen
        length = "1 step" if request.steps == 1 else f"up to {request.steps} steps"
        self._say("stage", f"{name}: {length} under {under}")
        spoken = SLOW_SECONDS

        def wait(seconds: float) -> None:
            nonlocal spoken
            if seconds > spoken:
                spoken *= 2
                text = f"{name}: {seconds:.0f} s so far; seen from inside, steps take 5 to 100 times their time"
                self._say("wait", f"{text} (--timeout {self._timeout:.0f} ends it, --steps 1 shortens it)")

        ended = run_stage(
            [sys.executable, "-m", "halfstep.launch.stage", request.to_text()],
            lines,
            log,
            lambda line: self._take(learnt, line, quiet),
            environment=os.environ,
            timeout=self._timeout,
            on_wait=wait,
        )
        self._account(name, learnt, ended, quiet)
        return learnt

    def _take(self, learnt: _Learnt, line: Mapping[str, Any], quiet: bool) -> None:
        """One line of a stage."""
        try:
            match line["kind"]:
                case "finding":
                    self._found(learnt, [line["finding"]], quiet)
                case "findings":  # all as they stand: some may have been taken back
                    learnt.findings.clear()
                    self._found(learnt, line["findings"], quiet)
                case "profile":
                    learnt.profile = Profile.from_json(line["profile"])
                case "step":
                    learnt.steps.append(dict(line))
                case "note" if not quiet:
                    self.note(line["text"])
                case "not tried":
                    learnt.not_tried = str(line["why"])
                case "end":
                    learnt.end = dict(line)
        except (KeyError, TypeError, ValueError) as error:  # one bad line loses itself only
            self.note(f"a line of a stage could not be read: {type(error).__name__}: {error}")

    def _found(self, learnt: _Learnt, items: Sequence[Mapping[str, Any]], quiet: bool) -> None:
        for values in items:
            item = finding_text.from_json(values)
            key = (item.code, item.what if item.place is None else str(item.place))
            learnt.findings[key] = item
            if key not in learnt.shown and not quiet:
                self._show(item)
            learnt.shown.add(key)

    def _account(self, name: str, learnt: _Learnt, ended: Ended, quiet: bool) -> None:
        """Say in the notes what kept a stage from its end."""
        end = learnt.end or {}
        learnt.failure = ended.failure
        if learnt.failure is None and end.get("outcome") == "error":
            last = last_line(ended.log)
            learnt.failure = f"ended with exit code {end.get('exit_code')}" + (f": {last}" if last else "")
        elif learnt.failure is None and end.get("outcome") in ("stopped", "interrupted"):
            learnt.failure = "was told to stop"
        if quiet:
            return
        taken = len(learnt.steps)
        if learnt.failure is not None:
            what = f"{name}: the script {learnt.failure} (after {taken} of {self._request.steps} steps)"
            self.note(f"{what}; what was seen until then is here, its output in {ended.log}")
        elif not taken and end.get("forwards"):
            self.note(f"{name}: no optimizer stepped, so only forward passes were seen ({end['forwards']})")

    # ------------------------------------------------------------------ telling

    def _say(self, kind: str, text: str) -> None:
        self._tell(Told(kind, text))

    def _show(self, item: Finding) -> None:
        if without_silenced([item], self._silence):
            self._tell(Told("finding", str(item), item))


def _diagnosed(steps: Sequence[Mapping[str, Any]], in_fp32: Sequence[Mapping[str, Any]]) -> tuple[DiagnosedStep, ...]:
    """The steps under the policy; per layer the share of zero gradients beyond FP32's in the same step.

    Without that step in FP32 the share is not known, and left out: gradients of unused embeddings, or behind a ReLU,
    are zero in every format.
    """
    reference = {step["step"]: step["zeros"] for step in in_fp32}
    found = []
    for step in steps:
        there = reference.get(step["step"], {})
        underflow = {
            layer: max(0.0, zeros / total - there[layer][0] / there[layer][1])
            for layer, (zeros, total) in step["zeros"].items()
            if total and layer in there and there[layer][1]
        }
        loss, scale = (None if step[key] is None else float(step[key]) for key in ("loss", "scale"))
        found.append(DiagnosedStep(step["step"], loss, step["applied"], scale, underflow))
    return tuple(found)


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))

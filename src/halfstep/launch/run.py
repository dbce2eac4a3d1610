"""`run_under_policy`: a script, a policy, a record.

Order: everything that can be wrong before the script starts is found before the script starts (policy, device,
script, record folder); then the header is written, patches go in, the script runs, patches come out, and the end
line is written whatever happened.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch

from halfstep import hardware
from halfstep.autocast import Float32Switches
from halfstep.launch.patches import Patches
from halfstep.launch.script import Outcome, load, run
from halfstep.launch.seeds import seeded
from halfstep.launch.session import Session, Watcher
from halfstep.launch.steps import StepLimitReached
from halfstep.observe import peak_resident_bytes
from halfstep.policy import Policy, resolve
from halfstep.record import End, Header, Memory, Notice, RecordWriter, Step


class RunWatcher(Watcher, Protocol):
    """Sees a whole run from inside: opened before the script starts, closed when it has ended, however."""

    def opened(self, session: Session) -> None: ...

    def line(self, line: Step | Memory | Notice) -> None:
        """What goes into the run record."""

    def closed(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """A run that ended."""

    policy: Policy
    reason: str
    exit_code: int
    outcome: str  #: finished, step limit, interrupted or error
    steps: int
    skipped: int
    seconds: float
    last_loss: float | None
    notices: tuple[Notice, ...]
    record: Path | None


def run_under_policy(
    script: Path,
    arguments: Sequence[str],
    policy: str = "auto",
    *,
    device_type: str | None = None,
    record: Path | None = None,
    step_limit: int | None = None,
    seed: int | None = None,
    announce: Callable[[Policy, str], None] | None = None,
    watcher: RunWatcher | None = None,
) -> Run:
    """Run ``script`` as ``__main__`` under ``policy``.

    Args:
        policy: a policy's name or "auto".
        device_type: the device that the policy is chosen for; None takes the machine's accelerator, else its CPU.
        record: where to write the run record; None writes none.
        step_limit: end the script after so many steps of its first optimizer.
        seed: seed all generators by this index, and shift the script's own seeds by it.
        announce: called with *(policy, reason)* before the script starts.
        watcher: sees the run from inside. Memory is not measured then: its tracker does not nest with other modes.

    Raises:
        ScriptError, UnknownPolicyError, DeviceUnavailableError, UnsupportedError, OSError: before the script starts.
    """
    code = load(script)
    facts = hardware.detect(device_type)
    chosen, reason = resolve(policy, facts)
    seen = _Seen()
    session = Session(policy, chosen, facts.type, seen.write, step_limit)
    session.devices.expected = facts.name
    header = Header(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=(_shown(script), *arguments),
        policy_requested=policy,
        policy=str(chosen),
        reason=reason,
        seed=seed or 0,
        environment={**hardware.environment(facts), "git": _git_revision(script)},
    )
    seen.writer = _open(record, header) if record is not None else None
    if announce is not None:
        announce(chosen, reason)
    started = time.perf_counter()
    patches = Patches(session)
    outcome: Outcome | None = None
    try:
        with ExitStack() as stack:
            stack.callback(session.close)
            stack.callback(patches.remove)
            if seed is not None:
                stack.enter_context(seeded(seed))
            stack.callback(Float32Switches.read().put_back)
            session.float32.exact_beside_16_bit = watcher is not None
            session.float32.hold()
            if chosen.lowers:
                stack.enter_context(_without_fused_attention())
            patches.install()
            if watcher is not None:
                session.watcher, seen.watcher, session.steps.measures_memory = watcher, watcher, False
                stack.callback(watcher.closed)
                watcher.opened(session)
            try:
                outcome = run(script, code, arguments)
            except StepLimitReached as limit:
                outcome = Outcome(0, limit)
        for notice in _closing_notices(session, chosen, outcome):
            seen.write(notice)
    finally:
        # Reached without an outcome only by what no script may catch; the record still says that it ended.
        outcome = outcome or Outcome(3)
        name = _outcome_name(outcome)
        seconds = time.perf_counter() - started
        if seen.writer is not None:
            message = f"{type(outcome.error).__name__}: {outcome.error}" if name == "error" else None
            seen.writer.write(End(name, outcome.exit_code, seconds, peak_resident_bytes(), message))
            seen.writer.close()
    return Run(
        policy=session.policy,
        reason=reason,
        exit_code=outcome.exit_code,
        outcome=name,
        steps=session.steps.seen,
        skipped=seen.skipped,
        seconds=seconds,
        last_loss=seen.last_loss,
        notices=tuple(seen.notices),
        record=record,
    )


def _open(record: Path, header: Header) -> RecordWriter:
    try:
        return RecordWriter(record, header)
    except FileExistsError as error:
        why = "is there already, and a record is never overwritten; name another with --record"
        raise FileExistsError(error.errno, why, str(record)) from error
    except OSError as error:
        why = f"the record cannot be written here ({error.strerror}); name another place with --record, or --no-record"
        raise OSError(error.errno, why, str(record)) from error


class _Seen:
    """Passes lines on to the record, and keeps what the closing summary says."""

    def __init__(self) -> None:
        self.writer: RecordWriter | None = None
        self.watcher: RunWatcher | None = None
        self.notices: list[Notice] = []
        self.skipped = 0
        self.last_loss: float | None = None

    def write(self, line: Step | Memory | Notice) -> None:
        if self.writer is not None:
            self.writer.write(line)
        if self.watcher is not None:
            self.watcher.line(line)
        if isinstance(line, Notice):
            self.notices.append(line)
        elif isinstance(line, Step):
            self.last_loss = line.loss
            self.skipped += not line.applied


def _outcome_name(outcome: Outcome) -> str:
    if isinstance(outcome.error, StepLimitReached):
        return "step limit"
    if isinstance(outcome.error, KeyboardInterrupt):
        return "interrupted"
    return "finished" if outcome.exit_code == 0 else "error"


def _closing_notices(session: Session, policy: Policy, outcome: Outcome) -> list[Notice]:
    if outcome.exit_code != 0:
        return []
    if session.steps.seen == 0:
        if session.backwards_seen:
            what = f"backward was called {session.backwards_seen} times, but no optimizer ever stepped"
        else:
            what = (
                "backward was never called in this process, so there is nothing that a policy could change. If the "
                "script starts processes that train, start them with torchrun: "
                "torchrun … --no-python halfstep run SCRIPT"
            )
        return [Notice("no-training", what)]
    if policy.lowers and session.forwards_seen == 0:
        return [
            Notice(
                "no-module-call",
                f"the script never called an nn.Module with parameters, so nothing ran in {policy.compute}: "
                "call the model (model(x)), not its methods (model.forward(x))",
            )
        ]
    return []


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Inference in nn.TransformerEncoder and MultiheadAttention fuses past autocast, with whatever dtypes it meets."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _shown(script: Path) -> str:
    """The script as a reader knows it: a built-in one by its place in halfstep, others as they were named."""
    package = Path(hardware.__file__).parent
    if script.resolve().is_relative_to(package):
        return str(Path("halfstep") / script.resolve().relative_to(package))
    return str(script)


def _git_revision(script: Path) -> str | None:
    """Commit of the repository that the script is in, with "+" if its files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(script.resolve().parent), *words]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, env=environment, check=True)
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no repository, no commit yet

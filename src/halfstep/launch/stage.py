"""One stage of the doctor, in its own process: the script as ``__main__``, seen from inside.

``python -m halfstep.launch.stage REQUEST`` runs the script as ``halfstep run`` would and appends what it learns to the
request's file, a JSON line at a time. Two kinds:

*profile*: the script in FP32. From the first call of a module on, every op's exponents are counted; at the first
optimizer step, modules and optimizers are held against the policy that was asked for (the lint). Nothing before that
first call is counted: preparing data is not what a policy would run in 16 bits.

*examine*: the script under the asked policy, with the examination from its first line to its last.

A failure of ours becomes a note, once, and the script goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _pop_mode, _push_mode

from halfstep import hardware
from halfstep.doctor import finding as findings
from halfstep.doctor.examination import Examination
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.doctor.remedy import Remedy
from halfstep.doctor.trial import applied, changes
from halfstep.launch.child import Request
from halfstep.launch.run import Run, run_under_policy
from halfstep.launch.session import Session
from halfstep.launch.steps import StepLimitReached, compiled_frames
from halfstep.observe.ops import OpObserver
from halfstep.policy import POLICIES, parse
from halfstep.record import Memory, Notice, Step, strict_json
from halfstep.scale import GradScaler

#: A profile is written after each step, and within a long one so often.
PROFILE_SECONDS = 5.0


class ToldToEnd(StepLimitReached):
    """SIGTERM came: the stage's time is up, and what it saw is written before it goes."""


class StageWatcher:
    """What both kinds do: findings, steps and notes into the file, and nothing of ours into the script."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.session: Session | None = None
        self.forwards = 0
        self._lines: Path | None = Path(request.lines)
        self._said: set[str] = set()
        self._zeros: dict[str, list[int]] = {}
        self._roots: list[weakref.ref[nn.Module]] = []

    # ------------------------------------------------------------------ told by the session

    def opened(self, session: Session) -> None:
        self.session = session

    def forward_starts(self, module: nn.Module) -> None:
        self.forwards += 1
        if not any(reference() is module for reference in self._roots):
            self._roots.append(weakref.ref(module))

    def forward_ended(self) -> None: ...

    def backward_ended(self) -> None: ...

    def step_starts(self, optimizer: Optimizer) -> None:
        if self.session is not None and next(iter(self.session.stepped), optimizer) is optimizer:
            with self.ours("counting zero gradients"):
                self._zeros = self._zero_gradients(optimizer)

    def line(self, line: Step | Memory | Notice) -> None:
        if isinstance(line, Notice):
            self.note(line.message + (f" [{line.where}]" if line.where else ""))
        elif isinstance(line, Step) and line.optimizer == 0:
            values = {"step": line.step, "loss": line.loss, "applied": line.applied, "scale": line.scale}
            self.write("step", **values, zeros=self._zeros)
            self._zeros = {}

    def closed(self) -> None: ...

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Takes every dispatch mode off: what is computed here belongs to no one's profile."""
        modes = [_pop_mode() for _ in range(torch._C._len_torch_dispatch_stack())]
        try:
            yield
        finally:
            for mode in reversed(modes):
                _push_mode(mode)

    # ------------------------------------------------------------------ what is learnt

    def write(self, kind: str, **values: Any) -> None:
        if self._lines is not None:
            line = json.dumps(strict_json({"kind": kind, **values}), allow_nan=False) + "\n"
            with self._lines.open("a", encoding="utf-8") as file:  # closed again: nothing waits in a buffer
                file.write(line)

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.write("note", text=text)

    def found(self, finding: Finding) -> None:
        self.write("finding", finding=findings.to_json(finding))

    @contextlib.contextmanager
    def ours(self, what: str) -> Iterator[None]:
        """Our own work inside the script's run: unseen by modes, without gradients, and never its end."""
        try:
            with self.aside(), torch.no_grad():
                yield
        except Exception as error:
            self.note(f"{what} failed and was left out: {type(error).__name__}: {error}")
            traceback.print_exc()

    def modules(self) -> list[nn.Module]:
        """The outermost modules called so far, in that order."""
        return [module for reference in self._roots if (module := reference()) is not None]

    def optimizers(self) -> list[Optimizer]:
        return [] if self.session is None else list(self.session.stepped)

    def _zero_gradients(self, optimizer: Optimizer) -> dict[str, list[int]]:
        """Per layer, how many elements of its gradients are zero, and of how many."""
        names = {id(p): name for module in self.modules() for name, p in module.named_parameters()}
        layers: list[str] = []
        counts: list[Tensor] = []
        sizes: list[int] = []
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            gradient = parameter.grad
            if gradient is None or gradient.layout is not torch.strided:
                continue
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            name = names.get(id(parameter), "outside of modules.")
            layers.append(plain(name).rpartition(".")[0] or "model")
            counts.append((local == 0).sum().cpu())
            sizes.append(local.numel())
        shares: dict[str, list[int]] = {}
        for layer, zeros, size in zip(layers, torch.stack(counts).tolist() if counts else [], sizes, strict=True):
            share = shares.setdefault(layer, [0, 0])
            share[0] += zeros
            share[1] += size
        return shares

    def forget(self) -> None:
        """In a forked child, which has its parent's modes and handlers: there they must do nothing."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for _ in range(torch._C._len_torch_dispatch_stack()):
            _pop_mode()
        self._lines = None


def plain(name: str) -> str:
    """A parameter's name without what wrappers (DDP, compiled modules) put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


class ProfileWatcher(StageWatcher):
    """The script in FP32: exponents of every op, and the lint at the first step."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._observer: OpObserver | None = None
        self._profiled_at: float | None = None
        self._linted = False
        self._lowers_itself = False
        self._compiled_before = compiled_frames()

    def forward_starts(self, module: nn.Module) -> None:
        super().forward_starts(module)
        self._observe()

    def forward_ended(self) -> None:
        self._write_profile(PROFILE_SECONDS)

    def backward_ended(self) -> None:
        self._observe()  # a script without modules: from its second step on
        self._write_profile(PROFILE_SECONDS)

    def step_starts(self, optimizer: Optimizer) -> None:
        super().step_starts(optimizer)
        self._lint()

    def line(self, line: Step | Memory | Notice) -> None:
        super().line(line)
        if isinstance(line, Step) and line.optimizer == 0:
            self._write_profile()
        elif isinstance(line, Notice) and line.code in ("own-autocast", "own-16-bit-parameters"):
            self._lowers_itself = True
            self.note("the script lowers its numbers itself, so predictions are made from already rounded ones")

    def closed(self) -> None:
        if self.modules():
            self._lint()
        if self._observer is not None:
            try:
                self._observer.__exit__(None, None, None)
            except Exception as error:
                self.note(f"the profile could not be ended: {type(error).__name__}: {error}")
            self._write_profile()

    def _observe(self) -> None:
        # Not inside a mode of the script's: ours would be on top when the script leaves its own.
        if self._observer is None and torch._C._len_torch_dispatch_stack() == 0:
            try:
                policy = parse(self.request.policy)
                # What would be in 16 bits is asked of a policy that lowers something, also where FP32 is examined.
                observer = OpObserver(level="profile", policy=policy if policy.lowers else POLICIES["bf16-mixed"])
                observer.__enter__()
                self._observer = observer
            except Exception as error:
                self.note(f"the profile could not start: {type(error).__name__}: {error}")

    def _write_profile(self, seconds: float = 0.0) -> None:
        now = time.monotonic()
        if self._observer is None or (self._profiled_at is not None and now - self._profiled_at < seconds):
            return
        with self.ours("writing the profile"):
            self.write("profile", profile=self._observer.profile.to_json())
        self._profiled_at = time.monotonic()

    def _lint(self) -> None:
        if self._linted or self.session is None:
            return
        self._linted = True
        with self.ours("the lint"):
            policy = None if self._lowers_itself else parse(self.request.policy)
            scaler = self.session.own.scaler
            if scaler is None and policy is not None and policy.loss_scaling:
                scaler = GradScaler(self.session.device_type)  # as the asked policy brings one
            found = lint(
                self.modules(),
                self.optimizers(),
                policy=policy,
                scaler=scaler,
                facts=hardware.detect(self.session.devices.current or self.session.device_type),
            )
            for finding in found:
                self.found(finding)
            if not any(finding.code == "HS504" for finding in found) and self._compiled():
                self.found(_compiled_finding())

    def _compiled(self) -> bool:
        inside = (part for module in self.modules() for part in module.modules())
        return compiled_frames() > self._compiled_before or any(
            getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod") for part in inside
        )


class ExamineWatcher(StageWatcher):
    """The script under the asked policy, examined."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._examination: Examination | None = None
        self._concluded: list[dict[str, Any]] = []
        self._remedy = Remedy() if request.remedy is None else Remedy.from_json(request.remedy)
        self._remedies = contextlib.ExitStack()
        self._remedied = False

    def opened(self, session: Session) -> None:
        super().opened(session)
        if self._remedy.loss_scale is not None:
            self._not_tried("a fixed loss scale cannot be put under a script: it would step on scaled gradients")
        try:
            change = changes(self._remedy)
            examination = Examination(silence=self.request.silence, found=self.found, change=change)
            examination.__enter__()
            self._examination = examination
        except Exception as error:
            self.note(f"the examination could not start: {type(error).__name__}: {error}")

    def forward_starts(self, module: nn.Module) -> None:
        super().forward_starts(module)
        if not self._remedied and (self._remedy.islands or self._remedy.masters):
            self._remedied = True
            device_type = "cpu" if self.session is None else self.session.device_type
            try:
                modules, optimizers = self.modules(), self.optimizers()
                self._remedies.enter_context(applied(self._remedy, modules, optimizers, device_type))
            except Exception as error:
                self._not_tried(str(error))

    def line(self, line: Step | Memory | Notice) -> None:
        super().line(line)
        if isinstance(line, Step):
            self._conclude()

    def _not_tried(self, why: str) -> None:
        self.write("not tried", why=why)

    def closed(self) -> None:
        self._remedies.close()
        if self._examination is not None:
            self._conclude()
            try:
                self._examination.__exit__(None, None, None)
            except Exception as error:
                self.note(f"the examination could not be ended: {type(error).__name__}: {error}")
            self._conclude()

    def _conclude(self) -> None:
        """Write all findings as they stand: what came after a finding may have taken it back, as a loss scale does."""
        if self._examination is not None:
            with self.ours("reading the examination's findings"):
                found = [findings.to_json(item) for item in self._examination.findings()]
                if found != self._concluded:
                    self.write("findings", findings=found)
                self._concluded = found


def _compiled_finding() -> Finding:
    return Finding(
        code="HS504",
        place=None,
        what="The script compiles its model, and what was examined is the same model in eager mode.",
        consequence="Compiled kernels keep intermediate results in FP32 where eager mode rounds them, so a finding may "
        "not hold there, and one of theirs is not seen.",
        remedy="Compare the losses of the compiled run with `halfstep compare`.",
        severity=Severity.NOTE,
    )


WATCHERS: dict[str, Callable[[Request], StageWatcher]] = {"profile": ProfileWatcher, "examine": ExamineWatcher}


def main(request: Request) -> None:
    """Run the stage; ends the process with exit code 0 whatever became of the script."""
    told: list[int] = []

    def end(signum: int, frame: FrameType | None) -> None:
        told.append(signum)
        raise ToldToEnd

    faulthandler.enable()  # a crash in a kernel leaves its Python frames in the log
    signal.signal(signal.SIGTERM, end)
    _separate_rendezvous(request)
    watcher = WATCHERS[request.stage](request)
    os.register_at_fork(after_in_child=watcher.forget)
    run: Run | None = None
    with contextlib.suppress(ToldToEnd):  # before the script or after it; within, it ends in `run`
        run = run_under_policy(
            Path(request.script),
            request.arguments,
            "fp32" if request.stage == "profile" else request.requested,
            device_type=request.device,
            step_limit=request.steps,
            watcher=watcher,
        )
    watcher.write(
        "end",
        outcome="stopped" if told or run is None else run.outcome,
        exit_code=0 if run is None else run.exit_code,
        forwards=watcher.forwards,
        steps=0 if run is None else run.steps,
        policy=request.policy if run is None else str(run.policy),
    )


def _separate_rendezvous(request: Request) -> None:
    """Keep the ranks of this stage from meeting at what an earlier stage left in the launcher's key-value store."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not torch.distributed.is_available():
        return
    # The package's attribute of this name is the function in the module of this name.
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    create = getattr(rendezvous, "_create_c10d_store", None)
    if create is not None:
        store: Any = torch.distributed.distributed_c10d.PrefixStore
        prefix = f"halfstep-stage-{request.number}"
        rendezvous._create_c10d_store = lambda *args, **kwargs: store(prefix, create(*args, **kwargs))


if __name__ == "__main__":
    main(Request.from_text(sys.argv[1]))

"""`examine`: what is wrong with the numbers of any callable that runs PyTorch code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from halfstep.autocast import autocast
from halfstep.autocast.script_islands import ScriptIslands
from halfstep.doctor.examination import Change, Examination
from halfstep.doctor.finding import Finding, Severity, Silence, ordered, without_silenced
from halfstep.doctor.lint import lint
from halfstep.doctor.remedy import Remedy, try_remedies
from halfstep.doctor.snapshot import Snapshot
from halfstep.doctor.trial import applied, changes
from halfstep.policy import Policy, parse


def examine(
    fn: Callable[[], Any],
    policy: str | Policy | None = None,
    *,
    remedies: bool = False,
    silence: Sequence[str | Silence] = (),
    device_type: str | None = None,
) -> list[Finding]:
    """Run ``fn()`` and say what goes wrong with its numbers, worst first.

        findings = halfstep.doctor.examine(lambda: train_step(batch), policy="fp16-mixed:emulate")

    Every op runs a second time in FP32 beside the first, which is what the findings compare with: expect 5 to 100 times
    the time of ``fn`` on a CPU (on a GPU this is not measured). What ``fn`` changes (parameters, optimizer state) is
    changed, as in any call of it. Models under ``torch.compile`` run eagerly meanwhile: eager numerics are seen.

    Args:
        fn: a training step, a module call, an optimizer step, any snippet. If it raises, the exception passes on; use
            `Examination` to see what was found until then.
        policy: run ``fn`` in this policy's autocast; None: as it is.
        remedies: call ``fn`` again, some times, with what could help against each finding, and say in
            `Finding.trials` what did. Modules, optimizers and random number generators that it used are put back in
            between and afterwards; a finding that does not come back without a remedy is left untried.
        silence: findings to drop, such as ``"HS408@*.router"``; see `Silence`.
        device_type: of the autocast; None takes the machine's accelerator, else its CPU.

    Raises:
        UnknownPolicyError, PolicyOptionError, SilenceError, TypeError: before ``fn`` runs.
        NoSuchModuleError: after it: no module that was called matches a pattern of the policy's ``keep_fp32``.
    """
    chosen = None if policy is None else parse(policy)
    rules = [Silence.parse(rule) if isinstance(rule, str) else rule for rule in silence]
    if device_type is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device_type = "cpu" if accelerator is None else accelerator.type
    before = Snapshot() if remedies else None
    with before or contextlib.nullcontext():
        examination = _run(fn, chosen, rules, device_type)
    findings = ordered([*examination.findings(), *_compiled(examination, rules)])
    if before is None or all(finding.severity is Severity.NOTE for finding in findings):
        return findings
    modules, optimizers = examination.attribution.roots, examination.attribution.optimizers

    def rerun(remedy: Remedy) -> list[Finding]:
        policy = chosen if remedy.policy is None else parse(remedy.policy)
        before.restore()
        try:
            with applied(remedy, modules, optimizers, device_type):
                return _run(fn, policy, rules, device_type, changes(remedy)).findings()
        finally:
            before.restore()

    again = {(finding.code, finding.place) for finding in rerun(Remedy())}
    come_back = [finding for finding in findings if (finding.code, finding.place) in again]
    tried = {id(old): new for old, new in zip(come_back, try_remedies(come_back, rerun, chosen), strict=True)}
    return [tried.get(id(finding), finding) for finding in findings]


def _compiled(examination: Examination, silence: Sequence[Silence]) -> list[Finding]:
    """HS504, where modules are compiled: what was seen are their eager numbers."""
    found = lint(examination.attribution.roots, (), policy=None)
    return without_silenced([finding for finding in found if finding.code == "HS504"], silence)


def _run(
    fn: Callable[[], Any],
    policy: Policy | None,
    silence: Sequence[Silence],
    device_type: str,
    change: Change | None = None,
) -> Examination:
    with Examination(silence=silence, change=change) as examination, contextlib.ExitStack() as stack:
        if policy is not None:
            stack.enter_context(_islands(policy, device_type))
            stack.enter_context(autocast(policy, device_type))
        examination.returned(fn())
    return examination


@contextlib.contextmanager
def _islands(policy: Policy, device_type: str) -> Iterator[None]:
    """The policy's FP32 islands in the modules that are called, found as they are called first."""
    islands, known = ScriptIslands(), set[int]()

    def called(module: nn.Module, args: Any) -> None:
        if id(module) not in known:
            known.update(id(part) for part in module.modules())
            islands.apply(module, policy.keep_fp32, device_type)

    handle = register_module_forward_pre_hook(called)
    try:
        yield
        islands.require(policy.keep_fp32)
    finally:
        handle.remove()
        islands.remove()

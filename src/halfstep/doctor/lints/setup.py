"""The set-up around the model: loss scaler, autocast, losses that autocast forbids, what the device is good at."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn

from halfstep.autocast.islands import find
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints.setting import LOW_PRECISION, Setting, at_device, finding, some
from halfstep.formats import of
from halfstep.policy import Policy


def needless_scaler(setting: Setting) -> Iterator[Finding]:
    """HS207: a scaler that is on, where no gradient is fp16."""
    formats = _gradient_formats(setting)
    if not setting.training or not setting.scales or not formats or "fp16" in formats:
        return
    yield finding(
        "HS207",
        at_device("GradScaler", setting.facts),
        Severity.NOTE,
        f"{type(setting.scaler).__name__} is enabled, and computation is in {' and '.join(sorted(formats))}, "
        "whose smallest number is 1e-38 or below",
        "It looks through all gradients in every step, and nothing is gained: they do not underflow.",
        "GradScaler(enabled=False), or none.",
        formats=" ".join(sorted(formats)),
    )


def missing_scaler(setting: Setting) -> Iterator[Finding]:
    """HS208: gradients in fp16, and a loss that nobody scales."""
    if not setting.training or setting.scales:
        return
    fp16 = of("fp16")
    low = [p for p in setting.trained() if p.dtype is torch.float16]
    computes = setting.policy is not None and setting.policy.compute_dtype is torch.float16
    if not low and not computes:
        return
    source = f"policy {setting.policy}" if computes else f"fp16 parameters, first: {setting.name(low[0])}"
    state = "there is no loss scaler" if setting.scaler is None else "the loss scaler is disabled"
    yield finding(
        "HS208",
        setting.at_parameter("backward", low[0], "backward") if low else at_device("backward", setting.facts),
        Severity.WARNING,
        f"gradients are computed in fp16 ({source}), and {state}",
        f"Every gradient up to {fp16.smallest_subnormal / 2:.1e} becomes zero, and so does what depends on it.",
        "Scale the loss (halfstep.GradScaler or torch.amp.GradScaler), or use bf16.",
        threshold=fp16.smallest_subnormal / 2,
    )


def probabilities(setting: Setting) -> Iterator[Finding]:
    """HS410: cross-entropy of probabilities where they come in 16 bits."""
    policy = setting.policy
    if policy is None or not policy.lowers:
        return
    islands = {id(part) for module in _islands(setting, policy) for part in module.modules()}
    losses = [(path, m) for path, m in setting.parts() if isinstance(m, nn.BCELoss) and id(m) not in islands]
    if not losses:
        return
    format = of(policy.compute_dtype)
    # PyTorch forbids it under CUDA's autocast. On the CPU it computes.
    forbidden = policy.rules == "cuda" or (setting.facts is not None and setting.facts.type == "cuda")
    largest = (format.mantissa_bits + 2) * 0.6931  # -log(eps / 4): there 1 - p is a quarter of the spacing below 1
    narrow = format.max < 1e12  # what PyTorch divides by p * (1 - p) where that is zero; in fp16 it is inf
    consequence = (
        "Autocast refuses it with an error."
        if forbidden
        else f"The loss is capped at 100 there, and the logit's gradient is {'inf * 0 = NaN' if narrow else 'zero'}."
    )
    path, loss = losses[0]
    yield finding(
        "HS410",
        setting.at_module(path, loss),
        Severity.ERROR if forbidden or narrow else Severity.WARNING,
        f"{type(loss).__name__} takes probabilities, which under {policy} are {format} numbers: they are 1 from a "
        f"logit of {largest:.1f} on",
        consequence,
        "BCEWithLogitsLoss, without the sigmoid before it.",
        logit=largest,
        losses=len(losses),
    )


def idle_autocast(setting: Setting) -> Iterator[Finding]:
    """HS501: a policy that lowers, and a model in which autocast finds nothing to lower."""
    policy = setting.policy
    if policy is None or not policy.lowers:
        return
    kept = {id(p) for module in _islands(setting, policy) for p in module.parameters()}
    parameters = [p for p in setting.parameters() if p.is_floating_point() or p.is_complex()]
    if not parameters:
        return
    reasons = {
        f"are {' or '.join(sorted({str(p.dtype).removeprefix('torch.') for p in parameters}))}, which autocast leaves "
        "alone": all(p.dtype is torch.float64 or p.is_complex() for p in parameters),
        f"are in modules that {policy} keeps in FP32": all(id(p) in kept for p in parameters),
        f"are on {parameters[0].device.type}, and autocast is switched on for "
        f"{setting.facts.type if setting.facts else ''}": setting.facts is not None
        and all(p.device.type not in (setting.facts.type, "meta") for p in parameters),
    }
    for reason, holds in reasons.items():
        if holds:
            yield finding(
                "HS501",
                at_device("autocast", setting.facts),
                Severity.WARNING,
                f"{some(len(parameters), len(parameters), 'parameter')} {reason}",
                f"Matrix products run as without a policy: nothing is faster or smaller, and {policy} is not tested.",
                "Take the model to float32 and to the device that computes, and name fewer modules in keep_fp32.",
                parameters=len(parameters),
            )
            return


def slow_fp16(setting: Setting) -> Iterator[Finding]:
    """HS502: fp16 on a device that computes in it slowly or not at all."""
    yield from _support(
        setting, "fp16", "HS502", "bf16-mixed, or fp32; add :emulate to see what fp16 does to the numbers."
    )


def emulated_bf16(setting: Setting) -> Iterator[Finding]:
    """HS503: bf16 on a device that converts around wider arithmetic."""
    remedy = "fp16-mixed where fp16 is native (with its loss scaling), or fp32."
    yield from _support(setting, "bf16", "HS503", remedy)


def compiled(setting: Setting) -> Iterator[Finding]:
    """HS504: compiled modules, of which only the eager numbers can be examined."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: nothing was compiled
    wrapper = getattr(dynamo, "OptimizedModule", None)
    found = [
        (path, module)
        for path, module in setting.parts()
        if module._compiled_call_impl is not None or (wrapper is not None and isinstance(module, wrapper))
    ]
    if found:
        path, module = found[0]
        yield finding(
            "HS504",
            setting.at_module(path, getattr(module, "_orig_mod", module)),
            Severity.NOTE,
            f"{len(found)} {'module is' if len(found) == 1 else 'modules are'} compiled; the eager code is what is "
            "examined",
            "A compiler keeps values in FP32 between ops that it fuses, so its numbers differ, mostly for the better.",
            "Keep it in mind where a finding hangs on one rounding.",
            modules=len(found),
        )


def _support(setting: Setting, name: str, code: str, remedy: str) -> Iterator[Finding]:
    policy, facts = setting.policy, setting.facts
    if policy is None or facts is None or policy.emulate or policy.compute != name:
        return
    support = facts.formats[name]
    if support.support not in ("slow", "emulated", "missing"):
        return
    missing = support.support == "missing"
    yield finding(
        code,
        at_device("autocast", facts),
        Severity.ERROR if missing else Severity.NOTE,
        f"{policy} computes in {name}, which is {support.support} on {facts.name} ({support.because})",
        "PyTorch refuses it." if missing else "The numbers are right; the run is slower than in FP32, not faster.",
        remedy,
        support=support.support,
    )


def _gradient_formats(setting: Setting) -> set[str]:
    """The formats in which gradients are computed, as far as it is known; empty: not at all."""
    known = {torch.float32: "fp32", **{dtype: str(of(dtype)) for dtype in LOW_PRECISION}}
    formats = {known[p.dtype] for p in setting.trained() if p.dtype in known}
    if setting.policy is not None:
        return formats | {str(of(setting.policy.compute_dtype))}
    return formats - {"fp32"}  # FP32 parameters, under an autocast that is not known here


def _islands(setting: Setting, policy: Policy) -> list[nn.Module]:
    return [island for module in setting.modules for island in find(module, policy.keep_fp32).values()]

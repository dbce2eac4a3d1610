"""Gradients that are summed over ranks in 16 bits: DistributedDataParallel, its hooks, and both kinds of FSDP.

With W ranks the sum of W gradients has to be divided by W. Divided *before* (by a pre-factor f; DistributedDataParallel
takes f = W), small gradients underflow: those below f times half the smallest number. Divided *after*, large ones
overflow: those above max * f / W, if all ranks have one. For fp16 FSDP2 takes f near the root of W. In either case each
of the W - 1 additions rounds; from W * eps / 2 = 1 on, which for bf16 is 256 ranks, a single rank's share of a mean may
be lost altogether.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lints.setting import LOW_PRECISION, Setting, finding
from halfstep.formats import of

#: How a communication hook's code names the formats it may cast to.
_CASTS = {"float16": torch.float16, "half": torch.float16, "bfloat16": torch.bfloat16}


def reduced_low(setting: Setting) -> Iterator[Finding]:
    """HS508: one finding for each way in which gradients are reduced in 16 bits over more than one rank."""
    found: dict[tuple[torch.dtype, int, float, str], list[tuple[str, nn.Module]]] = {}
    for path, module in setting.parts():
        for dtype, world, factor, how in _reductions(module):
            if dtype in LOW_PRECISION and world > 1:
                found.setdefault((dtype, world, factor, how), []).append((path, module))
    for (dtype, world, factor, how), places in found.items():
        format = of(dtype)
        overflow, underflow = format.max * factor / world, format.smallest_subnormal / 2 * factor
        error = (world - 1) * format.eps / 2
        narrow = format.tiny > of("fp32").tiny
        path, module = places[0]
        ranges = (
            f"a gradient above {overflow:.4g} on all ranks overflows in the sum, one below {underflow:.2g} becomes zero"
        )
        yield finding(
            "HS508",
            setting.at_module(path, module),
            Severity.WARNING if narrow or world * format.eps / 2 >= 1 else Severity.NOTE,
            f"gradients are summed over {world} ranks in {format} ({how}"
            + (f"; {len(places)} modules" if len(places) > 1 else "")
            + ")"
            + (f": {ranges}" if narrow else ""),
            f"The sum's rounding error grows to as much as {min(error, 1.0):.1%} of its largest term, and differs from "
            "that of another number of ranks.",
            "Reduce in FP32: MixedPrecisionPolicy(reduce_dtype=torch.float32), MixedPrecision(reduce_dtype=...), FP32 "
            "parameters in DistributedDataParallel, or no compressing hook.",
            world=world,
            overflows_above=overflow,
            underflows_below=underflow,
            format=str(format),
        )


def _reductions(module: nn.Module) -> Iterator[tuple[torch.dtype, int, float, str]]:
    """Dtype, ranks, pre-factor and mechanism of what this module reduces itself."""
    anything: Any = module
    if isinstance(module, nn.parallel.DistributedDataParallel):
        world = anything.process_group.size()
        hooks = [dtype for hook, _ in getattr(anything, "_comm_hooks", ()) for dtype in _casts(hook)]
        if hooks:
            yield hooks[0], world, float(world), "a communication hook casts them"
            return
        reduce = getattr(getattr(anything, "mixed_precision", None), "reduce_dtype", None)
        dtypes = {p.dtype for p in module.parameters() if p.requires_grad}
        for dtype in dtypes if reduce is None else {reduce}:
            yield dtype, world, float(world), "DistributedDataParallel reduces in the gradients' own format"
    elif hasattr(module, "_get_fsdp_state"):
        policy = getattr(anything._get_fsdp_state(), "_mp_policy", None)
        sharded: Any = next((p for p in module.parameters() if hasattr(p, "device_mesh") and p.requires_grad), None)
        if policy is None or sharded is None:
            return
        dtype = policy.reduce_dtype or policy.param_dtype or sharded.dtype
        world = sharded.device_mesh.size()
        yield dtype, world, _balanced(world) if dtype is torch.float16 else 1.0, _reason(policy)
    elif getattr(anything, "mixed_precision", None) is not None and hasattr(anything, "process_group"):
        policy = anything.mixed_precision  # FSDP1
        dtype = getattr(policy, "reduce_dtype", None) or getattr(policy, "param_dtype", None)
        if isinstance(dtype, torch.dtype):
            world = anything.process_group.size()
            yield dtype, world, _balanced(world), _reason(policy)


def _reason(policy: Any) -> str:
    return "its reduce_dtype" if policy.reduce_dtype is not None else "no reduce_dtype is given, so param_dtype holds"


def _balanced(world: int) -> float:
    """FSDP's pre-factor: the power of two about the root of the number of ranks that divides it."""
    factor = 1
    while world % factor == 0 and world / factor > factor:
        factor *= 2
    return float(factor)


def _casts(hook: Any) -> list[torch.dtype]:
    """The 16-bit formats that a hook's code names, those of functions it closes over included."""
    code = getattr(hook, "__code__", None)
    inner = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or () if callable(cell.cell_contents)]
    found = [_CASTS[name] for name in getattr(code, "co_names", ()) if name in _CASTS]
    return found + [dtype for function in inner for dtype in _casts(function)]

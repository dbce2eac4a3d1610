"""The first loss scale, measured: the largest power of two that leaves two octaves below FP16's 65504.

A run that starts at 2^16 whatever its gradients begins with a burst of skipped steps, or with gradients that underflow
unseen. Here the backward pass of the first loss is run once more beforehand, with a hook on every node of its graph, so
that the gradients *inside* the network count too: they overflow before those of the weights do. Nothing is accumulated,
and the step itself then happens at the measured scale: it is neither skipped nor coarser than the ones after it.

Two octaves: later batches' gradients are larger than the first one's, and a skip costs more than two bits of range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from halfstep.scale.gradients import Group, smallest_of_ranks
from halfstep.scale.graph import leaf_of, nodes
from halfstep.scale.trajectory import Rule

HEADROOM = 2  #: octaves
FP16_MAX = 65504.0
FP16_TINY = 2.0**-14  #: below it an FP16 value has fewer than 11 significant bits
FIRST_PROBE = 2.0**8


def first_scale(loss: Tensor, rule: Rule, group: Group) -> float | None:
    """`measured_scale`, the same on all ranks; None where ``loss`` is not one that a backward pass can start from."""
    if loss.numel() != 1 or not loss.requires_grad:
        return None
    scale = measured_scale(loss, rule) or math.inf
    scale = smallest_of_ranks(scale, loss.device, group)  # also by a rank that has measured nothing
    return scale if scale < math.inf else None


def measured_scale(loss: Tensor, rule: Rule) -> float | None:
    """The scale for gradients like those of ``loss`` (1 element); None where nothing can be measured.

    Runs the backward pass of ``loss`` once or a few times, keeping its graph.

    Raises:
        RuntimeError: the graph can be run only once.
    """
    if not bool(torch.isfinite(loss.detach()).all()):
        return None
    probe, highest_good, lowest_bad = rule.within(FIRST_PROBE), 0.0, math.inf
    while True:
        peak = _peak(loss, probe)
        if not math.isfinite(peak):
            lowest_bad, following = probe, rule.within(probe / 2**8)
        elif peak < FP16_TINY:
            highest_good, following = probe, rule.within(probe * 2**12)
        else:
            fits = FP16_MAX / 2**HEADROOM / peak * probe
            return rule.within(math.ldexp(1.0, math.frexp(fits)[1] - 1))
        if following == probe:  # at the floor and still overflowing; or at the cap and all but nothing to see
            return None if peak == 0 else probe
        if highest_good < following < lowest_bad:
            probe = following
            continue
        return rule.within(lowest_bad / 2**HEADROOM) if math.isfinite(lowest_bad) else highest_good


def in_float32(loss: Tensor) -> Tensor:
    """A 16-bit loss in FP32, where it can be multiplied by a scale; others as they are."""
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


def _peak(loss: Tensor, scale: float) -> float:
    """The largest gradient anywhere in the graph of ``loss * scale``; of the FP16 ones where there are any."""
    low: list[Tensor] = []
    others: list[Tensor] = []

    def see(gradients: tuple[Any, ...]) -> None:
        for gradient in gradients:
            if isinstance(gradient, Tensor) and gradient.is_floating_point() and gradient.numel():
                values = gradient.coalesce().values() if gradient.is_sparse else gradient
                (low if gradient.dtype is torch.float16 else others).append(values.detach().abs().amax().float())

    loss = in_float32(loss)
    inner: list[Any] = []
    leaves: list[Tensor] = []
    for node in nodes([loss]):
        leaf = leaf_of(node)
        if leaf is None:
            inner.append(node)
        else:
            leaves.append(leaf)
    hooks: list[Any] = []
    try:
        for node in inner:
            hooks.append(node.register_prehook(see))
        grads = torch.autograd.grad(loss * scale, leaves, torch.ones_like(loss), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"init_scale='auto' runs the first backward pass twice, which this graph does not allow ({error}). "
            "Give a number instead, such as init_scale=2.0**16"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    see(grads)
    peaks = [amax.to(loss.device) for amax in low or others]
    return float(torch.stack(peaks).max().item()) if peaks else 0.0

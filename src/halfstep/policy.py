"""Policies: which format where, and whether the loss is scaled.

A policy is a frozen value; ``str(policy)`` is its name and ``parse(str(policy)) == policy``, so the same text serves
as command-line argument, log line and JSON. `choose` picks one for a device and returns *(policy, reason)*: the
reason is always printed and recorded.

========== ========== ==================== ============ =============
name       parameters compute              masters      loss scaling
========== ========== ==================== ============ =============
fp32       fp32       fp32                 –            none
tf32       fp32       fp32, TF32 matmuls   –            none
bf16-mixed fp32       autocast to bf16     – (¹)        none
fp16-mixed fp32       autocast to fp16     – (¹)        dynamic
bf16-master bf16 (²)  autocast to bf16     fp32         none
fp16-master fp16 (²)  autocast to fp16     fp32         dynamic
========== ========== ==================== ============ =============

(¹) the FP32 parameters are the masters. (²) normalisation layers stay FP32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfstep.hardware import DeviceFacts


class UnknownPolicyError(ValueError):
    """No policy has this name; the message lists those that exist."""


@dataclass(frozen=True)
class Policy:
    """Which format where, and whether the loss is scaled."""

    name: str
    compute_dtype: torch.dtype = torch.float32  #: what autocast lowers matrix products to; float32: no autocast
    tf32: bool = False  #: float32 matrix products may run in TF32
    master_weights: bool = False  #: parameters are kept in compute_dtype, with FP32 masters in the optimizer
    loss_scaling: bool = False  #: dynamic, because gradients of this format underflow

    def __str__(self) -> str:
        return self.name

    @property
    def compute(self) -> str:
        """The name of the format that matrix products run in: fp32, tf32, bf16 or fp16."""
        return "tf32" if self.tf32 else _FORMAT_NAMES[self.compute_dtype]

    @property
    def lowers(self) -> bool:
        """Whether autocast has anything to do."""
        return self.compute_dtype is not torch.float32


_FORMAT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("fp32"),
        Policy("tf32", tf32=True),
        Policy("bf16-mixed", torch.bfloat16),
        Policy("fp16-mixed", torch.float16, loss_scaling=True),
        Policy("bf16-master", torch.bfloat16, master_weights=True),
        Policy("fp16-master", torch.float16, master_weights=True, loss_scaling=True),
    )
}


def parse(text: str) -> Policy:
    """The policy of this name.

    Raises:
        UnknownPolicyError: no such name ("auto" is not a policy but the question; see `choose`).
    """
    try:
        return POLICIES[text.strip()]
    except KeyError:
        import difflib

        near = difflib.get_close_matches(text.strip(), POLICIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownPolicyError(f"unknown policy {text!r}.{hint} Known: auto, {', '.join(POLICIES)}.") from None


def choose(facts: DeviceFacts) -> tuple[Policy, str]:
    """The policy for a device, and why: BF16 where native, else FP16 with scaling where native, else FP32."""
    bf16, fp16 = facts.formats["bf16"], facts.formats["fp16"]
    if bf16.support == "native":
        return POLICIES["bf16-mixed"], (
            f"bf16 is native here ({bf16.because}); it has fp32's range, so no loss scaling is needed"
        )
    if fp16.support == "native":
        return POLICIES["fp16-mixed"], (
            f"no native bf16 ({bf16.because}), but fp16 is native ({fp16.because}); "
            "its range is small, so the loss is scaled"
        )
    return POLICIES["fp32"], (
        f"no 16-bit format is known to be faster here: bf16 is {bf16.support} ({bf16.because}), "
        f"fp16 is {fp16.support} ({fp16.because})"
    )


def resolve(text: str, facts: DeviceFacts) -> tuple[Policy, str]:
    """The policy in effect on a device for what was asked, and why.

    "auto" is chosen by `choose`. A named policy is taken as asked, with a word about what the device makes of it;
    ``tf32`` on a device without TF32 computes in FP32, and is reported as the ``fp32`` that it is.

    Raises:
        UnknownPolicyError: no such name.
    """
    if text.strip() == "auto":
        return choose(facts)
    policy = parse(text)
    support = facts.formats[policy.compute]
    if policy.compute == "tf32" and support.support == "missing":
        return POLICIES["fp32"], f"tf32 was asked for, but is missing here ({support.because}): this is fp32"
    if support.support == "native":
        return policy, f"as asked; {policy.compute} is native here ({support.because})"
    return policy, f"as asked; note that {policy.compute} is {support.support} here ({support.because})"

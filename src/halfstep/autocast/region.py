"""Entering a policy: the autocast region around a forward pass, and what a backward pass needs of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from halfstep.autocast import kernels, rules
from halfstep.policy import Policy, parse


def autocast(policy: Policy | str, device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass runs under ``policy`` on ``device_type``; FP32 policies change nothing.

    Applies the policy's ``rules``, op lists and ``emulate``; ``keep_fp32`` is about modules (see `keep_fp32`). Regions
    nest, each with its own policy, and other threads are not affected.

    Raises:
        UnknownPolicyError: the text names no policy.
        UnsupportedDeviceError: the policy changes rules that this device type does not have.
    """
    policy = parse(policy)
    if not policy.lowers:
        return contextlib.nullcontext()
    plan = rules.plan(policy, device_type)
    region = torch.autocast(device_type, dtype=policy.compute_dtype)
    if plan is None and not kernels.active():
        return region
    return _changed(plan, region)


@contextlib.contextmanager
def _changed(plan: rules.Plan | None, region: torch.autocast) -> Iterator[None]:
    with kernels.in_force(plan), region:
        yield


@contextlib.contextmanager
def recomputation(policy: Policy | str, device_type: str) -> Iterator[None]:
    """For a backward pass: whatever activation checkpointing recomputes in it follows the policy's rules again.

    Checkpointing restores autocast's switch and dtype by itself, but knows nothing of rules, op lists and emulation.
    With a policy that has none of them, or without checkpointing, this does nothing.
    """
    policy = parse(policy)
    plan = rules.plan(policy, device_type) if policy.lowers else None
    with kernels.in_force(plan, backward=True):
        yield

"""Policies: names round-trip, and each device gets the policy its formats call for, with a reason."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from halfstep.hardware import DeviceFacts, FormatSupport, cpu_formats, cuda_formats
from halfstep.policy import POLICIES, Policy, UnknownPolicyError, choose, parse, resolve


def facts(formats: Mapping[str, FormatSupport]) -> DeviceFacts:
    return DeviceFacts("cpu", "a device", 2**30, formats, "")


def gpu(major: int, minor: int) -> DeviceFacts:
    return facts(cuda_formats((major, minor)))


def cpu(bf16: float, fp16: float, **features: Any) -> DeviceFacts:
    """A CPU whose 16-bit products run at these multiples of FP32's rate."""
    return facts(cpu_formats(features, {"bf16": bf16, "fp16": fp16}))


AVX2 = cpu(0.4, 0.05)
AMX = cpu(8.0, 1.05, amx_bf16=True, avx512_fp16=True)


def test_the_table_in_the_docstring_is_the_code() -> None:
    import halfstep.policy

    rows = [line.split() for line in (halfstep.policy.__doc__ or "").splitlines()]
    table = {row[0]: row for row in rows if row and row[0] in POLICIES}
    assert list(table) == list(POLICIES)
    for name, policy in POLICIES.items():
        row = " ".join(table[name])
        assert policy.loss_scaling == row.endswith("dynamic")
        assert policy.tf32 == ("TF32" in row)
        assert (policy.storage == "split") == ("fp32, split" in row) == ("-master" in name)
        assert policy.lowers == ("autocast to" in row)
        if policy.lowers:
            assert policy.compute in name
            assert f"autocast to {'bf16 (²)' if policy.float8 else policy.compute}" in row


def test_only_the_format_that_underflows_is_scaled() -> None:
    for policy in POLICIES.values():
        # fp16's smallest normal number is above fp32's by far; bf16 and fp32 share it.
        assert policy.loss_scaling == (torch.finfo(policy.compute_dtype).tiny > torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=str)
def test_text_and_pickle_round_trip(policy: Policy) -> None:
    assert parse(str(policy)) is policy
    assert parse(f" {policy}\n") is policy
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
    with pytest.raises(AttributeError):
        policy.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("text", "near"), [("bf16_mixed", "bf16-mixed"), ("fp16-masters", "fp16-master")])
def test_an_unknown_name_gets_the_nearest_known(text: str, near: str) -> None:
    with pytest.raises(UnknownPolicyError) as error:
        parse(text)
    assert str(error.value) == (
        f"unknown policy {text!r}. Did you mean {near!r}? "
        "Known: auto, fp32, tf32, bf16-mixed, fp16-mixed, bf16-master, fp16-master, fp8-mixed:emulate."
    )


def test_a_name_like_no_other_gets_no_suggestion_and_auto_is_no_policy() -> None:
    with pytest.raises(UnknownPolicyError, match=r"^unknown policy 'int4'\. Known: auto, "):
        parse("int4")
    with pytest.raises(UnknownPolicyError):
        parse("auto")


@pytest.mark.parametrize(
    ("device", "expected", "because"),
    [
        (gpu(6, 0), "fp32", "fp16 is slow"),  # P100: fp16 but no tensor cores
        (gpu(7, 0), "fp16-mixed", "no native bf16 .*7.0"),  # V100
        (gpu(7, 5), "fp16-mixed", "no native bf16 .*7.5"),  # T4
        (gpu(8, 0), "bf16-mixed", "no loss scaling is needed"),  # A100
        (gpu(8, 6), "bf16-mixed", "bf16 is native here .*8.6"),  # RTX 30
        (gpu(9, 0), "bf16-mixed", "bf16 is native"),
        (cpu(1.8, 0.025, avx512_bf16=True), "bf16-mixed", "avx512_bf16.* 1.8 ×"),  # Zen 4
        (AMX, "bf16-mixed", "amx_bf16.* 8.0 ×"),
        (AVX2, "fp32", "bf16 is emulated .*0.4 ×.*fp16 is slow .*0.05 ×"),
        (cpu(0.2, 0.15, amx_bf16=True), "fp32", "bf16 is slow .amx_bf16.* 0.2 ×"),  # a library that stays with AVX2
        (cpu(0.9, 2.0, fphp=True), "fp16-mixed", "fp16 is native"),
    ],
)
def test_each_device_gets_its_policy_and_reason(device: DeviceFacts, expected: str, because: str) -> None:
    policy, reason = choose(device)
    assert policy is POLICIES[expected]
    assert resolve("auto", device) == (policy, reason) == resolve(" auto ", device)
    import re

    assert re.search(because, reason)


def test_fp16_is_chosen_only_where_it_is_native() -> None:
    supports = ("native", "emulated", "slow", "missing", "unknown")
    for bf16 in supports:
        for fp16 in supports:
            device = facts({"bf16": FormatSupport(bf16, "b"), "fp16": FormatSupport(fp16, "f")})  # type: ignore[arg-type]
            expected = "bf16-mixed" if bf16 == "native" else "fp16-mixed" if fp16 == "native" else "fp32"
            assert choose(device)[0].name == expected


@pytest.mark.parametrize(
    ("asked", "device", "effect", "reason"),
    [
        ("fp32", AVX2, "fp32", "as asked; fp32 is native here (every CPU)"),
        ("bf16-master", AMX, "bf16-master", "as asked; bf16 is native here (amx_bf16: products at 8.0 ×"),
        ("fp16-mixed", AVX2, "fp16-mixed", "as asked; note that fp16 is slow here (neither AMX_FP16 nor AVX512_FP16"),
        ("tf32", AVX2, "fp32", "tf32 was asked for, but is missing here (TF32 is a format of GPUs): this is fp32"),
        ("tf32", gpu(7, 5), "fp32", "tf32 was asked for, but is missing here"),
        ("tf32", gpu(8, 0), "tf32", "as asked; tf32 is native here"),
        ("bf16-mixed", gpu(7, 5), "bf16-mixed", "as asked; note that bf16 is emulated here"),
        (
            "fp8-mixed:emulate",
            AMX,
            "fp8-mixed:emulate",
            "as asked; operands of matrix products are rounded",
        ),
    ],
)
def test_a_named_policy_is_kept_with_a_word_about_the_device(
    asked: str, device: DeviceFacts, effect: str, reason: str
) -> None:
    policy, said = resolve(asked, device)
    assert policy is POLICIES[effect]
    assert said.startswith(reason)


def test_a_policy_is_itself_and_nothing_else_is_one() -> None:
    policy = parse("bf16-mixed:keep_fp32=head")
    assert parse(policy) is policy
    for wrong in (3, None, torch.bfloat16, ["bf16-mixed"]):
        with pytest.raises(TypeError, match="a policy is a name such as 'bf16-mixed', or a Policy, not "):
            parse(wrong)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_by_resolve_too() -> None:
    with pytest.raises(UnknownPolicyError):
        resolve("fp8", AVX2)

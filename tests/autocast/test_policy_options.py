"""A policy's options as text: exact round trips, and errors that name what was meant."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.hardware import DeviceFacts, cpu_formats
from halfstep.policy import POLICIES, Policy, PolicyOptionError, UnknownPolicyError, overloads, parse, resolve

OPS = ("softmax", "softmax.int", "layer_norm", "aten::mm", "sum.dim_IntList", "gelu", "cumsum")
patterns = st.lists(st.text(min_size=1, max_size=12), max_size=3)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    base = draw(st.sampled_from([p for p in POLICIES.values() if p.lowers]))
    ops = draw(st.lists(st.sampled_from(OPS), max_size=4))
    return replace(
        base,
        keep_fp32=draw(patterns),  # type: ignore[arg-type]  # lists become tuples
        fp32_ops=tuple(op for op in ops if "softmax" in op),
        low_ops=tuple(op for op in ops if "softmax" not in op),
        rules=draw(st.sampled_from(["torch", "cuda"])),
        emulate=draw(st.booleans()) or base.float8,
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(policies())
def test_text_json_and_pickle_round_trip(policy: Policy) -> None:
    text = str(policy)
    assert parse(text) == policy == parse(json.loads(json.dumps(text))) == pickle.loads(pickle.dumps(policy))
    assert str(parse(text)) == text and hash(parse(text)) == hash(policy)
    assert parse(f"  {text}\n") == policy


@settings(max_examples=200, deadline=None, derandomize=True)
@given(policies())
def test_text_survives_lists_of_policies_file_names_and_shells(policy: Policy) -> None:
    """`compare --policies` splits at commas; records are named after policies."""
    text = str(policy)
    assert not set(text) & set(", /\\\t\n'\"`$&|;<>(){}#~\0") and text.isascii()


def test_the_grammar_by_example() -> None:
    text = "bf16-mixed:keep_fp32=blocks.*.mlp.wo+head:fp32_ops=softmax:low_ops=cumsum:rules=cuda:emulate"
    policy = parse(text)
    assert str(policy) == text and policy.name == "bf16-mixed" and policy.compute_dtype is torch.bfloat16
    assert policy.keep_fp32 == ("blocks.*.mlp.wo", "head")
    assert (policy.fp32_ops, policy.low_ops, policy.rules, policy.emulate) == (("softmax",), ("cumsum",), "cuda", True)
    # Any order, and PyTorch's qualified names, are understood.
    assert parse("bf16-mixed:emulate:fp32_ops=aten::softmax:rules=torch") == replace(
        POLICIES["bf16-mixed"], fp32_ops=["softmax"], emulate=True
    )
    assert str(replace(POLICIES["fp16-master"], keep_fp32="a+b:c,d")) == "fp16-master:keep_fp32=a%2Bb%3Ac%2Cd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16-mixed:emulat", r"unknown option 'emulat' .* Did you mean 'emulate'\?"),
        ("bf16-mixed:emulate=yes", "unknown option 'emulate=yes'"),
        ("bf16-mixed:keep_fp32", "unknown option 'keep_fp32'"),
        ("bf16-mixed:keep_fp32=", "unknown option"),
        ("bf16-mixed:keep_fp32=a+", "empty pattern"),
        ("bf16-mixed:rules=rocm", "rules are torch or cuda, not 'rocm'"),
        ("bf16-mixed:emulate:emulate", "'emulate' stands twice"),
        ("bf16-mixed:fp32_ops=sofmax", r"has no op 'sofmax'\. Near: softmax"),
        ("bf16-mixed:fp32_ops=cross_entropy", "Near: cross_entropy_loss"),
        ("bf16-mixed:fp32_ops=softmax.nothing", "has no op 'softmax.nothing'. Near: softmax"),
        ("bf16-mixed:fp32_ops=add_", "writes into its arguments .*'add'"),
        ("bf16-mixed:fp32_ops=softmax:low_ops=softmax.int", "op 'softmax.int' is in fp32_ops and in low_ops"),
        ("fp8-mixed", "native float8 is not built. Use fp8-mixed:emulate"),
        ("fp8-mixed:keep_fp32=head", "native float8 is not built. Use fp8-mixed:emulate"),
        ("fp32:emulate", "fp32 lowers nothing, so emulate would have no effect"),
        ("tf32:keep_fp32=a:rules=cuda", "tf32 lowers nothing, so keep_fp32, rules"),
    ],
)
def test_what_cannot_be_is_refused_with_what_was_meant(text: str, message: str) -> None:
    with pytest.raises(PolicyOptionError, match=message):
        parse(text)
    with pytest.raises(UnknownPolicyError):  # what the command line knows as bad usage
        parse(text)


def test_an_unknown_name_with_options_is_an_unknown_name() -> None:
    with pytest.raises(UnknownPolicyError, match=r"unknown policy 'bf16_mixed'\. Did you mean 'bf16-mixed'"):
        parse("bf16_mixed:emulate")
    with pytest.raises(UnknownPolicyError, match=r"unknown policy 'fp8_mixed'\. Did you mean 'fp8-mixed:emulate'"):
        parse("fp8_mixed")


def test_ops_mean_their_overloads_that_return_a_new_tensor() -> None:
    assert "aten::softmax.int" in overloads("softmax")
    assert set(overloads("softmax")) <= {
        "aten::softmax.int",
        "aten::softmax.Dimname",
    }  # named: until 2.12
    assert set(overloads("sum")) - {"aten::sum.dim_DimnameList"} == {"aten::sum", "aten::sum.dim_IntList"}
    assert overloads("sum.dim_IntList") == ("aten::sum.dim_IntList",)
    for op in ("mm", "add", "conv2d", "layer_norm"):
        for name in overloads(op):
            assert name.partition(".")[0] == f"aten::{op}"
            assert not torch._C._get_schema(name.partition(".")[0], name.partition(".")[2]).is_mutable


def test_options_hold_for_what_auto_chooses_if_it_lowers() -> None:
    def device(bf16: float = 0.4) -> DeviceFacts:
        return DeviceFacts("cpu", "a device", 2**30, cpu_formats({}, {"bf16": bf16, "fp16": 0.02}), "")

    policy, _ = resolve("auto:rules=cuda:keep_fp32=head", device(bf16=2.0))
    assert str(policy) == "bf16-mixed:keep_fp32=head:rules=cuda"
    policy, reason = resolve("auto:rules=cuda", device())
    assert policy is POLICIES["fp32"] and "rules would have no effect" in reason
    with pytest.raises(PolicyOptionError):
        resolve("auto:fp32_ops=sofmax", device())
    policy, reason = resolve("fp16-mixed:emulate", device())
    assert policy.emulate and reason == "as asked; fp16 is emulated by rounding around FP32 arithmetic"

"""HS207, HS208, HS410, HS501 to HS504: what fires, and the near miss beside it."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch import nn

import halfstep
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.hardware import DeviceFacts, cpu_formats, cuda_formats
from halfstep.policy import parse

SLOW_CPU = DeviceFacts("cpu", "an old CPU", 1, cpu_formats({}, {"bf16": 0.4, "fp16": 0.02}), "")
T4 = DeviceFacts("cuda", "Tesla T4", 1, cuda_formats((7, 5)), "")
P100 = DeviceFacts("cuda", "P100", 1, cuda_formats((6, 0)), "")
A100 = DeviceFacts("cuda", "A100", 1, cuda_formats((8, 0)), "")


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


def of_code(code: str, module: Any, policy: str | None, *, lr: float | None = 1e-3, **options: Any) -> list[Finding]:
    optimizers = [] if lr is None else [torch.optim.SGD(module.parameters(), lr=lr)]
    found = lint(module, optimizers, policy=None if policy is None else parse(policy), **options)
    return [finding for finding in found if finding.code == code]


# ------------------------------------------------------------------ HS207, HS208


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, halfstep.GradScaler])
def test_a_scaler_where_none_is_needed(scaler: Any) -> None:
    for policy, dtype in (("bf16-mixed", torch.float32), ("fp32", torch.float32), (None, torch.bfloat16)):
        (found,) = of_code("HS207", net(dtype), policy, scaler=scaler("cpu"))
        assert found.severity == Severity.NOTE
        assert of_code("HS207", net(dtype), policy, scaler=scaler("cpu", enabled=False)) == []
        assert of_code("HS207", net(dtype), policy) == []


def test_a_scaler_where_it_is_needed_or_may_be() -> None:
    scaler = torch.amp.GradScaler("cpu")
    assert of_code("HS207", net(), "fp16-mixed", scaler=scaler) == []
    assert of_code("HS207", net(), None, scaler=scaler) == []  # the script's own autocast may be fp16
    assert of_code("HS207", net(torch.float16), "bf16-mixed", scaler=scaler) == []


@pytest.mark.parametrize(("policy", "dtype"), [("fp16-mixed", torch.float32), (None, torch.float16)])
def test_fp16_without_a_scaler(policy: str | None, dtype: torch.dtype) -> None:
    (found,) = of_code("HS208", net(dtype), policy)
    assert found.severity == Severity.WARNING
    threshold = torch.tensor(found.numbers["threshold"])  # the largest that becomes zero
    assert threshold.half() == 0 and (threshold * 1.0001).half() > 0
    (found,) = of_code("HS208", net(dtype), policy, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert "disabled" in found.what
    assert of_code("HS208", net(dtype), policy, scaler=torch.amp.GradScaler("cpu")) == []
    assert of_code("HS208", net(dtype), policy, lr=None) == []  # inference
    assert len(of_code("HS208", net(dtype), policy, lr=None, training=True)) == 1


def test_other_formats_need_no_scaler() -> None:
    assert of_code("HS208", net(), "bf16-mixed") == of_code("HS208", net(torch.bfloat16), None) == []


# ------------------------------------------------------------------ HS410


class WithLoss(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.loss = loss


@pytest.mark.parametrize(("policy", "dtype"), [("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)])
def test_cross_entropy_of_probabilities(policy: str, dtype: torch.dtype) -> None:
    (found,) = of_code("HS410", WithLoss(nn.BCELoss()), policy)
    logit = float(found.numbers["logit"])
    near = torch.tensor([logit - 0.05, logit + 0.05], dtype=torch.float64).sigmoid().float().to(dtype)
    assert near[0] < 1 and near[1] == 1
    # What torch does from there on: the consequence that the finding states.
    module = WithLoss(nn.BCELoss())
    with torch.no_grad():
        module.layer.weight.fill_(2 * logit)
        module.layer.bias.zero_()
    with torch.autocast("cpu", dtype=dtype):
        loss = module.loss(module.layer(torch.ones(1, 1)).sigmoid(), torch.zeros(1, 1))
    loss.backward()
    assert module.layer.weight.grad is not None and loss.item() == 100
    broken = math.isnan(module.layer.weight.grad.item())
    assert ("NaN" in found.consequence, found.severity == Severity.ERROR) == (broken, broken)
    assert broken or module.layer.weight.grad.item() == 0


def test_cross_entropy_that_autocast_refuses() -> None:
    for options in ({"policy": "bf16-mixed:rules=cuda"}, {"policy": "bf16-mixed", "facts": A100}):
        (found,) = of_code("HS410", WithLoss(nn.BCELoss()), **cast(Any, options))
        assert found.severity == Severity.ERROR and "refuses" in found.consequence


def test_cross_entropy_of_logits_or_in_fp32_is_fine() -> None:
    assert of_code("HS410", WithLoss(nn.BCEWithLogitsLoss()), "bf16-mixed") == []
    assert of_code("HS410", WithLoss(nn.BCELoss()), "fp32") == of_code("HS410", WithLoss(nn.BCELoss()), None) == []
    assert of_code("HS410", WithLoss(nn.BCELoss()), "bf16-mixed:keep_fp32=loss") == []


# ------------------------------------------------------------------ HS501


@pytest.mark.parametrize(
    ("module", "policy", "facts", "reason"),
    [
        (net(torch.float64), "bf16-mixed", None, "float64"),
        (nn.Linear(8, 8, dtype=torch.complex64), "bf16-mixed", None, "complex64"),
        (net(), "bf16-mixed:keep_fp32=0+1", None, "keeps in FP32"),
        (net(), "bf16-mixed", A100, "are on cpu"),
    ],
)
def test_autocast_without_effect(module: nn.Module, policy: str, facts: DeviceFacts | None, reason: str) -> None:
    (found,) = of_code("HS501", module, policy, facts=facts)
    assert found.severity == Severity.WARNING and reason in found.what
    if facts is None and ":" not in policy:  # torch agrees
        dtype = next(module.parameters()).dtype
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(torch.ones(1, 8, dtype=dtype)).dtype is dtype


def test_autocast_with_some_effect_is_fine() -> None:
    mixed = net()
    mixed[0].double()
    assert of_code("HS501", mixed, "bf16-mixed") == []
    assert of_code("HS501", net(), "bf16-mixed:keep_fp32=0") == []
    assert of_code("HS501", net(), "bf16-mixed", facts=SLOW_CPU) == []
    assert of_code("HS501", net(torch.float64), "fp32") == of_code("HS501", net(torch.float64), None) == []
    assert of_code("HS501", nn.ReLU(), "bf16-mixed", lr=None) == []


# ------------------------------------------------------------------ HS502, HS503, HS504


@pytest.mark.parametrize(
    ("code", "policy", "facts"),
    [("HS502", "fp16-mixed", SLOW_CPU), ("HS502", "fp16-master", P100), ("HS503", "bf16-mixed", T4)],
)
def test_formats_that_the_device_lacks(code: str, policy: str, facts: DeviceFacts) -> None:
    (found,) = of_code(code, net(), policy, facts=facts)
    assert found.severity == Severity.NOTE and facts.name in found.what
    assert of_code(code, net(), policy) == []  # nothing is known of the device
    assert of_code(code, net(), f"{policy}:emulate", facts=facts) == []
    assert of_code(code, net(), policy, facts=A100) == []
    assert of_code(code, net(), "fp32", facts=facts) == []


def test_compiled_modules() -> None:
    wrapped = torch.compile(net(), backend="eager")
    in_place = net()
    in_place[1].compile(backend="eager")
    for module in (wrapped, in_place):
        (found,) = of_code("HS504", module, "bf16-mixed")
        assert found.severity == Severity.NOTE and found.numbers["modules"] == 1
    assert of_code("HS504", net(), "bf16-mixed") == []
    low = torch.compile(net(torch.bfloat16), backend="eager")
    (bare,) = of_code("HS304", low, None)
    assert bare.place is not None and bare.place.parameter == "0.weight"

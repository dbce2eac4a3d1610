"""The lint as a whole: silent on clean set-ups, read-only, and not to be stopped by a rule that fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import halfstep
from halfstep.doctor import codes
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import RULES, lint
from halfstep.hardware import DeviceFacts, FormatSupport, detect
from halfstep.policy import POLICIES, parse


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 8), nn.CrossEntropyLoss())


def loud(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity > Severity.NOTE]


def test_every_code_of_the_lint_has_its_rule() -> None:
    assert set(RULES) == {code.code for code in codes.CODES.values() if code.source == "lint"}


@pytest.mark.parametrize("name", ["fp32", "bf16-mixed", "bf16-mixed:emulate", "fp16-mixed", "fp16-mixed:rules=cuda"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_fp32_parameters_are_clean_under_autocast(name: str, optimizer: type[torch.optim.Optimizer]) -> None:
    net, policy = model(), parse(name)
    scaler = halfstep.GradScaler("cpu") if policy.loss_scaling else None
    found = lint(net, optimizer(net.parameters(), lr=1e-5), policy=policy, scaler=scaler, facts=detect("cpu"))  # type: ignore[call-arg]
    assert loud(found) == []
    native = {name: FormatSupport("native", "") for name in ("fp32", "tf32", "bf16", "fp16", "fp8")}
    facts = DeviceFacts("cpu", "a CPU", 1, native, "")
    assert lint(net, optimizer(net.parameters(), lr=1e-5), policy=policy, scaler=scaler, facts=facts) == []  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["bf16-master", "fp16-master"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("brings_16_bits", [False, True])
def test_halfsteps_masters_are_clean_before_and_after_a_step(name: str, own: bool, brings_16_bits: bool) -> None:
    net, policy = model(), POLICIES[name]
    if brings_16_bits:
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.to(policy.compute_dtype)
    kind = halfstep.optim.AdamW if own else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(net[:-1].parameters(), lr=1e-5, weight_decay=0.01)  # type: ignore[assignment]
    mp = halfstep.MixedPrecision(net, optimizer, policy)
    assert any(p.dtype is policy.compute_dtype for p in net.parameters()) == brings_16_bits
    for _ in range(2):
        # The optimizer that the user holds, and the masters around it, if any.
        for optimizers in ([optimizer], [optimizer, mp.masters] if mp.masters else [optimizer]):
            assert lint(net, optimizers, policy=policy, scaler=mp.scaler if policy.loss_scaling else None) == []
        if mp.masters is not None:
            assert lint(net, mp.masters, policy=None, scaler=mp.scaler if policy.loss_scaling else None) == []
        with mp.autocast():
            loss = net[:-1](torch.randn(16, 32)).float().square().mean()
        mp.backward(loss)
        mp.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_16_bit_backbone_under_fp32_adapters_is_clean(dtype: torch.dtype) -> None:
    backbone = model().to(dtype).requires_grad_(False).eval()
    adapter = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    everything = [*backbone.parameters(), *adapter.parameters()]
    for parameters in (adapter.parameters(), everything):
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        assert lint([backbone, adapter], optimizer, policy=parse("bf16-mixed")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inference_is_clean(dtype: torch.dtype) -> None:
    assert lint(model().to(dtype), [], policy=None) == []
    assert [f.code for f in lint(model().to(dtype), [], policy=None, training=True)] != []


def test_it_changes_nothing_and_draws_nothing() -> None:
    net = model().bfloat16()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01)
    steps: list[object] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append("own"))
    everywhere = register_optimizer_step_pre_hook(lambda *_: steps.append("global"))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)

    def everything() -> Iterator[Tensor]:
        yield torch.get_rng_state()
        yield from net.state_dict().values()
        for parameter in net.parameters():
            assert parameter.grad is not None
            yield parameter.grad

    try:
        before = [tensor.clone() for tensor in everything()]
        assert len(lint(net, optimizer, policy=None)) > 3
    finally:
        everywhere.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (steps, len(optimizer.state)) == ([], 0)


class BrokenScaler(torch.amp.GradScaler):
    """Somebody's scaler that cannot be asked."""

    def is_enabled(self) -> bool:
        raise RuntimeError("no device, no answer")


def test_a_rule_that_fails_is_noted_once_and_stops_no_other() -> None:
    net = nn.Linear(4, 4).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = lint(net, optimizer, policy=None, scaler=BrokenScaler("cpu"))
    failed = [finding for finding in found if finding.code == "HS506"]
    assert len(failed) == 1 and failed[0].severity == Severity.NOTE
    assert "HS207, HS208" in failed[0].what and "no device, no answer" in failed[0].what
    assert "HS304" in [finding.code for finding in found]


class BrokenGroups(torch.optim.SGD):
    """Its groups exist after somebody has prepared it."""

    @property
    def param_groups(self) -> list[dict[str, object]]:
        raise RuntimeError("call prepare() first")

    @param_groups.setter
    def param_groups(self, groups: object) -> None:
        pass

    def add_param_group(self, param_group: dict[str, object]) -> None:
        pass


def test_a_set_up_that_cannot_be_read_is_noted() -> None:
    found = lint(nn.Linear(2, 2), BrokenGroups([nn.Parameter(torch.ones(1))], lr=0.1), policy=None)
    assert [finding.code for finding in found] == ["HS506"]
    assert "call prepare() first" in found[0].what


def test_findings_are_ordered_and_grouped() -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))).half()
    groups = [{"params": [p for p in net.parameters() if (p.ndim == 1) is bias]} for bias in (False, True)]
    found = lint(net, torch.optim.Adam(groups, lr=1e-3), policy=None)
    assert [f.severity for f in found] == sorted((f.severity for f in found), reverse=True)
    names = [f.code for f in found]
    assert {"HS208", "HS304", "HS305", "HS308"} <= set(names)
    assert all(names.count(code) == 1 for code in ("HS208", "HS304", "HS305", "HS308"))
    masters = next(f for f in found if f.code == "HS304")
    assert "all 10 trainable parameters (1,360 elements) are fp16" in masters.what and masters.place is not None
    assert (masters.place.module, masters.place.module_type, masters.place.parameter) == ("0", "Linear", "0.weight")

"""HS305, HS307, HS308, HS311: what fires, and the near miss beside it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint
from halfstep.doctor.lints import asking

ADAPTIVE = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Rprop,
    torch.optim.Muon,
]


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 16, bias=False).to(dtype)


def of_code(code: str, module: nn.Module, optimizer: Any, **options: Any) -> list[Finding]:
    return [finding for finding in lint(module, optimizer, **{"policy": None, **options}) if finding.code == code]


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    return optimizer


# ------------------------------------------------------------------ asking


@pytest.mark.parametrize("kind", [*ADAPTIVE, torch.optim.SGD, torch.optim.ASGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_predicted_state_is_the_one_that_it_makes(kind: Any, dtype: torch.dtype) -> None:
    module = net(dtype)
    optimizer = kind(module.parameters(), lr=1e-3)
    predicted = asking.state_dtypes(optimizer, optimizer.param_groups[0], dtype)
    made = stepped(module, optimizer).state[module.weight]
    assert predicted == {k: v.dtype for k, v in made.items() if isinstance(v, Tensor) and v.numel() > 1}


@pytest.mark.parametrize("kind", [*ADAPTIVE, torch.optim.SGD, torch.optim.ASGD])
def test_whether_the_update_follows_the_gradients_size(kind: Any) -> None:
    optimizer = kind(net(torch.float32).parameters(), lr=1e-3)
    assert asking.is_normalised(optimizer, optimizer.param_groups[0]) == (kind in ADAPTIVE)


def test_what_cannot_be_asked_is_not_known() -> None:
    needs_closure = torch.optim.LBFGS(net().parameters())
    assert asking.is_normalised(needs_closure, needs_closure.param_groups[0]) is None
    assert asking.state_dtypes(needs_closure, needs_closure.param_groups[0], torch.bfloat16) == {}


# ------------------------------------------------------------------ HS305


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("before", [True, False])
def test_moments_in_16_bits(kind: Any, dtype: torch.dtype, before: bool) -> None:
    module = net(dtype)
    optimizer = kind(module.parameters(), lr=1e-3)
    if not before:
        stepped(module, optimizer)
    (found,) = of_code("HS305", module, optimizer)
    assert found.severity == Severity.WARNING
    stepped(module, optimizer)
    for name, value in optimizer.state[module.weight].items():
        if value.numel() > 1:
            assert value.dtype is dtype and name in found.what


def test_no_moments_or_fp32_moments_are_fine() -> None:
    module = net()
    for optimizer in (
        torch.optim.SGD(module.parameters(), lr=0.1),
        halfstep.optim.AdamW(module.parameters()),
        halfstep.optim.AdamW(module.parameters(), state="bf16"),  # whose squares are rounded stochastically
        halfstep.MasterWeights(torch.optim.AdamW(module.parameters())),
    ):
        assert of_code("HS305", module, optimizer) == []
        assert of_code("HS305", module, stepped(module, optimizer)) == []
    (found,) = of_code("HS305", module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    assert "momentum_buffer" in found.what
    wide = net(torch.float32)
    assert of_code("HS305", wide, stepped(wide, torch.optim.AdamW(wide.parameters()))) == []


class KahanAdam(torch.optim.Optimizer):
    """Moments and a compensation in the parameter's format, as lean optimizers have them."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for name in ("exp_avg", "exp_avg_sq", "kahan_comp"):
                    state.setdefault(name, torch.zeros_like(p))


def test_16_bit_moments_of_an_optimizer_that_compensates_are_its_choice() -> None:
    module = net()
    optimizer = stepped(module, KahanAdam(module.parameters()))
    (found,) = of_code("HS305", module, optimizer)
    assert found.severity == Severity.NOTE and "exp_avg and exp_avg_sq" in found.what
    assert [f.code for f in lint(module, optimizer, policy=None) if f.severity > Severity.NOTE] == []


# ------------------------------------------------------------------ HS307


def decays(dtype: torch.dtype, beta: float) -> bool:
    """Whether Adam's second moment falls to less than half in 2 / (1 - beta) steps without a gradient, in torch."""
    parameter = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, betas=(0.9, beta))
    parameter.grad = torch.linspace(1, 1.4, 64).to(dtype)
    optimizer.step()
    square = optimizer.state[parameter]["exp_avg_sq"]
    before = square.clone()
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(min(int(2 / (1 - beta)), 2000)):
        optimizer.step()
    return bool((square < before / 2).all())


@pytest.mark.parametrize(
    ("dtype", "beta", "fires"),
    [
        (torch.bfloat16, 0.999, True),
        (torch.bfloat16, 0.997, True),  # some numbers only, but no decay passes them
        (torch.bfloat16, 0.98, False),
        (torch.float16, 0.9999, True),
        (torch.float16, 0.999, False),
    ],
)
def test_beta_against_the_states_format(dtype: torch.dtype, beta: float, fires: bool) -> None:
    module = net(dtype)
    found = of_code("HS307", module, torch.optim.Adam(module.parameters(), betas=(0.9, beta)))
    assert len(found) == fires == (not decays(dtype, beta))
    if fires:
        assert found[0].numbers["beta"] == beta and "betas[1]" in found[0].what
        assert found[0].severity == Severity.WARNING


def test_beta_with_fp32_state_is_fine() -> None:
    wide = net(torch.float32)
    assert of_code("HS307", wide, torch.optim.Adam(wide.parameters(), betas=(0.9, 0.99999))) == []
    module = net()
    for optimizer in (
        halfstep.optim.AdamW(module.parameters(), state="bf16"),
        halfstep.MasterWeights(torch.optim.AdamW(module.parameters())),
        torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    ):
        assert of_code("HS307", module, optimizer) == []


# ------------------------------------------------------------------ HS308


@pytest.mark.parametrize(
    ("dtype", "eps", "severity"),
    [
        (torch.float16, 1e-8, Severity.ERROR),
        (torch.float16, 1e-6, Severity.NOTE),
        (torch.float16, 1e-4, None),
        (torch.bfloat16, 1e-8, None),
    ],
)
def test_eps_against_the_states_format(dtype: torch.dtype, eps: float, severity: Severity | None) -> None:
    module = net(dtype)
    optimizer = torch.optim.Adam(module.parameters(), eps=eps)
    found = of_code("HS308", module, optimizer)
    assert [f.severity for f in found] == ([] if severity is None else [severity])
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    assert bool(module.weight.isnan().all()) == (severity == Severity.ERROR)


def test_a_fused_step_adds_eps_in_fp32() -> None:
    module = net(torch.float16)
    optimizer = torch.optim.Adam(module.parameters(), eps=1e-8, fused=True)
    assert of_code("HS308", module, optimizer) == []
    module.weight.grad = torch.zeros_like(module.weight)
    optimizer.step()
    assert module.weight.isfinite().all()


# ------------------------------------------------------------------ HS311


def test_compensation_in_a_compiled_step() -> None:
    module = net()
    optimizer = stepped(module, KahanAdam(module.parameters()))
    assert of_code("HS311", module, optimizer) == []
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    (found,) = of_code("HS311", module, optimizer)
    assert found.severity == Severity.WARNING and "its step is compiled" in found.what


def update(p: Tensor) -> None:
    p.mul_(0.5)


compiled_update = torch.compile(update, backend="eager")


class CallsCompiled(KahanAdam):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            compiled_update(p)


def test_compensation_beside_a_compiled_function_that_the_step_calls() -> None:
    module = net()
    optimizer = CallsCompiled(module.parameters())
    optimizer.state[module.weight]["kahan_comp"] = torch.zeros_like(module.weight)
    (found,) = of_code("HS311", module, optimizer)
    assert "calls compiled_update" in found.what


def test_a_compiled_step_without_compensation_is_fine() -> None:
    module = net()
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    own = halfstep.optim.AdamW(module.parameters(), master="none", rounding="kahan")
    own.step = torch.compile(own.step, backend="eager")  # type: ignore[method-assign]  # it is not traced
    assert inspect.isfunction(own.step)
    wide = net(torch.float32)
    third = stepped(wide, KahanAdam(wide.parameters()))
    third.step = torch.compile(third.step, backend="eager")  # type: ignore[method-assign]
    for subject, stepper in ((module, optimizer), (module, own), (wide, third)):
        assert of_code("HS311", subject, stepper) == []

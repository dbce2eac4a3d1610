"""HS201: gradients that flush to zero; HS203, HS205, HS206: what the loss scale's course says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.doctor import Examination, Finding, Severity, examine

NEGLIGIBLE = 2.0**-20


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)]
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, factor: float) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
    return ((model(x).float() - y) ** 2).mean() * factor


def gradients(model: nn.Module, factor: float, lowered: bool, scale: float = 1.0) -> list[Tensor]:
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.float16, enabled=lowered):
        loss = loss_of(twin, factor)
    (loss * scale).backward()
    return [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]


def counted(model: nn.Module, factor: float, scale: float = 1.0) -> tuple[int, int]:
    """Zero in an fp16 run, and not zero in an FP32 run: of two runs of their own."""
    zero = nonzero = 0
    fp32, fp16 = gradients(model, factor, False, scale), gradients(model, factor, True, scale)
    for exact, got in zip(fp32, fp16, strict=True):
        there = exact.abs() > exact.abs().max() * NEGLIGIBLE
        nonzero += int(there.sum())
        zero += int((there & (got == 0)).sum())
    return zero, nonzero


def trained(model: nn.Module, factor: float, scale: float = 1.0) -> list[Finding]:
    def program() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, factor)
        (loss * scale).backward()

    return [finding for finding in examine(program) if finding.code == "HS201"]


# ------------------------------------------------------------------ HS201


#: Of the factor on the loss: nearly all gradients flush, many, and hardly any.
POWERS = (-26, -20, -18, -16, -14, -8)


@pytest.mark.parametrize("power", POWERS)
def test_the_share_is_that_of_two_runs_of_their_own(power: int) -> None:
    model, factor = network(), 2.0**power
    zero, nonzero = counted(model, factor)
    findings = trained(model, factor)
    assert len(findings) == (zero >= 0.25 * nonzero)
    for finding in findings:
        # The shadow's ReLU follows its own signs, and FP32 sums in another order: a few elements of thousands.
        assert finding.numbers["zero"] == pytest.approx(zero, rel=0.01)
        assert finding.numbers["nonzero_in_fp32"] == pytest.approx(nonzero, rel=0.01)
        assert finding.severity is (Severity.ERROR if zero >= 0.9 * nonzero else Severity.WARNING)
        assert f"{finding.numbers['share']:.1%} of all gradient elements are zero without a loss scale" in finding.what


def test_all_severities_were_met() -> None:
    shares = [zero / nonzero for zero, nonzero in (counted(network(), 2.0**power) for power in POWERS)]
    assert any(share > 0.9 for share in shares) and any(0.25 < share < 0.9 for share in shares) and shares[-1] < 0.25


def test_the_scale_that_is_suggested_works() -> None:
    model, factor = network(), 2.0**-20
    (finding,) = trained(model, factor)
    scale = finding.numbers["suggested_scale"]
    assert isinstance(scale, float)
    assert trained(model, factor, scale) == []
    scaled = gradients(model, factor, True, scale)
    amax = max(float(gradient.abs().max()) for gradient in scaled)
    assert 2.0**11 <= amax <= 2.0**14  # two octaves are left below 65504
    zero, nonzero = counted(model, factor, scale)
    assert zero < 0.02 * nonzero


def test_the_suggested_scale_starts_from_the_one_in_use() -> None:
    """Half a scaler's work done: the advice is the same as without it."""
    model, factor = network(), 2.0**-24
    (unscaled,) = trained(copy.deepcopy(model), factor)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def program() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, factor)
        scaler.scale(loss).backward()

    (finding,) = [finding for finding in examine(program) if finding.code == "HS201"]
    assert finding.numbers["suggested_scale"] == unscaled.numbers["suggested_scale"]
    assert "at loss scale 4 " in finding.what


def test_the_layer_and_the_op_are_named() -> None:
    """Only the last layer's gradients are large enough."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)

    def program() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(torch.ones(4, 16)).float().mean() * 0.03
        loss.backward()

    (finding,) = [f for f in examine(program) if f.code == "HS201"]
    assert "worst in 0: 100%" in finding.what
    assert finding.place is not None and (finding.place.module, finding.place.phase) == ("1", "backward")


def test_shares_by_step_and_layer() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Examination() as examination:
        for factor in (1.0, 2.0**-26):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, factor)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    by_step = examination.flush.by_step
    assert sorted(by_step) == [1, 2] and set(by_step[1]) == {"0", "2", "4"}
    assert max(by_step[1].values()) < 0.25 < 0.9 < by_step[2]["0"]
    (finding,) = [finding for finding in examination.findings() if finding.code == "HS201"]
    assert finding.step == 2


def tail(x: Tensor) -> Tensor:
    """A softmax that is sure of itself: most of its gradients are far below the largest."""
    return torch.nn.functional.cross_entropy(x, torch.zeros(len(x), dtype=torch.long))


QUIET: dict[str, Callable[[nn.Module], Tensor]] = {
    "large enough": lambda model: loss_of(model, 1.0),
    "zero in FP32 too": lambda model: loss_of(model, 1.0) * 0.0,
    "a dead layer": lambda model: torch.relu(model[0](torch.ones(4, 32)) - 100.0).float().sum(),
    "a far tail": lambda model: tail(model[0](torch.ones(4, 32)).float() * 0.1 - torch.arange(64) * 1.0),
}


@pytest.mark.parametrize("what", QUIET)
def test_no_flush(what: str) -> None:
    model = network()

    def program() -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = QUIET[what](model)
        loss.backward()

    assert [str(finding) for finding in examine(program) if finding.severity > Severity.NOTE] == []


def test_bf16_needs_no_scale() -> None:
    model = network()

    def program() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, 2.0**-26)
        loss.backward()

    assert examine(program) == []


# ------------------------------------------------------------------ the course of the scale


SCALERS: dict[str, Callable[..., Any]] = {
    "torch": lambda **options: torch.amp.GradScaler("cpu", **options),
    "halfstep": lambda **options: halfstep.GradScaler("cpu", **options),
}


@pytest.fixture(params=SCALERS)
def scaler_of(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return SCALERS[request.param]


def run(scaler: Any, hidden: Callable[[Tensor], Tensor], steps: int) -> tuple[list[Finding], Examination]:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1e-9)
    with Examination() as examination:
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(hidden(weight.half()).float().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    return examination.findings(), examination


def found(findings: list[Finding]) -> list[tuple[str, Severity]]:
    return [(finding.code, finding.severity) for finding in findings]


def test_a_scale_that_settles_is_a_note(scaler_of: Callable[..., Any]) -> None:
    scaler = scaler_of(init_scale=2.0**16)
    findings, examination = run(scaler, lambda weight: weight * 64, 6)
    assert found(findings) == [("HS206", Severity.NOTE)]
    # weight * 64 and a mean over 4: the gradient is 16 times the scale, and in fp16 from the product on.
    expected = [(2.0**power, 2.0**power * 16 < 65520) for power in (16, 15, 14, 13, 12, 11)]
    assert [(step.scale, step.applied) for step in examination.course.steps] == expected
    skipped = sum(not step.applied for step in examination.course.steps)
    assert f"{skipped} of 6 steps were skipped" in findings[0].what and skipped > 0
    assert scaler.get_scale() == 2.0**16 / 2**skipped


def test_a_scale_that_fits_says_nothing(scaler_of: Callable[..., Any]) -> None:
    findings, examination = run(scaler_of(init_scale=2.0**8), lambda weight: weight * 64, 3)
    assert findings == []
    assert [(step.scale, step.applied) for step in examination.course.steps] == [(256.0, True)] * 3


def test_a_scaler_that_is_off_has_no_course(scaler_of: Callable[..., Any]) -> None:
    findings, examination = run(scaler_of(enabled=False), lambda weight: weight * 64, 2)
    assert (findings, examination.course.steps, examination.course.scale) == ([], [], None)


def test_a_forward_overflow_is_beyond_any_scale(scaler_of: Callable[..., Any]) -> None:
    """The gradient of a square is finite where the square is not: the first steps are skipped, and the loss is inf."""
    findings, examination = run(scaler_of(init_scale=2.0**16), lambda weight: ((weight * 300) ** 2).float() * 1e-3, 12)
    applied = [step.applied for step in examination.course.steps]
    assert applied == sorted(applied) and 0 < applied.index(True) < 10  # nothing collapses
    codes = [finding.code for finding in findings]
    assert codes.count("HS203") == 1 and "HS206" not in codes
    cause = next(f for f in findings if f.code == "HS101" and f.place and f.place.phase == "forward")
    hopeless = next(f for f in findings if f.code == "HS203")
    assert hopeless.place == cause.place and hopeless.severity is Severity.ERROR
    assert "it is the forward pass that overflows (HS101 here)" in hopeless.what


def test_an_overflow_that_does_not_reach_the_loss_is_not_to_blame(scaler_of: Callable[..., Any]) -> None:
    seen: list[float] = []

    def hidden(weight: Tensor) -> Tensor:
        seen.append(float(((weight.detach() * 300) ** 2).sum()))  # read for a log
        return weight * 64

    findings, _ = run(scaler_of(init_scale=2.0**16), hidden, 6)
    assert "HS206" in [finding.code for finding in findings] and "HS203" not in [finding.code for finding in findings]
    assert "HS101" in [finding.code for finding in findings]


def test_the_scale_collapses() -> None:
    """NaN in the gradient at every step, of data: PyTorch's scaler halves for ever."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    findings, examination = run(scaler, lambda weight: weight * torch.tensor([1.0, 1.0, torch.nan, 1.0]).half(), 12)
    codes = [finding.code for finding in findings]
    assert {"HS205", "HS203", "HS110"} <= set(codes) and "HS206" not in codes
    collapse = next(finding for finding in findings if finding.code == "HS205")
    assert (collapse.numbers["skipped_in_a_row"], collapse.numbers["steps"]) == (12, 12)
    assert collapse.numbers["lowest_scale"] == examination.course.steps[-1].scale == 2.0**4 / 2**11
    assert "12 steps in a row were skipped and the loss scale fell to 0.0078125" in collapse.what


@pytest.mark.parametrize(("skips", "code"), [(9, []), (10, ["HS205"])])
def test_ten_in_a_row_are_too_many(skips: int, code: list[str]) -> None:
    with Examination() as examination:
        for step in range(12):
            examination.course.note(2.0 ** (40 - step), applied=step < 12 - skips)
    assert [finding.code for finding in examination.findings()] == code


@pytest.mark.parametrize(("lowest", "code"), [(1.0, []), (0.5, ["HS205"])])
def test_a_scale_below_one_flushes_what_it_should_save(lowest: float, code: list[str]) -> None:
    with Examination() as examination:
        for scale, applied in ((2.0, False), (lowest, True), (2.0, True)):
            examination.course.note(scale, applied)
    assert [finding.code for finding in examination.findings()] == code


def test_a_skip_at_the_floor_is_a_skip() -> None:
    """The scale is the same afterwards: only the gradients tell."""
    scaler = halfstep.GradScaler("cpu", init_scale=16.0, min_scale=16.0)
    _, examination = run(scaler, lambda weight: weight * torch.tensor([1.0, torch.nan, 1.0, 1.0]).half(), 2)
    assert [(step.scale, step.applied) for step in examination.course.steps] == [(16.0, False)] * 2


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_gradients_beyond_the_format_at_scale_1_are_not_the_scalers_business(scale: float) -> None:
    """The gradient of the product is 60000 / 4, in fp16, and that of the weight eight times as much."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    findings, _ = run(scaler, lambda weight: (weight * 8).float() * 60000, 1)
    codes = [finding.code for finding in findings]
    assert "HS101" in codes and "HS206" not in codes

"""HS406, HS407: ops that turn small errors into large ones."""

from __future__ import annotations

import pytest
import torch
from events import event_of, findings_of

from halfstep.doctor.detectors.cancellation import cancelled_differences, error_jumps
from halfstep.doctor.event import OpEvent
from halfstep.doctor.examination import Examination
from halfstep.doctor.finding import Finding, Severity

ATEN = torch.ops.aten
HALF, BF16 = torch.float16, torch.bfloat16


def run(func: object, *exact: torch.Tensor | float, dtype: torch.dtype = BF16, **kwargs: object) -> OpEvent:
    """An op on rounded tensors whose shadows are what they were rounded from."""
    rounded = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in exact]
    shadows = [(r, x) for r, x in zip(rounded, exact, strict=True) if isinstance(x, torch.Tensor)]
    return event_of(func, *rounded, shadows=shadows, **kwargs)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ HS406


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_the_complement_of_a_probability_near_one(dtype: torch.dtype) -> None:
    p = torch.tensor([1 - 1e-5, 1 - 2e-5, 0.5])
    (finding,) = findings_of(cancelled_differences, run(ATEN.rsub.Scalar, p, 1, dtype=dtype))
    assert (finding.code, finding.severity) == ("HS406", Severity.WARNING)
    assert (finding.numbers["cancelled"], finding.numbers["zeros"]) == (2, 2)


def test_a_variance_by_the_difference_of_squares() -> None:
    x = 100 + random(64, 256)
    mean_of_squares, square_of_mean = x.pow(2).mean(-1), x.mean(-1).pow(2)
    (finding,) = findings_of(cancelled_differences, run(ATEN.sub.Tensor, mean_of_squares, square_of_mean))
    assert finding.numbers["cancelled"] > 48
    centred = random(64, 256)
    event = run(ATEN.sub.Tensor, centred.pow(2).mean(-1), centred.mean(-1).pow(2))
    assert findings_of(cancelled_differences, event) == []


def test_alpha_is_part_of_the_operand() -> None:
    a = 1 + random(16) * 1e-4
    assert len(findings_of(cancelled_differences, run(ATEN.add.Tensor, 2 * a, torch.ones(16), alpha=-2))) == 1
    # The same numbers without the factor do not cancel.
    assert findings_of(cancelled_differences, run(ATEN.add.Tensor, 2 * a, torch.ones(16), alpha=-1)) == []
    assert len(findings_of(cancelled_differences, run(ATEN.rsub.Tensor, a, 2 * torch.ones(16), alpha=2))) == 1


def test_in_place_as_well() -> None:
    a = 1 + random(16) * 1e-4
    assert len(findings_of(cancelled_differences, run(ATEN.sub_.Tensor, a, torch.ones(16)))) == 1


def test_an_error_that_came_in_is_not_a_cancellation() -> None:
    a, b = torch.full((16,), 1.25, dtype=BF16), torch.ones(16, dtype=BF16)
    assert findings_of(cancelled_differences, event_of(ATEN.sub.Tensor, a, b, shadows=[(a, a.float() - 0.15)])) == []


X = random(4096)
QUIET = {
    "unrelated": lambda: run(ATEN.sub.Tensor, X, random(4096, seed=1)),
    "equal": lambda: run(ATEN.sub.Tensor, X, X.clone()),
    "zero in exact arithmetic": lambda: run(ATEN.sub.Tensor, X, X * (1 + 2.0**-23)),
    "right although small": lambda: run(ATEN.sub.Tensor, X.to(BF16).float() * 1.0078125, X.to(BF16).float()),
    "few": lambda: run(ATEN.sub.Tensor, X, torch.cat([X[:200] * 1.0001, random(3896, seed=1)])),
    "nothing to cancel": lambda: run(ATEN.add.Tensor, torch.zeros(8), 1e-9, dtype=HALF),
    "mask": lambda: run(ATEN.add.Tensor, X, torch.full((4096,), -torch.inf)),
    "fp32": lambda: run(ATEN.sub.Tensor, 1 + X * 1e-9, torch.ones(4096), dtype=torch.float32),
    "backward": lambda: run(ATEN.sub.Tensor, 1 + X * 1e-4, torch.ones(4096), phase="backward"),
    "no shadow": lambda: event_of(ATEN.sub.Tensor, (1 + X * 1e-4).to(BF16), torch.ones(4096, dtype=BF16)),
}


@pytest.mark.parametrize("what", QUIET)
def test_differences_that_are_fine(what: str) -> None:
    assert findings_of(cancelled_differences, QUIET[what]()) == []


# ------------------------------------------------------------------ HS407


def test_a_cosine_of_large_phases() -> None:
    phases = torch.linspace(500, 1000, 256)
    event = run(ATEN.cos.default, phases)
    (finding,) = findings_of(error_jumps, event)
    assert (finding.code, finding.severity) == ("HS407", Severity.WARNING)
    shadow = phases.cos()
    error = float((phases.to(BF16).cos().float() - shadow).norm() / shadow.norm())
    assert finding.numbers["error_after"] == pytest.approx(error, rel=1e-3)
    assert findings_of(error_jumps, run(ATEN.cos.default, phases / 100)) == []


def test_distances_by_way_of_squares() -> None:
    a = torch.rand(1, 2048, generator=torch.Generator().manual_seed(0))
    near = a + 1e-3 * random(8, 2048)
    assert len(findings_of(error_jumps, run(ATEN._euclidean_dist.default, a, near))) == 1
    assert findings_of(error_jumps, run(ATEN._euclidean_dist.default, a, a + random(8, 2048))) == []


def test_a_sum_that_cancels() -> None:
    """A mean of what is large and nearly balanced; of what is balanced exactly, FP32's own result is noise."""
    x = 100 * random(32, 1024)
    balanced = (x.double() - x.double().mean(-1, keepdim=True)).float()
    tilted = balanced + 0.003
    assert len(findings_of(error_jumps, run(ATEN.sum.dim_IntList, tilted, [-1]))) == 1
    event = run(ATEN.sum.dim_IntList, balanced, [-1])
    shadow = event.outputs[0].shadow
    assert shadow is not None
    assert float((event.outputs[0].tensor - shadow).norm()) > float(shadow.norm())  # wrong, and meaningless
    assert findings_of(error_jumps, event) == []
    assert findings_of(error_jumps, run(ATEN.sum.dim_IntList, x.abs(), [-1])) == []


JUMPS_QUIET = {
    "mm": lambda: run(ATEN.mm.default, random(32, 256), random(256, 32, seed=1)),
    "exp": lambda: run(ATEN.exp.default, X),
    "softmax": lambda: run(ATEN._softmax.default, random(16, 64), -1, False),
    "tanh": lambda: run(ATEN.tanh.default, X),
    "layer_norm": lambda: run(ATEN.native_layer_norm.default, random(16, 64), [64], None, None, 1e-5),
    "a difference": lambda: run(ATEN.rsub.Scalar, torch.tensor([1 - 1e-5]), 1),
    "flush": lambda: run(ATEN.mul.Tensor, torch.full((8,), 1e-4), torch.full((8,), 1e-4), dtype=HALF),
    "overflow": lambda: run(ATEN.mul.Tensor, torch.full((8,), 1e4), torch.full((8,), 1e4), dtype=HALF),
    "round": lambda: run(ATEN.round.default, torch.full((8,), 0.5001)),
    "backward": lambda: run(ATEN.cos.default, torch.linspace(500, 1000, 256), phase="backward"),
    "nothing rounded": lambda: event_of(ATEN.cos.default, torch.linspace(500, 1000, 256).to(BF16)),
    "empty": lambda: run(ATEN.cos.default, torch.empty(0)),
}


@pytest.mark.parametrize("what", JUMPS_QUIET)
def test_errors_that_do_not_jump(what: str) -> None:
    assert findings_of(error_jumps, JUMPS_QUIET[what]()) == []


def test_errors_that_come_in_large_do_not_jump() -> None:
    phases = torch.linspace(500, 1000, 256).to(BF16)
    event = event_of(ATEN.cos.default, phases, shadows=[(phases, phases.float() * 1.5)])
    assert findings_of(error_jumps, event) == []


# ------------------------------------------------------------------ end to end


def examined(fn) -> list[Finding]:  # type: ignore[no-untyped-def]
    with Examination(detectors=[cancelled_differences, error_jumps]) as examination:
        examination.returned(fn())
    return examination.findings()


def test_a_loss_of_probabilities() -> None:
    logits = torch.tensor([9.0, 10.0, -3.0])

    def loss(dtype: torch.dtype) -> torch.Tensor:
        p = torch.sigmoid(logits.to(dtype))
        return -(1 - p).log().mean()

    assert [f.code for f in examined(lambda: loss(BF16))] == ["HS406"]
    assert examined(lambda: loss(torch.float32)) == []
    assert examined(lambda: torch.nn.functional.softplus(logits.to(BF16)).mean()) == []


def test_a_difference_that_nobody_uses() -> None:
    def weighted() -> torch.Tensor:
        p = torch.tensor([1 - 1e-5]).to(BF16)
        return torch.where(p > 0.9, torch.zeros(1), 1 - p)

    assert examined(weighted) == []

"""HS301, HS302, HS303: updates that rounding takes back."""

from __future__ import annotations

import pytest
import torch
from events import event_of, findings_of

from halfstep import formats
from halfstep.doctor.detectors.updates import lost_updates
from halfstep.doctor.finding import Finding, Severity
from halfstep.observe.place import Place

ATEN = torch.ops.aten
LOW = [torch.bfloat16, torch.float16]


def weights(dtype: torch.dtype, n: int = 1000) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def lost_one_by_one(before: torch.Tensor, update: float) -> tuple[int, float]:
    """Elements that adding a number leaves alone, and the median of |update| / ulp, number by number."""
    format = formats.of(before.dtype)
    lost, ratios = 0, []
    for value in before.tolist():
        after = float(formats.round_to(torch.tensor(value + update, dtype=torch.float64), format))
        lost += after == value
        ratios.append(abs(update) / format.ulp(value))
    return lost, sorted(ratios)[(len(ratios) - 1) // 2]


@pytest.mark.parametrize("dtype", LOW)
def test_lost_weight_updates_are_counted_exactly(dtype: torch.dtype) -> None:
    w, small = weights(dtype), 2.0**-15
    before, u = w.clone(), torch.full((1000,), small, dtype=dtype)
    event = event_of(ATEN.add_.Tensor, w, u, parameters=[0], phase="optimizer")
    lost, ratio = lost_one_by_one(before, small)
    finding = only(findings_of(lost_updates, event))
    assert finding.code == "HS301"
    assert finding.severity == (Severity.ERROR if lost >= 900 else Severity.WARNING)
    assert (finding.numbers["lost"], finding.numbers["updates"]) == (lost, 1000)
    assert finding.numbers["update_in_ulps"] == pytest.approx(ratio)
    assert f"{lost:,} of 1,000" in finding.what


def test_half_of_the_updates_is_the_limit() -> None:
    near_one, near_zero = [1.0] * 50, [0.01] * 50  # 2**-9 is a quarter of an ulp at 1, and much at 0.01
    u = torch.full((100,), 2.0**-9, dtype=torch.bfloat16)
    w = torch.tensor(near_one + near_zero, dtype=torch.bfloat16)
    assert only(findings_of(lost_updates, event_of(ATEN.add_.Tensor, w, u, parameters=[0]))).numbers["lost"] == 50
    w = torch.tensor([1.0] * 49 + [0.01] * 51, dtype=torch.bfloat16)
    assert findings_of(lost_updates, event_of(ATEN.add_.Tensor, w, u, parameters=[0])) == []


@pytest.mark.parametrize(("trained", "code"), [(True, "HS301"), (False, "HS303")])
def test_a_parameter_is_known_by_its_gradient_and_an_average_by_having_none(trained: bool, code: str) -> None:
    w = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16), requires_grad=False)
    w.grad = torch.ones_like(w) if trained else None
    event = event_of(ATEN.sub_.Tensor, w, torch.full((8,), 1e-4, dtype=torch.bfloat16))
    assert only(findings_of(lost_updates, event)).code == code


@pytest.mark.parametrize(
    "op",
    [
        lambda w: event_of(
            ATEN.addcdiv_.default, w, torch.ones_like(w), torch.ones_like(w), value=-1e-4, parameters=[0]
        ),
        lambda w: event_of(
            ATEN.addcmul_.default, w, torch.ones_like(w), torch.ones_like(w), value=-1e-4, parameters=[0]
        ),
        lambda w: event_of(ATEN.lerp_.Scalar, w, torch.zeros_like(w), 1e-4, parameters=[0]),
        lambda w: event_of(ATEN.mul_.Tensor, w, 1 - 1e-4, parameters=[0]),
        lambda w: event_of(ATEN.add.out, w, torch.full_like(w, 1e-4), out=w, parameters=[0, 2]),
    ],
    ids=["addcdiv", "addcmul", "lerp", "mul", "out"],
)
def test_each_way_to_update(op) -> None:  # type: ignore[no-untyped-def]
    finding = only(findings_of(lost_updates, op(torch.ones(16, dtype=torch.bfloat16))))
    assert (finding.code, finding.numbers["share"]) == ("HS301", 1.0)


def test_a_list_is_judged_tensor_by_tensor() -> None:
    large, small = torch.ones(10, dtype=torch.bfloat16), torch.full((10_000,), 0.01, dtype=torch.bfloat16)
    updates = [torch.full_like(large, 1e-3), torch.full_like(small, 1e-3)]
    event = event_of(ATEN._foreach_add_.List, [large, small], updates, parameters=[0, 1])
    finding = only(findings_of(lost_updates, event))
    assert (finding.numbers["lost"], finding.numbers["updates"], finding.numbers["tensors"]) == (10, 10, 1)
    assert "1 of 2 tensors" in finding.what


def test_a_fused_optimizer_is_looked_into() -> None:
    p = [torch.ones(8, dtype=torch.bfloat16)]
    grads, avg, square = ([torch.full((8,), v, dtype=torch.bfloat16)] for v in (1.0, 1.0, 1.0))
    options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False}
    steps = [torch.tensor(100.0)]
    event = event_of(ATEN._fused_adamw_.default, p, grads, avg, square, [], steps, parameters=[0], **options)
    codes = [finding.code for finding in findings_of(lost_updates, event)]
    assert codes == ["HS301"]


def test_a_lost_decay_says_so() -> None:
    event = event_of(ATEN.mul_.Tensor, torch.ones(8, dtype=torch.bfloat16), 0.9999, parameters=[0], phase="optimizer")
    finding = only(findings_of(lost_updates, event))
    assert "decay" in finding.consequence
    assert finding.severity == Severity.WARNING


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("op", [ATEN.add_.Tensor, ATEN.add.Tensor], ids=["in place", "out of place"])
def test_gradients_that_no_longer_accumulate(op: object) -> None:
    gradient, more = torch.full((6,), 256.0, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)
    event = event_of(op, gradient, more, phase="backward", parameter="0.weight")
    finding = only(findings_of(lost_updates, event))
    assert (finding.code, finding.severity, finding.numbers["lost"]) == ("HS302", Severity.ERROR, 6)


def test_the_first_micro_batches_are_fine() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.zeros(1000, dtype=torch.bfloat16)
    for _ in range(16):
        more = torch.randn(1000, generator=generator).to(torch.bfloat16)
        event = event_of(ATEN.add_.Tensor, gradient, more, phase="backward", parameter="0.weight")
        assert findings_of(lost_updates, event) == []


def test_gradients_of_branches_are_not_accumulated() -> None:
    stream, branch = torch.full((6,), 256.0, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)
    assert findings_of(lost_updates, event_of(ATEN.add_.Tensor, stream, branch, phase="backward")) == []


# ------------------------------------------------------------------ running values


def test_a_counter_ends() -> None:
    event = event_of(ATEN.add_.Tensor, torch.tensor(256.0, dtype=torch.bfloat16), 1)
    finding = only(findings_of(lost_updates, event))
    assert (finding.code, finding.severity, finding.numbers["lost"]) == ("HS303", Severity.WARNING, 1)
    assert findings_of(lost_updates, event_of(ATEN.add_.Tensor, torch.tensor(255.0, dtype=torch.bfloat16), 1)) == []


def test_an_average_stands_still_far_from_its_goal_only() -> None:
    for goal, fires in ((2.0, True), (1.0, False), (1.03, False), (0.5, True)):
        average = torch.full((4,), 1.0, dtype=torch.bfloat16)
        event = event_of(ATEN.lerp_.Scalar, average, torch.full_like(average, goal), 1e-3)
        assert bool(findings_of(lost_updates, event)) == fires, goal


def test_averages_in_a_list_have_their_own_goals() -> None:
    averages = [torch.ones(4, dtype=torch.bfloat16) for _ in range(2)]
    goals = [torch.full((4,), 1.03, dtype=torch.bfloat16), torch.full((4,), 2.0, dtype=torch.bfloat16)]
    finding = only(findings_of(lost_updates, event_of(ATEN._foreach_lerp_.Scalar, averages, goals, 1e-3)))
    assert (finding.numbers["tensors"], finding.numbers["lost"]) == (1, 4)


HERE = Place("add_", file="train.py", line=7)


@pytest.mark.parametrize(
    ("made_by", "fires"),
    [
        (None, True),
        (Place("zeros", file="train.py", line=1), True),
        (Place("zeros_like", file="train.py", line=1), True),
        (HERE, True),  # the same line again and again
        (Place("mul_", file="train.py", line=7), True),  # average.mul_(d).add_(x, alpha=1 - d)
        (Place("mm", file="train.py", line=6), False),  # a residual stream
        (Place("add_", file="train.py", line=6), False),
        (Place("add_", module="blocks.0", file="train.py", line=7), False),  # the same line for another block
        (Place("sqrt", file="train.py", line=7), False),
    ],
)
def test_only_what_is_kept_stands_still(made_by: Place | None, fires: bool) -> None:
    total, more = torch.full((4,), 256.0, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    event = event_of(ATEN.add_.Tensor, total, more, made_by={0: made_by} if made_by else {})
    assert bool(findings_of(lost_updates, event)) == fires


def test_a_guard_of_a_denominator_is_meant_to_vanish() -> None:
    denominator = torch.full((4,), 0.1, dtype=torch.bfloat16)
    made = Place("div_", file="train.py", line=7)  # v.sqrt().div_(c).add_(eps), all in one line
    assert findings_of(lost_updates, event_of(ATEN.add_.Tensor, denominator, 1e-8, made_by={0: made})) == []
    assert len(findings_of(lost_updates, event_of(ATEN.add_.Tensor, denominator, 1e-8, made_by={0: HERE}))) == 1


# ------------------------------------------------------------------ near misses


@pytest.mark.parametrize(
    "event",
    [
        lambda: event_of(ATEN.add_.Tensor, torch.ones(4), torch.full((4,), 1e-4), parameters=[0]),
        lambda: event_of(ATEN.add_.Tensor, torch.ones(4, dtype=torch.bfloat16), torch.zeros(4), parameters=[0]),
        lambda: event_of(ATEN.mul_.Tensor, torch.zeros(4, dtype=torch.bfloat16), 0.9999, parameters=[0]),
        # FP32 would lose these as well.
        lambda: event_of(ATEN.add_.Tensor, torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1e-9), parameters=[0]),
        # 16-bit copies of FP32 masters stay the same for many steps.
        lambda: event_of(
            ATEN.copy_.default, torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1.001), parameters=[0]
        ),
        lambda: event_of(ATEN.clamp_.default, torch.ones(4, dtype=torch.bfloat16), None, 1.0, parameters=[0]),
        lambda: event_of(ATEN.add.Tensor, torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1e-4)),
        lambda: event_of(ATEN.add_.Tensor, torch.ones(0, dtype=torch.bfloat16), torch.ones(0), parameters=[0]),
        lambda: event_of(ATEN.add_.Tensor, torch.full((2,), torch.inf, dtype=torch.bfloat16), 1, parameters=[0]),
    ],
    ids=["fp32", "zero", "fixed point", "lost in fp32", "copy", "clamp", "new tensor", "empty", "inf"],
)
def test_quiet(event) -> None:  # type: ignore[no-untyped-def]
    assert findings_of(lost_updates, event()) == []


def test_the_examined_tensors_are_left_alone() -> None:
    w, g = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1e-4, dtype=torch.bfloat16)
    average = torch.ones(4)
    event = event_of(ATEN._foreach_add_.List, [w, average], [g, torch.full((4,), 1e-4)], parameters=[0, 1])
    assert len(findings_of(lost_updates, event)) == 1
    assert torch.equal(average, torch.ones(4) + 1e-4)
    assert torch.equal(event.inputs[1].tensor, torch.ones(4))  # from before the op, for the next detector
    assert torch.equal(w, torch.ones(4, dtype=torch.bfloat16))


def test_training_in_bf16_end_to_end() -> None:
    from halfstep.doctor.examine import examine

    def trained(dtype: torch.dtype, lr: float) -> set[str]:
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 4).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        x, y = torch.randn(8, 16, dtype=dtype), torch.randn(8, 4, dtype=dtype)

        def step() -> None:
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

        return {finding.code for finding in examine(step)}

    assert "HS301" in trained(torch.bfloat16, 1e-4)
    assert "HS301" not in trained(torch.bfloat16, 0.5)
    assert trained(torch.float32, 1e-4) == set()

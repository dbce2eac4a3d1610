"""The examination sees every op, follows it in FP32, and leaves the run as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from waits import Waits

import halfstep
from halfstep.doctor import Examination, Severity, examine
from halfstep.doctor.detectors import DETECTORS
from halfstep.doctor.event import OpEvent, Suspicion
from halfstep.doctor.execution import Execution
from halfstep.doctor.shadow import Shadows
from halfstep.observe.place import Place


class Recorder:
    """Keeps what the detectors are shown."""

    def __init__(self) -> None:
        self.events: list[tuple[str, list[Tensor], list[Tensor | None]]] = []

    def __call__(self, event: OpEvent) -> list[Suspicion]:
        tensors = [value.tensor.detach().clone() for value in event.outputs]
        shadows = [None if value.shadow is None else value.shadow.clone() for value in event.outputs]
        self.events.append((event.name, tensors, shadows))
        return []


def last_shadow(program: Callable[[], Tensor]) -> Tensor:
    recorder = Recorder()
    with Examination(detectors=(recorder,)) as examination:
        program()
    assert [finding for finding in examination.findings() if finding.code in ("HS506", "HS507")] == []
    shadow = recorder.events[-1][2][0]
    assert shadow is not None
    return shadow


# ------------------------------------------------------------------ the shadow is what FP32 would have

#: Programs on a (4, 6) tensor that keep its shape; each is run in bf16 and, as the oracle, in FP32.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "times": lambda x: x * 1.7,
    "plus itself transposed": lambda x: x + x.t().reshape(4, 6),
    "in place": lambda x: x.mul_(0.3).add_(1.1),
    "a row in place": lambda x: (x[1].exp_(), x)[1],
    "a column through a view": lambda x: (x.t()[2].sub_(0.7), x)[1],
    "matrix product": lambda x: x @ torch.full((6, 6), 0.13, dtype=x.dtype),
    "softmax": lambda x: torch.softmax(x, -1),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (6,)),
    "to fp32 and back": lambda x: (x.float() * 1.01).to(x.dtype),
    "copied into": lambda x: torch.zeros_like(x).copy_(x),
    "sum of a slice": lambda x: x + x[:, :3].sum(),
    "foreach": lambda x: (torch._foreach_mul_([x[0], x[3]], 1.3), x)[1],
    "out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "clone of a slice": lambda x: torch.cat([x[:2].clone(), x[2:]]),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7), st.integers(0, 1000))
@example(["a row in place", "a row in place", "a row in place", "softmax"], 1)  # exp of exp of exp: inf, and NaN
def test_the_shadow_is_the_same_program_in_fp32(names: list[str], seed: int) -> None:
    start = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def program(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x * 1

    shadow = last_shadow(lambda: program(start.clone()))
    # FP32 sums in another order on tensors of another layout; an in-place exp makes large numbers.
    torch.testing.assert_close(shadow, program(start.float()), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_shadow_of_a_training_step_is_that_of_fp32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x, y = torch.randn(5, 2, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    twin = copy.deepcopy(model)
    recorder = Recorder()

    def step(model: nn.Module, lowered: bool) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    with Examination(detectors=(recorder,)):
        step(model, lowered=True)
    step(twin, lowered=False)
    shadows = [s for name, _, shadows in recorder.events if name == "add_" for s in shadows if s is not None]
    weights = [s for s in shadows if s.shape == twin[4].weight.shape]
    torch.testing.assert_close(weights[-1], twin[4].weight.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights[-1], model[4].weight.detach())
    norms = [s for name, _, shadows in recorder.events if name == "native_batch_norm" for s in shadows[:1]]
    assert len(norms) == 2 and norms[0] is not None


def test_dropout_of_the_shadow_has_the_mask_of_the_run() -> None:
    x = torch.full((1000,), 1.005859375).bfloat16()  # not a number of bf16 times 1 / 0.7
    recorder = Recorder()
    with Examination(detectors=(recorder,)):
        torch.native_dropout(x * 1.01, 0.3, True)
    _, (output, *_), (shadow, *_) = next(event for event in recorder.events if event[0] == "native_dropout")
    assert shadow is not None
    assert torch.equal(shadow == 0, output == 0)
    torch.testing.assert_close(shadow, output.float(), rtol=0.01, atol=0)


# ------------------------------------------------------------------ the run is left as it is


def train(model: nn.Module, recompute: str | None = None) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed:emulate")
    for _ in range(2):
        x = torch.randn(4, 16, requires_grad=recompute == "reentrant")
        with mp.autocast():
            y = model(x) if recompute is None else checkpoint(model, x, use_reentrant=recompute == "reentrant")
            loss = y.float().pow(2).mean()
        mp.backward(loss)
        mp.step(max_grad_norm=1.0)
    return [*model.state_dict().values(), loss.detach(), torch.rand(1)]


def model_with_everything() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.GELU(), nn.Linear(32, 4))


@pytest.mark.parametrize("recompute", [None, "plain", "reentrant"])
def test_an_examined_run_has_the_bits_of_one_that_is_not(recompute: str | None) -> None:
    expected = train(model_with_everything(), recompute)
    with Examination() as examination:
        got = train(model_with_everything(), recompute)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert [f for f in examination.findings() if f.severity > Severity.NOTE] == []


def test_nothing_is_left_behind() -> None:
    model = model_with_everything()
    before = (
        torch.amp.GradScaler.update,
        torch.autograd.backward,
        torch.nn.modules.module._global_forward_hooks.copy(),
    )
    with pytest.raises(KeyError), Examination():
        train(model)
        raise KeyError
    assert before == (
        torch.amp.GradScaler.update,
        torch.autograd.backward,
        torch.nn.modules.module._global_forward_hooks.copy(),
    )
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ------------------------------------------------------------------ it survives any program


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 + 0 * x


def unusual() -> object:
    """Layouts, dtypes and subclasses that an observer stumbles over."""
    half = torch.randn(4, 4).half()
    sparse = torch.randn(4, 4).to_sparse()
    results: list[object] = [
        sparse @ torch.randn(4, 4),
        torch.fft.fft(torch.randn(8)),
        torch.view_as_real(torch.randn(4, dtype=torch.complex64)),
        half.to(torch.float8_e4m3fn).float(),
        half.view(torch.int16).view(torch.float16) + 1,
        torch.empty(0, dtype=torch.float16).sum(),
        torch.tensor(1.5).half() * 2,
        half.unique(),
        half.nonzero(),
        half[half > 0],
        half.unsqueeze(0).expand(3, 4, 4).contiguous(),
        half.double().half(),
        torch.empty(3, dtype=torch.float16).normal_(),
        torch.linalg.svd(torch.randn(3, 3)),
        half.tolist(),
        half.numpy(),
        half.t().as_strided((2, 2), (1, 2)) + 1,
        torch.randn(3).bernoulli_(0.5),
        copy.deepcopy(half),
    ]
    half.resize_(2, 2).add_(1)
    x = torch.randn(4, requires_grad=True)
    (slope,) = torch.autograd.grad(Scaled.apply(x.half()).float().pow(3).sum(), x, create_graph=True)
    slope.pow(2).sum().backward()
    with torch.inference_mode():
        results.append(torch.randn(4, 4).half() @ torch.randn(4, 4).half())
    return results


def test_unusual_tensors_pass_through() -> None:
    findings = examine(unusual)
    assert [str(finding) for finding in findings if finding.code == "HS506"] == []


def test_what_the_program_raises_passes_on_and_what_was_found_stays() -> None:
    def program() -> None:
        float((torch.tensor([300.0]).half() ** 2).sum())
        torch.randn(2, 3) @ torch.randn(2, 3)

    with Examination() as examination, pytest.raises(RuntimeError, match="cannot be multiplied"):
        program()
    assert [finding.code for finding in examination.findings()] == ["HS101"]


def test_a_detector_that_fails_is_reported_once_and_the_others_go_on() -> None:
    def broken(event: OpEvent) -> list[Suspicion]:
        raise ZeroDivisionError("of the detector")

    with Examination(detectors=(broken, *DETECTORS)) as examination:
        float((torch.tensor([300.0]).half() ** 2).sum())
    findings = examination.findings()
    assert [finding.code for finding in findings] == ["HS101", "HS506"]
    assert (
        findings[1].severity is Severity.NOTE
        and "'broken' failed: ZeroDivisionError: of the detector" in findings[1].what
    )


def test_an_op_that_fp32_cannot_follow_is_noted_once() -> None:
    def program() -> None:
        x = torch.randn(4).half()
        for _ in range(3):
            torch.ops.halfstep_tests.only_half(x)

    library = torch.library.Library("halfstep_tests", "FRAGMENT")
    library.define("only_half(Tensor x) -> Tensor")

    def only_half(x: Tensor) -> Tensor:
        if x.dtype is not torch.float16:
            raise TypeError("half only")
        return x * 2

    library.impl("only_half", only_half, "CPU")
    try:
        findings = examine(program)
    finally:
        library._destroy()
    assert [(f.code, f.severity) for f in findings] == [("HS507", Severity.NOTE)] and "only_half" in findings[0].what


def test_compiled_models_are_seen_in_eager_mode() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half() ** 2

    model = torch.compile(Square(), backend="eager")
    findings = examine(lambda: model(torch.tensor([300.0])))
    assert [f.code for f in findings] == ["HS101", "HS504"] and "eager" in findings[1].what


def test_one_examination_inside_another() -> None:
    def program() -> object:
        inner = examine(lambda: torch.tensor([300.0]).half() ** 2)
        assert [finding.code for finding in inner] == ["HS101"]
        return torch.tensor([400.0]).half() ** 2

    assert "HS101" in [finding.code for finding in examine(program)]


# ------------------------------------------------------------------ only what has consequences


def dead_branch(x: Tensor) -> Tensor:
    return torch.where(x > 200, torch.zeros_like(x), x * x)


def masked(x: Tensor) -> Tensor:
    return (x + torch.tensor([0.0, -65504.0], dtype=x.dtype) * 2).softmax(-1)


@pytest.mark.parametrize(
    ("program", "codes"),
    [
        (lambda: torch.tensor([300.0, 1.0]).half() ** 2, ["HS101"]),
        (lambda: (torch.tensor([300.0, 1.0]).half() ** 2) * 0 + 1, ["HS101"]),  # 0 * inf
        (lambda: dead_branch(torch.tensor([300.0, 1.0]).half()), []),
        (lambda: masked(torch.tensor([1.0, 2.0]).half()), []),
        (lambda: (torch.tensor([300.0]).half() ** 2, 1)[1], []),  # never used
        (lambda: torch.where(torch.tensor([True]), torch.zeros(1), torch.zeros(1).log()), []),
        (lambda: torch.zeros(1).log(), ["HS102"]),
        (lambda: torch.tensor([1.0, -torch.inf]) + 1, []),
        (lambda: torch.tensor([1.0, torch.nan]) + 1, ["HS110"]),
        (lambda: torch.full((2, 2), -torch.inf).softmax(-1), ["HS104"]),
        (lambda: torch.tensor([[0.0, -torch.inf]]).softmax(-1), []),
        (lambda: torch.empty(1000, dtype=torch.float16).fill_(torch.inf), []),
        (lambda: torch.tensor([255.0]).half() ** 2, []),  # 65025: just below
    ],
)
def test_what_reaches_nothing_is_not_reported(program: Callable[[], object], codes: list[str]) -> None:
    assert [finding.code for finding in examine(program)] == codes


@pytest.mark.parametrize("where", ["loss", "gradient", "parameter", "buffer", "item"])
def test_an_overflow_that_arrives_is_reported(where: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([300.0]))
            self.register_buffer("seen", torch.zeros(1))

        def forward(self) -> Tensor:
            square = self.weight.half() ** 2
            if where == "buffer":
                self.seen.copy_(square.detach())
            return square

    layer = Layer()

    def program() -> None:
        square = layer()
        if where == "loss":
            (square.float() ** 2).sum().backward()
        elif where == "gradient":  # 0 * inf behind a `where` that hides inf from the loss
            torch.where(square.isfinite(), layer.weight * square, 0.0).sum().backward()
        elif where == "parameter":
            with torch.no_grad():
                layer.weight.copy_(square)
        elif where == "item":
            square.item()

    findings = [finding for finding in examine(program) if finding.place and finding.place.phase == "forward"]
    assert [finding.code for finding in findings] == ["HS101"]
    expected = {
        "loss": "the loss",
        "gradient": "the gradient of weight",
        "parameter": "the parameter weight",
        "buffer": "the buffer seen",
    }
    assert findings[0].numbers["reached"] == expected.get(where, "Python")


def test_silence() -> None:
    def program() -> object:
        return torch.tensor([300.0]).half() ** 2

    assert examine(program, silence=["HS1*"]) == [] == examine(program, silence=["HS101@*test_examination.py:*"])
    assert len(examine(program, silence=["HS101@somewhere.else"])) == 1


def test_the_scaler_finding_its_scale_is_a_note() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    mp = halfstep.MixedPrecision(model, optimizer, "fp16-mixed:emulate")

    def program() -> None:
        for _ in range(4):
            with mp.autocast():
                loss = (model(torch.ones(1, 64)) * 10 - 30).float().pow(2).sum()
            mp.backward(loss)
            mp.step()

    findings = examine(program)
    assert [(finding.code, finding.severity) for finding in findings] == [("HS206", Severity.NOTE)]
    assert findings[0].numbers["loss_scale"] == 65536


class Compensated(torch.optim.Optimizer):
    """SGD that carries what a 16-bit weight cannot take up to the next step (Kahan summation)."""

    def __init__(self, parameters: Any, lr: float, kahan: bool) -> None:
        super().__init__(parameters, {"lr": lr, "kahan_sum": kahan})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("kahan_compensation", torch.zeros_like(p) if group["kahan_sum"] else None)
                update = -group["lr"] * p.grad
                if group["kahan_sum"]:
                    before = p.clone()
                    p.add_(update.add_(state["kahan_compensation"]))
                    state["kahan_compensation"] = update.sub_(p - before)
                else:
                    p.add_(update)


@pytest.mark.parametrize(("kahan", "codes"), [(True, []), (False, ["HS301"])])
def test_updates_that_compensation_keeps_are_not_lost(kahan: bool, codes: list[str]) -> None:
    weight = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = Compensated([weight], lr=1e-4, kahan=kahan)

    def program() -> None:
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()

    assert [finding.code for finding in examine(program)] == codes


def test_one_wait_an_op() -> None:
    """On a device the host waits wherever a number is asked for: of most ops, all numbers are asked for at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.ReLU())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(16, 32)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with Waits() as alone:
        step()
    with Waits() as waits, Examination() as examination:
        step()
    assert examination.findings() == []
    assert len(waits.seen) - len(alone.seen) < 1.25 * alone.ops


@pytest.mark.parametrize("name", ["empty_like", "new_empty", "new_empty_strided"])
def test_memory_that_nobody_has_written_is_compared_with_nothing(name: str) -> None:
    low = torch.randn(4, 4).bfloat16()
    shapes = {"empty_like": (), "new_empty": ([4, 4],), "new_empty_strided": ([4, 4], [4, 1])}
    execution = Execution(Shadows(), lambda what, error: pytest.fail(f"{what}: {error}"))
    op = getattr(torch.ops.aten, name).default
    made, event = execution.run(op, (low, *shapes[name]), {}, Place(name, "forward"), 0)
    assert [value.shadow for value in event.outputs] == [None]
    _, event = execution.run(torch.ops.aten.copy_.default, (made, low), {}, Place("copy_", "forward"), 0)
    (written,) = event.outputs
    assert written.shadow is None or torch.equal(written.shadow, low.float())

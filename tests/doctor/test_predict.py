"""Predictions from one FP32 step, held to what then happens under the format.

Every planted fault is run twice: in FP32 for the profile, and under the policy (emulated where the CPU would differ),
to see that exactly what was predicted comes true and that the remedy removes it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfstep.autocast import autocast, keep_fp32
from halfstep.doctor.finding import Severity
from halfstep.doctor.predict import TOLERANCE, findings_of, predict
from halfstep.doctor.prediction import FormatPrediction
from halfstep.observe.attribution import Attribution
from halfstep.observe.histogram import ExponentHistogram
from halfstep.observe.low_tags import LowTags
from halfstep.observe.lowering import Composites, casts_down
from halfstep.observe.place import Place
from halfstep.policy import parse
from halfstep.workloads import gpt

FP16 = parse("fp16-mixed")
EMULATED = parse("fp16-mixed:emulate")
BF16 = parse("bf16-mixed")


class Recorder(TorchDispatchMode):
    """A profile: every op's results by place, and whether they would be (or are) 16-bit."""

    def __init__(self, real: bool = False) -> None:
        super().__init__()
        self.real = real  # the run is not FP32: lowered is what is fp16
        self.records: dict[tuple[Place, str], Any] = {}
        self.attribution, self.tags = Attribution(), LowTags(FP16)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        place = self.attribution.place(func, args)
        low = self.tags.see(func, args, kwargs or {}, result, place.phase)
        out = tree_leaves(result)[0]
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel() and not func.is_view:
            operands = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
            cast = casts_down(func, FP16) and place.phase == "forward"
            read = max(float(x.detach().abs().max()) for x in operands) if cast else None
            self.add(place, out.detach(), out.dtype is torch.float16 if self.real else low, read)
        return result

    def add(self, place: Place, out: Tensor, low: bool, read: float | None) -> None:
        known = self.records.get((place, str(low)))
        histogram, amax = ExponentHistogram.of(out), float(out.abs().max())
        if known is not None:
            histogram, amax = histogram + known.histogram, max(amax, known.amax)
            read = None if read is None else max(read, known.operand_amax)
        self.records[place, str(low)] = SimpleNamespace(
            place=place, lowered=low, amax=amax, histogram=histogram, operand_amax=read
        )


def profile(step: Callable[[], Any], real: bool = False) -> Recorder:
    recorder = Recorder(real)
    with recorder.attribution, recorder, Composites():
        step()
    return recorder


def train(model: nn.Module, x: Tensor, policy: str | None = None, scale: float = 1.0) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        if policy is None:
            loss = model(x).float().square().mean()
        else:
            with autocast(policy, "cpu"):
                loss = model(x).float().square().mean()
        (loss * scale).backward()

    return step


def overflowing(recorder: Recorder) -> set[tuple[str, str]]:
    """Modules and ops with inf in their results, by the run itself."""
    return {
        (record.place.module, record.place.op)
        for record in recorder.records.values()
        if record.histogram.infinities and record.place.phase == "forward"
    }


def by_format(recorder: Any) -> dict[str, FormatPrediction]:
    return {prediction.format: prediction for prediction in predict(recorder)}


class MLP(nn.Module):
    """Three blocks; `spike` is the largest magnitude that the middle one's output layer makes."""

    def __init__(self, spike: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.x = torch.randn(4, 8)
        with torch.no_grad():
            self.blocks[1][0].weight *= 300  # or the output layer's weights would have to be beyond fp16 themselves
            out = self.blocks[1][2]
            value = out(self.blocks[1][:2](self.blocks[0](self.x)))[:, 3].abs().max()
            out.weight[3] *= spike / value
            out.bias[3] *= spike / value

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * 1e-4


def test_an_outlier_channel_overflows_where_predicted_and_nowhere_with_the_island() -> None:
    model = MLP(spike=1.3 * 65520)
    prediction = by_format(profile(train(model, model.x)))["fp16"]
    assert [(peak.place.module, peak.place.op) for peak in prediction.overflows] == [("blocks.1.2", "addmm")]
    assert prediction.overflows[0].amax == pytest.approx(1.3 * 65520, rel=1e-4)
    assert prediction.overflows[0].ratio == pytest.approx(1.3 * 65520 / 65504, rel=1e-4)
    assert prediction.usable
    # blocks.2.0 reads it, and would cast it to fp16 again.
    assert prediction.keep_fp32 == ("blocks.1.2", "blocks.2.0")
    assert prediction.policy == "fp16-mixed:keep_fp32=blocks.1.2+blocks.2.0"

    with torch.no_grad():
        run = profile(lambda: forward_only(model))
        first = next(record.place for record in run.records.values() if record.histogram.infinities)
        assert first.module == "blocks.1.2"
        with keep_fp32(model, parse(prediction.policy).keep_fp32):
            assert overflowing(profile(lambda: forward_only(model))) == set()
        with keep_fp32(model, ["blocks.1.2"]):  # less is not enough
            assert overflowing(profile(lambda: forward_only(model)))


def test_an_island_before_a_norm_needs_no_second_one() -> None:
    model = MLP(spike=1.3 * 65520)
    model.blocks[2] = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    prediction = by_format(profile(train(model, model.x)))["fp16"]
    assert prediction.keep_fp32 == ("blocks.1.2",)
    with torch.no_grad(), keep_fp32(model, prediction.keep_fp32):
        assert overflowing(profile(lambda: forward_only(model))) == set()


def test_data_that_a_product_casts_to_inf_are_found_where_they_are_read() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    nn.init.constant_(model[0].weight, 1e-6)
    prediction = by_format(profile(train(model, torch.full((2, 8), 1e6))))["fp16"]
    forward = [peak for peak in prediction.overflows if peak.place.phase == "forward"]
    assert [(peak.place.module, peak.amax) for peak in forward] == [("0", 1e6)]
    assert prediction.keep_fp32 == ("0",)


def forward_only(model: MLP) -> Tensor:
    with autocast(EMULATED, "cpu"):
        return model(model.x)


def test_just_below_the_threshold_is_a_note() -> None:
    model = MLP(spike=0.9 * 65520)
    prediction = by_format(profile(train(model, model.x)))["fp16"]
    assert prediction.overflows == ()
    assert prediction.keep_fp32 == ()
    assert [peak.place.module for peak in prediction.little_headroom] == ["blocks.1.2"]
    found = findings_of([prediction], FP16)
    assert {finding.code for finding in found} == {"HS109"}
    assert {finding.severity for finding in found} == {Severity.NOTE}


def test_bf16_has_room_for_the_outlier() -> None:
    model = MLP(spike=1.3 * 65520)
    predictions = predict(profile(train(model, model.x)))
    assert findings_of(predictions, BF16) == []
    assert "HS107" in {finding.code for finding in findings_of(predictions, FP16)}


def test_what_the_policy_keeps_in_fp32_is_no_finding() -> None:
    model = MLP(spike=1.3 * 65520)
    predictions = predict(profile(train(model, model.x)))
    assert not [f for f in findings_of(predictions, parse("fp16-mixed:keep_fp32=blocks.1")) if f.code == "HS107"]
    assert [f for f in findings_of(predictions, parse("fp16-mixed:keep_fp32=blocks.0")) if f.code == "HS107"]


# ------------------------------------------------------------------ gradients


class Tiny(nn.Module):
    """Gradients far below fp16's smallest number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 1))
        self.x = torch.randn(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def tiny_step(model: Tiny, policy: str | None, scale: float = 1.0) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        if policy is None:
            loss = (model(model.x).float() - 1).square().mean() * 1e-6
        else:
            with autocast(policy, "cpu"):
                loss = (model(model.x).float() - 1).square().mean() * 1e-6
        (loss * scale).backward()

    return step


def zero_share(model: nn.Module) -> float:
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradients.isfinite().all()
    return float((gradients == 0).float().mean())


def test_tiny_gradients_flush_at_least_as_predicted_and_the_scale_saves_them() -> None:
    model = Tiny()
    prediction = by_format(profile(tiny_step(model, None)))["fp16"]
    assert zero_share(model) < 0.02
    tiny_step(model, "fp16-mixed:emulate")()
    actual = zero_share(model)
    assert 0.5 < prediction.flushed <= actual
    assert prediction.window is not None
    assert prediction.window[0] <= prediction.loss_scale <= prediction.window[1]
    tiny_step(model, "fp16-mixed:emulate", prediction.loss_scale)()
    assert zero_share(model) < 0.02
    assert prediction.flushed_scaled < TOLERANCE
    layers = {layer.layer: layer for layer in prediction.layers}
    assert {"body.0", "body.2", "body.4"} <= layers.keys()
    assert layers["body.0"].unscaled > 0.5 > TOLERANCE > layers["body.0"].scaled


@pytest.mark.parametrize("layer", ["body.0", "body.2"])
def test_a_layers_share_is_what_its_gradients_lose_at_least(layer: str) -> None:
    model = Tiny()
    prediction = by_format(profile(tiny_step(model, None)))["fp16"]
    run = profile(tiny_step(model, "fp16-mixed"), real=True)

    def zeros(recorder: Recorder) -> tuple[int, int]:
        found = [
            record.histogram
            for record in recorder.records.values()
            if record.place.module == layer and record.place.phase == "backward" and record.lowered
        ]
        merged = ExponentHistogram.merge(found)
        return merged.zeros, merged.total

    (zeros_before, total), (zeros_after, total_after) = zeros(profile(tiny_step(model, None))), zeros(run)
    assert total == total_after
    share = next(x.unscaled for x in prediction.layers if x.layer == layer)
    assert share <= (zeros_after - zeros_before) / (total - zeros_before)


def test_without_a_loss_scale_tiny_gradients_are_a_warning() -> None:
    predictions = predict(profile(tiny_step(Tiny(), None)))
    unscaled = SimpleNamespace(**{**vars(FP16), "loss_scaling": False, "lowers": True, "compute": "fp16"})
    (warning,) = findings_of(predictions, unscaled)
    assert (warning.code, warning.severity) == ("HS202", Severity.WARNING)
    assert warning.numbers["flushed"] > 0.5
    assert f"2^{round(math.log2(predictions[0].loss_scale))}" in warning.remedy
    assert findings_of(predictions, FP16) == []
    assert findings_of(predictions, BF16) == []


def handmade(*records: tuple[str, str, Tensor]) -> Any:
    """A profile of low results: op, phase, values."""
    made = []
    for index, (op, phase, values) in enumerate(records):
        place = Place(op, phase, f"layers.{index}", "Linear")
        amax = float(values.abs().max())
        made.append(SimpleNamespace(place=place, lowered=True, amax=amax, histogram=ExponentHistogram.of(values)))
    return SimpleNamespace(records=made)


def exact_window(gradients: Tensor) -> tuple[float, float]:
    """By scaling and casting, every power of two in turn."""
    nonzero = gradients[gradients != 0].double()
    safe = []
    for power in range(-24, 65):
        cast = (nonzero * 2.0**power).clamp(-1e30, 1e30).float().half()
        safe.append(((cast == 0).double().mean() < TOLERANCE, bool(cast.isfinite().all())))
    low = min((2.0 ** (i - 24) for i, (kept, _) in enumerate(safe) if kept), default=math.inf)
    high = max((2.0 ** (i - 24) for i, (_, fits) in enumerate(safe) if fits), default=0.0)
    return low, high


@pytest.mark.parametrize("spread", [1.0, 3.0, 5.0, 9.0])
@pytest.mark.parametrize("middle", [-30, -12, 3])
def test_the_window_is_what_casts_at_every_scale_give(middle: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(middle + int(spread))
    gradients = torch.randn(4000, generator=generator) * 2.0 ** (
        middle + spread * torch.randn(4000, generator=generator)
    )
    prediction = by_format(handmade(("mm", "backward", gradients)))["fp16"]
    low, high = exact_window(gradients)
    assert prediction.window == (low, high)
    assert prediction.window_is_empty == (low > high)
    codes = {finding.code for finding in findings_of([prediction], FP16)}
    assert ("HS204" in codes) == (low > high)


def test_the_window_test_saw_both_outcomes() -> None:
    wide = torch.cat([torch.full((50,), 1e-10), torch.full((50,), 1e3)])
    near = torch.cat([torch.full((50,), 1e-7), torch.full((50,), 1e2)])
    assert by_format(handmade(("mm", "backward", wide)))["fp16"].window_is_empty
    assert not by_format(handmade(("mm", "backward", near)))["fp16"].window_is_empty


@pytest.mark.parametrize(("small", "severity"), [(5, Severity.NOTE), (20, Severity.NOTE), (50, Severity.WARNING)])
def test_gradients_that_no_scale_saves_are_a_warning_where_they_are_many(small: int, severity: Severity) -> None:
    numbers = torch.cat([torch.full((small,), 1e-10), torch.full((100 - small,), 1e3)])
    (prediction,) = predict(handmade(("mm", "backward", numbers)), ("fp16",))
    (finding,) = [finding for finding in findings_of([prediction], FP16) if finding.code == "HS204"]
    assert (finding.severity, finding.numbers["lost"]) == (severity, small / 100)


def test_the_scale_leaves_three_octaves_free() -> None:
    prediction = by_format(handmade(("mm", "backward", torch.full((9,), 1.5 * 2.0**-20))))["fp16"]
    assert prediction.loss_scale == 2.0 ** (14 - 2 + 20)
    assert by_format(handmade(("mm", "backward", torch.full((9,), 2.0**-20))))["bf16"].loss_scale == 1


# ------------------------------------------------------------------ usable at all


class Growing(nn.Module):
    """A residual stream in 16 bits that every layer adds to."""

    def __init__(self, per_layer: float, layers: int = 10) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.enter = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Adding(per_layer) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return x * 1e-5


class Adding(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            self.linear.bias[2] = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def test_a_residual_stream_that_outgrows_fp16_is_for_bf16() -> None:
    model, x = Growing(20_000), torch.randn(3, 8)
    predictions = by_format(profile(train(model, x)))
    fp16 = predictions["fp16"]
    assert not fp16.usable
    assert fp16.policy is None
    assert "7 of 10 layers, from layers.3 on" in fp16.reason
    assert predictions["bf16"].usable
    assert predictions["bf16"].overflows == ()
    found = findings_of(predictions.values(), FP16)
    assert [f.code for f in found if f.severity is Severity.ERROR] == ["HS108", "HS107"]
    assert found[1].place is not None
    assert found[1].place.module == "layers.3"
    assert "6 more ops" in found[1].what
    assert not {"HS202", "HS204"} & {finding.code for finding in found}
    assert findings_of(predictions.values(), BF16) == []
    with torch.no_grad(), autocast(EMULATED, "cpu"):
        assert not model(x).isfinite().all()
    with torch.no_grad(), autocast("bf16-mixed:emulate", "cpu"):
        assert model(x).isfinite().all()


def test_a_stream_that_crosses_at_the_end_needs_one_island() -> None:
    model, x = Growing(7_100), torch.randn(3, 8)
    prediction = by_format(profile(train(model, x)))["fp16"]
    assert prediction.usable
    assert prediction.keep_fp32 == ("layers.9",)
    with torch.no_grad(), autocast(EMULATED, "cpu"):
        assert not model(x).isfinite().all()
        with keep_fp32(model, prediction.keep_fp32):
            assert model(x).isfinite().all()


def test_a_sum_behind_an_island_is_fp32_by_promotion_and_needs_none() -> None:
    model, x = Growing(80_000, layers=2), torch.randn(3, 8)
    prediction = by_format(profile(train(model, x)))["fp16"]
    assert {peak.place.module for peak in prediction.overflows} >= {"layers.0", "layers.0.linear", "layers.1"}
    assert prediction.keep_fp32 == ("layers.0.linear", "layers.1.linear")
    with torch.no_grad(), autocast(EMULATED, "cpu"), keep_fp32(model, prediction.keep_fp32):
        assert model(x).isfinite().all()


def test_an_overflow_outside_of_submodules_is_not_for_islands() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * 1e6) * 1e-6

    prediction = by_format(profile(train(Bare(), torch.ones(2, 4))))["fp16"]
    assert not prediction.usable
    assert prediction.keep_fp32 == ()
    assert "mul in Bare" in prediction.reason


# ------------------------------------------------------------------ quiet, and written down


def test_the_built_in_gpt_has_nothing_above_a_note() -> None:
    arguments = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch", "2", "--device", "cpu"]
    args: argparse.Namespace = gpt.parse_args(arguments)
    torch.manual_seed(0)
    model = gpt.GPT(args)
    ids = torch.randint(256, (2, 33))
    predictions = predict(profile(lambda: gpt.next_byte_loss(model, ids[:, :-1], ids[:, 1:]).backward()))
    for policy in (FP16, BF16, parse("fp16-mixed:rules=cuda")):
        assert [f for f in findings_of(predictions, policy) if f.severity > Severity.NOTE] == []
    assert all(prediction.usable for prediction in predictions if prediction.format in ("fp16", "bf16"))
    assert predictions[0].ops > 20
    # The scale that is recommended holds in a real fp16 step.
    with autocast(EMULATED, "cpu"):
        loss = gpt.next_byte_loss(model, ids[:, :-1], ids[:, 1:])
    model.zero_grad()
    (loss * predictions[0].loss_scale).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_masks_are_no_overflow() -> None:
    scores = torch.randn(4, 4)
    masked = scores.clone()
    masked[0, 1] = torch.finfo(torch.float32).min
    infinite = scores.clone()
    infinite[0, 1] = -math.inf
    profiled = handmade(("add", "forward", masked), ("mul", "forward", infinite), ("where", "forward", scores * 1e6))
    assert by_format(profiled)["fp16"].overflows == ()


def test_the_threshold_is_exact() -> None:
    for amax, count in ((65519.0, 0), (65520.0, 1)):
        assert len(by_format(handmade(("mm", "forward", torch.tensor([amax]))))["fp16"].overflows) == count


def test_a_format_that_nothing_would_be_in_says_so() -> None:
    prediction = by_format(SimpleNamespace(records=[]))["fp16"]
    assert (prediction.ops, prediction.usable, prediction.policy) == (0, True, "fp16-mixed")
    assert findings_of([prediction], FP16) == []
    assert findings_of([prediction], parse("fp32")) == []


@pytest.mark.parametrize("spike", [10.0, 1e9, 3e38])
def test_predictions_round_trip(spike: float) -> None:
    gradients = torch.tensor([1e-30, 1e3, 1e-3])
    profiled = handmade(("mm", "forward", torch.tensor([spike])), ("mm", "backward", gradients))
    predictions = predict(profiled)
    assert any(p.window_is_empty for p in predictions)
    for prediction in predictions:
        text = json.dumps(prediction.to_json(), allow_nan=False)
        assert FormatPrediction.from_json(json.loads(text)) == prediction
        if prediction.policy is not None:
            assert str(parse(prediction.policy)) == prediction.policy

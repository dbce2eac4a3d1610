"""Formats of optimizer state: the error of Adam's update, at once and in the long run, and values of every kind."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from halfstep.optim import dither, moments
from halfstep.optim.layout import flat
from halfstep.optim.moments import State

ROW = 256
TINY = 2.0**-126
HALF = -(1 << 31)  # dither of a half: to nearest


class Stored:
    """A state in its format."""

    def __init__(self, form: State, square: bool, numel: int, row: int = ROW) -> None:
        self.square, self.row = square, row
        dtypes = moments.SQUARE_DTYPES if square else moments.SIGNED_DTYPES
        self.codes = torch.zeros(numel, dtype=dtypes[form])
        self.scale = torch.zeros(numel // row * -(-row // 64)) if form == "8bit" else None

    def set(self, x: Tensor, step: int | None = 0) -> Stored:
        """``step``: of the dither; None: to nearest."""
        noise = None
        if self.square and self.codes.dtype is not torch.float32:
            noise = torch.full((x.numel(),), HALF, dtype=torch.int32)
            if step is not None:
                noise = dither.dither(x.numel(), dither.key(0, 0, dither.STATE[1]), step)
        moments.encode(x, self.codes, self.scale, self.row, noise)
        return self

    def get(self) -> Tensor:
        return moments.decode(self.codes, self.scale, self.row).clone()


def gradients(step: int, numel: int, rms: float) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(step)) * rms


@cache
def adam_states(beta2: float, rms: float, steps: int = 150, numel: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """Adam's m and v after some steps, FP32."""
    m, v = torch.zeros(numel), torch.zeros(numel)
    for step in range(steps):
        g = gradients(step, numel, rms)
        m.lerp_(g, 0.1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    return m, v


def update_error(m: Tensor, v: Tensor, true_m: Tensor, true_v: Tensor) -> float:
    """Of Adam's direction m / sqrt(v), in proportion."""
    expected = true_m.double() / true_v.double().sqrt()
    return ((m.double() / v.double().sqrt() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("form", ["bf16", "8bit"])
@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_an_update_is_off_by_less_than_2_percent_at_every_size_of_gradients(beta2: float, form: State) -> None:
    errors = []
    for decade in range(-8, 6):
        m, v = adam_states(beta2, 10.0**decade)
        stored = Stored(form, False, m.numel()).set(m), Stored(form, True, v.numel()).set(v)
        errors.append(update_error(stored[0].get(), stored[1].get(), m, v))
    assert max(errors) < (0.02 if form == "8bit" else 0.004)
    assert min(errors) > 0.5 * max(errors)  # the same at every size, and not nothing


@pytest.mark.parametrize("form", ["bf16", "8bit"])
def test_formats_keep_adams_invariance_to_the_scale_of_gradients(form: State) -> None:
    """Bit for bit, where the scale is a power of two: 2^-24 of rms 1 is 6e-8, 2^17 is 1.3e5."""
    m, v = adam_states(0.999, 1.0)
    for exponent in (-50, -24, -1, 1, 17, 50):
        for x, factor, square in ((m, 2.0**exponent, False), (v, 4.0**exponent, True)):
            one = Stored(form, square, x.numel()).set(x, 5).get()
            other = Stored(form, square, x.numel()).set(x * factor, 5).get()
            assert torch.equal(one * factor, other)


def long_run(form: State, beta2: float, *, stochastic: bool = True, numel: int = 4096) -> tuple[float, float]:
    """2,000 steps of stationary gradients with the state in its format: mean error of updates, and bias of sqrt(v)."""
    m, v = Stored(form, False, numel), Stored(form, True, numel)
    true_m, true_v = torch.zeros(numel), torch.zeros(numel)
    errors, ratios = [], []
    for step in range(1, 2001):
        g = gradients(step, numel, 1e-4)
        pairs = [(true_m, true_v), (m.get(), v.get())]
        for first, second in pairs:
            first.lerp_(g, 0.1)
            second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        m.set(pairs[1][0])
        v.set(pairs[1][1], step if stochastic else None)
        if step > 1000 and step % 50 == 0:
            errors.append(update_error(m.get(), v.get(), true_m, true_v))
            ratios.append((v.get().sqrt() / true_v.sqrt()).mean().item())
    return sum(errors) / len(errors), sum(ratios) / len(ratios) - 1


@pytest.mark.parametrize(
    ("form", "beta2", "bound"),
    [("8bit", 0.999, 0.029), ("8bit", 0.95, 0.018), ("bf16", 0.999, 0.016), ("bf16", 0.95, 0.006)],
)
def test_errors_do_not_add_up_in_the_long_run(form: State, beta2: float, bound: float) -> None:
    error, bias = long_run(form, beta2)
    assert bound / 2 < error < bound
    assert abs(bias) < 0.003


@pytest.mark.parametrize(("form", "least"), [("bf16", 0.05), ("8bit", 0.008)])
def test_to_nearest_squares_would_ratchet(form: State, least: float) -> None:
    """Why they are rounded stochastically: a step lifts v by more than half a spacing, or lowers it by less."""
    _, bias = long_run(form, 0.999, stochastic=False)
    assert bias > least


def test_a_bf16_square_decays_only_if_rounded_stochastically() -> None:
    results = []
    for stochastic in (True, False):
        v = Stored("bf16", True, 4096).set(torch.ones(4096))
        for step in range(1, 1001):
            v.set(v.get() * 0.999, step if stochastic else None)
        results.append(v.get().mean().item())
    assert abs(results[0] / 0.999**1000 - 1) < 0.01 and results[1] == 1


@pytest.mark.parametrize(("square", "levels"), [(False, 127), (True, 255)])
def test_codes_are_those_of_the_formula(square: bool, levels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 64)
    x = x * x if square else x
    stored = Stored("8bit", square, 512, 64).set(x.flatten(), None)
    assert stored.scale is not None
    for row in range(8):
        values = x[row].tolist()
        scale = max(math.sqrt(v) if square else abs(v) for v in values)
        assert abs(stored.scale[row].item() / scale - 1) < 1e-6
        for index, value in enumerate(values):
            root = math.sqrt(value) / scale if square else math.copysign(math.sqrt(abs(value) / scale), value)
            code = stored.codes[row * 64 + index].item()
            assert abs(code - levels * root) <= 0.5001 or (square and code == 1)
            decoded = (scale * code / 255) ** 2 if square else scale * (code / 127) * abs(code / 127)
            assert abs(stored.get()[row * 64 + index].item() - decoded) <= 1e-6 * abs(decoded)


def test_the_largest_of_a_group_keeps_its_value() -> None:
    m, v = adam_states(0.999, 1e-3)
    for x, square in ((m, False), (v, True)):
        groups, back = x.view(-1, 64), Stored("8bit", square, x.numel()).set(x).get().view(-1, 64)
        place = groups.abs().argmax(1, keepdim=True)
        assert ((back.gather(1, place) / groups.gather(1, place) - 1).abs() < 1e-6).all()


def test_a_code_of_v_is_0_only_where_v_is() -> None:
    """Tiny values beside large ones, in every step's dither: m / sqrt(v) would be inf."""
    v = torch.full((64,), 1e-12)
    v[0], v[1], v[2] = 1.0, 0.0, 1e-38
    for step in range(200):
        stored = Stored("8bit", True, 64, 64).set(v, step)
        assert torch.equal(stored.codes == 0, v == 0)
    assert stored.get()[1] == 0


@pytest.mark.parametrize("square", [False, True])
def test_zeros_stay_zeros(square: bool) -> None:
    for step in range(20):
        stored = Stored("8bit", square, 256, 256).set(torch.zeros(256), step)
        assert torch.equal(stored.get(), torch.zeros(256)) and stored.scale is not None
        assert torch.equal(stored.scale, torch.full((4,), TINY))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_group_and_no_other(value: float, square: bool) -> None:
    x = torch.rand(256) + 0.5
    x[70] = value
    back = Stored("8bit", square, 256, 256).set(x).get()
    assert not back[64:128].isfinite().any() if square or math.isnan(value) else back[64:128].isnan().all()
    assert back[:64].isfinite().all() and back[128:].isfinite().all()
    again = Stored("8bit", square, 256, 256).set(back).get()
    assert not again[70].isfinite() and again[:64].isfinite().all()


@pytest.mark.parametrize("form", ["fp32", "bf16"])
@pytest.mark.parametrize("square", [False, True])
def test_wide_formats_hold_what_is_not_finite(square: bool, form: State) -> None:
    x = torch.tensor([1.0, math.inf, math.nan, 0.0, 0.0])
    x.view(torch.int32)[4] = 0x7F800001  # a NaN that shows in the lower half only
    for step in range(20):
        back = Stored(form, square, 5, 5).set(x, step).get()
        assert back[0] == 1 and back[1] == math.inf and back[2].isnan() and back[3] == 0 and back[4].isnan()


def test_subnormal_and_huge_values() -> None:
    for size in (1e-44, 1e-40, 1e-38, 3e-38, 1e30, 3e38):
        signed = torch.linspace(-1, 1, 64) * size
        back = Stored("8bit", False, 64, 64).set(signed).get()
        assert back.isfinite().all() and ((back - signed).abs() <= max(0.02 * size, TINY)).all()
        square = torch.linspace(0, 1, 64) * size
        back = Stored("8bit", True, 64, 64).set(square).get()
        assert back.isfinite().all() and ((back.sqrt() - square.sqrt()).abs() <= 1.01 / 255 * size**0.5 + 1e-20).all()


def test_a_scale_of_a_tiny_group_does_not_round_to_nothing() -> None:
    x = torch.full((64,), 2.0**-120)
    back = Stored("8bit", False, 64, 64).set(x).get()
    assert torch.equal(back, x)


@pytest.mark.parametrize("row", [64, 65, 100, 128, 191])
@pytest.mark.parametrize("square", [False, True])
def test_groups_do_not_cross_rows(row: int, square: bool) -> None:
    """A row that is far larger than the next leaves that one's codes as they are alone."""
    torch.manual_seed(row)
    x = torch.rand(3, row) + 0.1
    x[1] *= 1e6
    together = Stored("8bit", square, 3 * row, row).set(x.flatten(), None)
    assert together.scale is not None
    assert together.scale.numel() == math.prod(moments.scale_shape((3, row))) == 3 * -(-row // 64)
    for index in range(3):
        alone = Stored("8bit", square, row, row).set(x[index].clone(), None)
        assert torch.equal(together.get().view(3, row)[index], alone.get())
        assert torch.equal(together.codes.view(3, row)[index], alone.codes)
    # Half a code of the root, at the largest value of a group.
    error = (together.get().view(3, row).sqrt() - x.sqrt()).abs()
    assert (error <= 0.51 / (255 if square else 127) * x.amax(1, keepdim=True).sqrt()).all()


def test_shapes_and_formats() -> None:
    assert moments.row_length(torch.Size([5, 3, 64])) == 192 and moments.row_length((4096, 64)) == 64
    assert moments.row_length((7,)) == 7 and moments.row_length(()) == 1
    assert moments.scale_shape((7, 130)) == (7, 3) and moments.scale_shape((130,)) == (1, 3)
    # Rows below 64: groups go through the whole tensor.
    assert moments.row_length((5, 3, 2)) == 30 and moments.row_length((4096, 63)) == 4096 * 63
    assert moments.scale_shape((4096, 16)) == (1, 1024) and moments.scale_shape((65, 63)) == (1, 64)
    assert moments.format_for("8bit", (64, 64)) == "8bit" and moments.format_for("8bit", (4096,)) == "8bit"
    for short in ((4096, 16), (4096, 63), (1 << 20, 1), (512, 1, 3, 3)):  # of rows, not of numbers
        assert moments.format_for("8bit", short) == "8bit"
    for small in ((63, 64), (4095,), (), (0, 64), (63, 2)):
        assert moments.format_for("8bit", small) == "fp32"
        assert moments.format_for("bf16", small) == "bf16"


@pytest.mark.parametrize("square", [False, True])
def test_another_order_in_memory_gets_scales_of_its_own(square: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 32, 8, 8) * torch.rand(32, 1, 1).exp2()
    row = moments.row_length(x.shape)
    stored = Stored("8bit", square, x.numel(), row).set(x.flatten(), None)
    pattern = x.to(memory_format=torch.channels_last)
    assert stored.scale is not None
    expected = stored.get().view(x.shape)
    codes = moments.relaid(stored.codes.view(x.shape), stored.scale, pattern)
    assert codes.stride() == pattern.stride() and codes.dtype is stored.codes.dtype
    back = moments.decode(flat(codes), stored.scale, row).as_strided(x.shape, pattern.stride())
    assert ((back.sqrt() - expected.sqrt()).abs() < 0.006 * x.max().sqrt()).all()

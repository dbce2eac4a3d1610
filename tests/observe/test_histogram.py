"""The exponent histogram against `math.frexp`, element by element, and against the exact counts of the formats."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from waits import Waits

from halfstep.formats import FORMATS, Format
from halfstep.observe import histogram as histograms
from halfstep.observe.histogram import BIAS, BINS, ExponentHistogram, count

FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, 65504.0, 65520.0])
#: No float32 subnormal numbers, and none that become such: there, scaling and shares are exact.
NORMAL = st.floats(2.0**-90, 2.0**90, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
HISTOGRAMS = st.builds(
    lambda values: ExponentHistogram.of(torch.tensor(values, dtype=torch.float32)), st.lists(FLOATS, max_size=30)
)


def slow_histogram(values: list[float]) -> ExponentHistogram:
    """The oracle: one number at a time, with Python's floats."""
    counts, zeros, nans = [0] * BINS, 0, 0
    for value in values:
        if math.isnan(value) or math.isinf(value):
            counts[-1] += 1
            nans += math.isnan(value)
        elif value == 0:
            zeros += 1
        else:
            exponent = math.frexp(value)[1] - 1
            counts[min(max(exponent, -BIAS), 127) + BIAS] += 1
    return ExponentHistogram(torch.tensor(counts), zeros, nans)


def all_codes(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    codes = all_codes(dtype)
    histogram = ExponentHistogram.of(codes)
    assert histogram == slow_histogram(codes.double().tolist())
    assert histogram.total == 2**16 and histogram.zeros == 2 and histogram.infinities == 2
    assert histogram.finite == int(codes.isfinite().sum())
    assert histogram.nans == int(codes.isnan().sum()) > 100


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_8_bit_number(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(dtype)
    assert ExponentHistogram.of(codes) == slow_histogram(codes.double().tolist())


@given(st.lists(FLOATS, max_size=50))
def test_float32(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert ExponentHistogram.of(tensor) == slow_histogram(tensor.tolist())


@given(st.lists(st.floats(), max_size=50))
def test_float64_stays_finite_and_not_zero(values: list[float]) -> None:
    histogram = ExponentHistogram.of(torch.tensor(values, dtype=torch.float64))
    assert histogram == slow_histogram(values)
    assert histogram.nonzero == sum(math.isfinite(value) and value != 0 for value in values)


def test_float64_is_not_rounded_first() -> None:
    just_below_two = math.nextafter(2.0, 0.0)  # float32's nearest is 2
    assert ExponentHistogram.of(torch.tensor(just_below_two, dtype=torch.float64)).amax_exponent() == 0


def test_random_bits_of_every_layout() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**31), 2**31, (6, 40, 50), generator=generator).to(torch.int32).view(torch.float32)
    for view in (x, x.permute(2, 0, 1), x[:, ::3, 5:], x[0].t(), x[:1].expand(4, 40, 50), x[0, 0, 0], x[:0], x.mT):
        assert ExponentHistogram.of(view) == slow_histogram(view.double().flatten().tolist())
    pairs = torch.randn(5, 7, dtype=torch.complex64, generator=generator)
    both = torch.view_as_real(pairs).flatten().tolist()
    for numbers in (pairs, pairs.conj()):
        assert ExponentHistogram.of(numbers) == slow_histogram(both)
    assert ExponentHistogram.of(pairs.conj().imag) == slow_histogram(pairs.imag.flatten().tolist())


def test_more_elements_than_are_counted_at_a_time() -> None:
    x = torch.zeros((1 << 20) + 3)
    x[-3:] = torch.tensor([1.0, math.nan, 2.0**-140])
    histogram = ExponentHistogram.of(x)
    assert (histogram.zeros, histogram.nans, histogram.total) == (1 << 20, 1, (1 << 20) + 3)
    assert histogram.counts.nonzero().flatten().tolist() == [0, BIAS, 255]


def samples() -> list[Tensor]:
    """All 16-bit numbers, random bits of float32, and what float64 has beyond float32's range."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    wide = torch.tensor([0.0, 1e-320, 1e-40, 1.0, 1e200, math.inf, math.nan], dtype=torch.float64)
    zeros = torch.zeros((1 << 22) + 3)
    zeros[-3:] = torch.tensor([1.0, math.nan, 2.0**-140])
    return [all_codes(torch.float16).float(), all_codes(torch.bfloat16), bits, wide, zeros, bits[:0]]


@pytest.mark.parametrize("deterministic", [False, True])
def test_counts_on_a_device_are_those_of_the_cpu(deterministic: bool) -> None:
    """The code for devices, run on the CPU."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        for x in samples():
            assert torch.equal(histograms._counted_on_device(x), count(x))
    finally:
        torch.use_deterministic_algorithms(False)


def test_counting_on_a_device_waits_for_nothing() -> None:
    with Waits() as waits:
        row = histograms._counted_on_device(torch.randn(100))
    assert waits.seen == []
    assert ExponentHistogram.from_counts(row).total == 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_of_a_device() -> None:
    for x in samples():
        assert torch.equal(count(x.cuda()).cpu(), count(x))
    x = torch.randn(1000, device="cuda").half()
    torch.cuda.set_sync_debug_mode("error")
    try:
        row = count(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ExponentHistogram.from_counts(row).total == 1000


def test_counting_leaves_the_tensor_and_its_graph_alone() -> None:
    x = torch.randn(10, requires_grad=True)
    before = x.detach().clone()
    assert ExponentHistogram.of(x * 1).total == 10
    assert torch.equal(x.detach(), before) and x.grad is None


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.int32), torch.ones(3).to_sparse()])
def test_what_has_no_exponents_is_refused(tensor: Tensor) -> None:
    with pytest.raises(TypeError, match="dense floating-point"):
        ExponentHistogram.of(tensor)


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 999), (64, 3, 224), (70001,)])
def test_a_sample_is_no_larger_and_sees_every_column(shape: tuple[int, ...]) -> None:
    column = torch.arange(shape[-1]) % 100
    histogram = ExponentHistogram.of((2.0 ** (column - 50)).expand(shape).contiguous(), sample=4096)
    assert 1024 <= histogram.total <= 4096
    shares = histogram.counts[BIAS - 50 : BIAS + 50] / histogram.total
    assert shares.min() > 0.004 and shares.max() < 0.02
    assert ExponentHistogram.of(torch.ones(10), sample=4096).total == 10


@given(HISTOGRAMS, HISTOGRAMS, HISTOGRAMS)
def test_merging_is_associative_commutative_and_has_a_neutral_element(
    a: ExponentHistogram, b: ExponentHistogram, c: ExponentHistogram
) -> None:
    assert (a + b) + c == a + (b + c) == ExponentHistogram.merge([c, b, a])
    assert hash(a + b) == hash(b + a)
    assert a + b == b + a
    assert a + ExponentHistogram() == a == ExponentHistogram.merge([a])
    assert ExponentHistogram.merge([]) == ExponentHistogram()
    assert (a + b).total == a.total + b.total


@given(st.lists(FLOATS, max_size=20), st.lists(FLOATS, max_size=20))
def test_merging_is_counting_both(first: list[float], second: list[float]) -> None:
    x, y = torch.tensor(first), torch.tensor(second)
    before = ExponentHistogram.of(x)
    merged = before + ExponentHistogram.of(y)
    assert merged == ExponentHistogram.of(torch.cat([x, y]))
    assert before == ExponentHistogram.of(x)  # not added to in place


@given(st.lists(NORMAL | st.sampled_from([0.0, math.inf, math.nan]), max_size=30), st.integers(-36, 36))
def test_scaling_is_multiplying_by_a_power_of_two(values: list[float], power: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert ExponentHistogram.of(x).scaled(power) == ExponentHistogram.of(torch.ldexp(x, torch.tensor(power)))


@pytest.mark.parametrize("power", [1, 40, 127, 200, 254])
def test_scaling_beyond_float32_is_inf(power: int) -> None:
    x = torch.tensor([2.0**-30, 1.0, 1.5 * 2.0**100, math.inf])
    assert ExponentHistogram.of(x).scaled(power) == ExponentHistogram.of((x.double() * 2.0**power).float())


@pytest.mark.parametrize("power", [-30, -119, -120, -121, -144, -145, -200])
def test_scaling_below_float32_is_zero(power: int) -> None:
    # 1.5 * 2**-6: never half of a smallest subnormal number, whose rounding depends on the bits
    x = torch.tensor([1.5 * 2.0**-6, 1.25 * 2.0**-5, 3.0])
    assert ExponentHistogram.of(x).scaled(power) == ExponentHistogram.of((x.double() * 2.0**power).float())


def test_subnormal_numbers_move_as_if_just_below_the_normal_ones() -> None:
    x = ExponentHistogram.of(torch.tensor([1.5 * 2.0**-127, 2.0**-149]))
    assert x.amax_exponent() == -127
    assert x.scaled(0) == x
    assert x.scaled(10).amax_exponent() == -117 and x.scaled(10).nonzero == 2


@pytest.mark.parametrize("format", FORMATS.values(), ids=str)
def test_shares_lost_are_lower_bounds_and_miss_one_octave_at_most(format: Format) -> None:
    for codes in (all_codes(torch.bfloat16).float(), all_codes(torch.float16).float(), torch.randn(5000).exp() ** 9):
        x = codes[codes.isfinite() & (codes != 0)]
        histogram = ExponentHistogram.of(torch.cat([x, torch.zeros(17), torch.tensor([math.inf, math.nan])]))
        flushed, overflowed = int(format.underflows(x).sum()), int(format.overflows(x).sum())
        ties = int((x.abs() == format.smallest_subnormal / 2).sum())
        subnormal = int((x.abs() < 2.0**-126).sum())
        top = int(((x.abs() > format.max) & (x.abs() < 2.0 ** (format.emax + 1))).sum())
        bound = histogram.flushed_share(format) * len(x)
        if format.smallest_subnormal / 2 > 2.0**-126:
            assert bound == pytest.approx(flushed - ties)
        else:
            assert bound == 0 and flushed <= subnormal
        bound = histogram.overflow_share(format) * len(x)
        assert overflowed - top <= round(bound) <= overflowed


def test_shares_lost_are_exact_between_the_limits() -> None:
    x = torch.tensor([2.0**-26, 1.9 * 2.0**-26, 1.1 * 2.0**-25, 1.0, 65536.0, 1e9, 0.0, math.nan])
    histogram = ExponentHistogram.of(x)
    assert histogram.flushed_share(FORMATS["fp16"]) == 2 / 6 == int(FORMATS["fp16"].underflows(x).sum()) / 6
    assert histogram.overflow_share(FORMATS["fp16"]) == 2 / 6 == int(FORMATS["fp16"].overflows(x).sum()) / 6


def test_the_bounds_are_low_where_the_limit_lies_inside_an_octave() -> None:
    fp16 = FORMATS["fp16"]
    beyond, tie = torch.tensor([65520.0, 65535.0]), torch.tensor([2.0**-25])
    assert fp16.overflows(beyond).all() and ExponentHistogram.of(beyond).overflow_share(fp16) == 0
    assert fp16.underflows(tie).all() and ExponentHistogram.of(tie).flushed_share(fp16) == 0


@given(st.lists(FLOATS, min_size=1, max_size=30), st.integers(-160, 140), st.floats(0, 0.99))
def test_shares_by_exponent(values: list[float], exponent: int, fraction: float) -> None:
    x = torch.tensor(values, dtype=torch.float32).double()
    x = x[x.isfinite() & (x != 0)]
    histogram = ExponentHistogram.of(torch.tensor(values, dtype=torch.float32))
    below = float((x.abs() < 2.0**exponent).double().mean()) if len(x) else 0.0
    if exponent >= -126:
        assert histogram.share_below(exponent) == pytest.approx(below)
    if (exponent >= -126 or exponent <= -149) and len(x):
        assert histogram.share_at_least(exponent) == pytest.approx(1 - below)
    # Anywhere else: not above the truth.
    limit = exponent + fraction
    assert histogram.share_below(limit) <= (x.abs() < 2.0**limit).double().mean().nan_to_num(0).item() + 1e-12
    assert histogram.share_at_least(limit) <= (x.abs() >= 2.0**limit).double().mean().nan_to_num(0).item() + 1e-12


def test_nothing_has_no_shares() -> None:
    empty = ExponentHistogram.of(torch.zeros(3))
    assert empty.total == 3 and empty.nonzero == 0 and empty.amax_exponent() is None
    assert empty.share_below(math.inf) == empty.share_at_least(-math.inf) == 0
    full = ExponentHistogram.of(torch.ones(3))
    assert full.share_below(math.inf) == full.share_at_least(-math.inf) == 1


@given(HISTOGRAMS)
def test_json_round_trip(histogram: ExponentHistogram) -> None:
    assert ExponentHistogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram


@pytest.mark.parametrize(
    "change",
    [
        {"first": 250},
        {"first": -1},
        {"counts": [[1]]},
        {"counts": "many"},
        {"counts": [-1]},
        {"zeros": None},
        {"zeros": -1},
        {"nans": 1},
    ],
)
def test_other_json_is_refused(change: dict[str, object]) -> None:
    good = ExponentHistogram.of(2.0 ** torch.arange(10)).to_json()
    assert ExponentHistogram.from_json(good).total == 10
    with pytest.raises(ValueError, match="not an exponent histogram"):
        ExponentHistogram.from_json({**good, **change})
    del good["first"]
    with pytest.raises(ValueError, match="first"):
        ExponentHistogram.from_json(good)


def test_it_says_what_it_holds() -> None:
    assert repr(ExponentHistogram.of(torch.tensor([1.0, 5.0, 0.0, math.nan, math.inf, -math.inf]))) == (
        "ExponentHistogram(6 numbers, exponents 0 to 2, 1 zeros, 2 inf, 1 NaN)"
    )

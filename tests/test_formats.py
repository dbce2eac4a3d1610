"""Formats against tables of all their codes, decoded by numpy and ml_dtypes, and against exact fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from halfstep import formats
from halfstep.formats import FORMATS, Format, Rounding, round_to

NUMPY_DTYPES: dict[str, Any] = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
SMALL = [FORMATS[name] for name in ("tf32", *NUMPY_DTYPES)]
ALL = list(FORMATS.values())
WIDE = [torch.float32, torch.float64]

each_small = pytest.mark.parametrize("format", SMALL, ids=str)
each_format = pytest.mark.parametrize("format", ALL, ids=str)
each_dtype = pytest.mark.parametrize("dtype", WIDE, ids=str)


def decoded(format: Format) -> npt.NDArray[np.float64]:
    """The value of every code, in the order of the codes, by an implementation that is not torch's."""
    codes = np.arange(2**format.bits, dtype=np.uint32)
    if format.name == "tf32":  # the upper 19 bits of a float32
        narrow = (codes << 13).view(np.float32)
    else:
        narrow = codes.astype(f"u{format.bits // 8}").view(NUMPY_DTYPES[format.name])
    with np.errstate(invalid="ignore"):  # numpy warns of signalling NaNs
        return np.asarray(narrow, dtype=np.float64)


@cache
def magnitudes(format: Format) -> npt.NDArray[np.float64]:
    """All finite magnitudes upward from zero: the index is the code, so an odd index is an odd last bit."""
    values = decoded(format)[: 2 ** (format.bits - 1)]
    return np.asarray(values[np.isfinite(values)])


@cache
def with_end(format: Format) -> npt.NDArray[np.float64]:
    """The magnitudes, and after them the one that would follow if there were one more exponent."""
    values = magnitudes(format)
    return np.append(values, 2 * values[-1] - values[-2])


@cache
def between(format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Lower neighbour, midpoint and upper neighbour of every gap, the one beyond the largest number included."""
    table = torch.from_numpy(with_end(format))
    return table[:-1], (table[:-1] + table[1:]) / 2, table[1:]


def beyond(format: Format) -> float:
    """What a magnitude past the end becomes."""
    return {"inf": math.inf, "nan": math.nan, "saturate": format.max}[format.overflow]


def nearest_by_table(x: Tensor, format: Format, end: float | None = None) -> Tensor:
    """The slow, obvious rounding of finite numbers: look both neighbours up and compare the exact distances.

    What leaves the range becomes `end`, if that is not what the format's overflow gives.
    """
    table, magnitude = with_end(format), x.double().abs().numpy()
    low = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, len(table) - 2)
    middle = (table[low] + table[low + 1]) / 2  # one bit more than the format: exact
    up = np.where(magnitude == middle, low % 2 == 1, magnitude > middle)
    index = low + up
    rounded = np.where(index == len(table) - 1, beyond(format) if end is None else end, table[index])
    return torch.from_numpy(rounded).copysign(x.double()).to(x.dtype)


def nearest_by_fraction(x: float, format: Format) -> float:
    """The same for one number of any format, from the definition and nothing but integers. inf: beyond the range."""
    exact = abs(Fraction(x))
    exponent = format.emin
    while exact >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - format.mantissa_bits)
    rounded = round(exact / unit) * unit  # Python's round takes ties to the even integer
    return math.copysign(math.inf if rounded > Fraction(format.max) else float(rounded), x)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, so that 0 and -0 differ, but any NaN is like any other."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    both_nan = a.isnan() & b.isnan()
    return a.dtype == b.dtype and bool((both_nan | (a.view(integer) == b.view(integer))).all())


def with_both_signs(x: Tensor) -> Tensor:
    return torch.cat([x, -x])


def neighbourhood(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each number, and the ones just below and above it in a dtype, of either sign."""
    x = x.to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    return with_both_signs(torch.cat([x, torch.nextafter(x, infinity), torch.nextafter(x, -infinity)]))


# -- what follows from the bits


@pytest.mark.parametrize("format", [f for f in ALL if f.dtype is not None], ids=str)
def test_derived_numbers_are_torchs(format: Format) -> None:
    assert format.dtype is not None
    info = torch.finfo(format.dtype)
    derived = (format.bits, format.max, format.tiny, format.eps)
    assert derived == (info.bits, info.max, info.tiny, info.eps)


@each_small
def test_derived_numbers_are_those_of_the_codes(format: Format) -> None:
    values = magnitudes(format)
    one = int(np.searchsorted(values, 1.0))
    assert (format.max, format.smallest_subnormal) == (values[-1], values[1])
    assert format.eps == values[one + 1] - values[one]
    first_octave = 2**format.mantissa_bits  # the code after all subnormal ones
    assert format.tiny == values[first_octave]
    assert (format.emin, format.emax) == (math.log2(format.tiny), math.floor(math.log2(format.max)))
    assert format.bias == one >> format.mantissa_bits
    assert format.has_infinities == bool(np.isinf(decoded(format)).any())


def test_known_numbers() -> None:
    fp16, e4m3 = FORMATS["fp16"], FORMATS["float8_e4m3fn"]
    assert (fp16.max, fp16.tiny, fp16.smallest_subnormal) == (65504.0, 2.0**-14, 2.0**-24)
    assert (e4m3.max, e4m3.tiny, e4m3.smallest_subnormal) == (448.0, 2.0**-6, 2.0**-9)
    assert (fp16.overflow_threshold, e4m3.overflow_threshold) == (65520.0, 464.0)
    assert FORMATS["tf32"].bits == 19


@each_format
def test_the_table_in_the_docstring_is_right(format: Format) -> None:
    row = next(line for line in (formats.__doc__ or "").splitlines() if line.startswith(f"{format.name} "))
    name, bits, exponent, mantissa, largest, tiny, eps, overflow = row.split(maxsplit=7)
    assert (name, int(bits)) == (str(format), format.bits)
    assert (int(exponent), int(mantissa)) == (format.exponent_bits, format.mantissa_bits)
    for text, value in ((largest, format.max), (tiny, format.tiny), (eps, format.eps)):
        assert float(text) == (value if "e" not in text else float(f"{value:.1e}"))
    assert overflow == ("inf" if format.overflow == "inf" else f"{format.max:g}, even from inf")


@each_format
def test_overflow_is_what_the_cast_does(format: Format) -> None:
    for x in (math.inf, 2 * format.max, -math.inf):
        rounded = round_to(torch.tensor([x], dtype=torch.float64), format)
        assert same(rounded, torch.tensor([beyond(format)], dtype=torch.float64).copysign(torch.tensor(x)))


def test_of_finds_by_name_by_dtype_and_by_itself() -> None:
    for format in ALL:
        assert formats.of(format.name) is formats.of(format) is format
        assert format.dtype is None or formats.of(format.dtype) is format


@pytest.mark.parametrize("unknown", ["half", "", torch.int8, torch.float64, torch.float8_e4m3fnuz, None])
def test_an_unknown_format_is_told_what_exists(unknown: Any) -> None:
    known = r"unknown number format .*Known: fp32 \(torch.float32\), tf32, bf16 .*float8_e5m2 \(torch.float8_e5m2\)\."
    with pytest.raises(ValueError, match=known):
        formats.of(unknown)
    with pytest.raises(ValueError, match=known):
        round_to(torch.ones(1), unknown)


# -- rounding to nearest


@each_dtype
@each_small
def test_numbers_of_the_format_stay_as_they_are(format: Format, dtype: torch.dtype) -> None:
    values = torch.from_numpy(decoded(format)).to(dtype)
    if format.overflow == "saturate":
        assert not values.isinf().any()
    assert len(values) == 2**format.bits
    assert same(round_to(values, format), values)
    assert same(round_to(values, format, "stochastic"), values)


@each_dtype
@each_small
def test_every_tie_and_the_numbers_next_to_it(format: Format, dtype: torch.dtype) -> None:
    low, middle, high = between(format)
    ties = with_both_signs(middle.to(dtype))
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    even[-1] = even[-1] if even[-1] <= format.max else beyond(format)
    assert same(round_to(ties, format), with_both_signs(even).to(dtype))
    near = neighbourhood(middle, dtype)
    assert same(round_to(near, format), nearest_by_table(near, format))


@each_dtype
@each_small
def test_numbers_next_to_every_number(format: Format, dtype: torch.dtype) -> None:
    near = neighbourhood(torch.from_numpy(magnitudes(format)), dtype)
    assert same(round_to(near, format), nearest_by_table(near, format))


@pytest.mark.parametrize("format", [f for f in SMALL if f.dtype is not None], ids=str)
def test_float64_is_rounded_once(format: Format) -> None:
    x = torch.tensor([1 + format.eps / 2 + 2.0**-40, -(1 + 1.5 * format.eps - 2.0**-40)], dtype=torch.float64)
    assert format.dtype is not None
    # The reason why float64 is not left to torch's casts: they make a tie of it on the way.
    assert x.to(format.dtype).tolist() == [1.0, -(1 + 2 * format.eps)]
    assert round_to(x, format).tolist() == [1 + format.eps, -(1 + format.eps)]


def test_float64_to_fp32_is_numpys_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = (10.0**k for k in range(-46, 40))
    x = torch.cat([torch.randn(1000, dtype=torch.float64, generator=generator) * scale for scale in scales])
    with np.errstate(over="ignore"):
        expected = x.numpy().astype(np.float32)
    assert np.isinf(expected).any() and (expected == 0).any()
    assert same(round_to(x, "fp32"), torch.from_numpy(expected).double())


number_32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
number_64 = st.floats(width=64, allow_nan=False, allow_infinity=False)
#: Where the formats are: uniform numbers of 64 bits nearly all lie outside.
in_range = st.builds(math.ldexp, st.floats(-2, 2), st.integers(-152, 128))


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.one_of(number_32, in_range, number_64), st.sampled_from(WIDE))
def test_nearest_is_the_definitions(format: Format, value: float, dtype: torch.dtype) -> None:
    x = torch.tensor(value, dtype=torch.float64).to(dtype)
    assume(bool(x.isfinite()))
    expected = nearest_by_fraction(x.item(), format)
    overflowed = math.isinf(expected)
    assert format.overflows(x).item() is overflowed
    assert format.underflows(x).item() is (expected == 0 and x.item() != 0)
    rounded = round_to(x, format)
    assert rounded.shape == x.shape
    assert same(rounded, torch.tensor(beyond(format) if overflowed else abs(expected), dtype=dtype).copysign(x))


def test_tf32_is_the_definitions_for_many_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    x = x[x.isfinite()]
    assert same(round_to(x, "tf32"), nearest_by_table(x, FORMATS["tf32"]))
    some = x[:2000]
    twin = [nearest_by_fraction(v, FORMATS["tf32"]) for v in some.tolist()]
    assert same(round_to(some, "tf32"), torch.tensor(twin))


@each_dtype
@each_format
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zero_infinity_and_nan(format: Format, dtype: torch.dtype, rounding: Rounding) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    end = beyond(format)
    assert same(round_to(x, format, rounding), torch.tensor([0.0, -0.0, end, -end, math.nan], dtype=dtype))


@each_format
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("repeat", [1, 37], ids=["one element", "vectorised"])
def test_nan_stays_nan_whatever_its_payload(format: Format, rounding: Rounding, repeat: int) -> None:
    payloads = torch.tensor([1 << k for k in range(23)] + [2**23 - 1, 0x7F_F000, 0x1FFF, 0x0FFF], dtype=torch.int32)
    bits = torch.cat([payloads | 0x7F80_0000, payloads | -0x80_0000])
    for single in torch.tensor_split(bits.view(torch.float32), len(bits)):
        for x in (single.repeat(repeat), single.repeat(repeat).double()):
            assert round_to(x, format, rounding).isnan().all()


def test_tf32_keeps_a_nan_bit_for_bit() -> None:
    bits = torch.tensor([0x7F80_0001, 0x7FFF_FFFF, -1, 0x7FC1_2345], dtype=torch.int32)
    assert round_to(bits.view(torch.float32), "tf32").view(torch.int32).tolist() == bits.tolist()


# -- overflow and underflow, before the cast


@each_dtype
@each_small
def test_overflow_is_seen_before_the_cast(format: Format, dtype: torch.dtype) -> None:
    table = with_end(format)
    limit = torch.tensor(format.overflow_threshold, dtype=dtype)
    largest, infinity = torch.tensor(format.max, dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    tie_goes_up = (len(table) - 1) % 2 == 0
    x = torch.stack([largest, torch.nextafter(limit, -infinity), limit, torch.nextafter(limit, infinity), infinity])
    assert format.overflows(x).tolist() == [False, False, tie_goes_up, True, False]
    assert format.overflows(-x).tolist() == format.overflows(x).tolist()
    assert not format.overflows(torch.tensor([0.0, math.nan], dtype=dtype)).any()


def test_known_limits() -> None:
    x = torch.tensor([65519.996, 65520.0, 464.0, 464.00003])
    assert FORMATS["fp16"].overflows(x).tolist() == [False, True, False, False]
    assert FORMATS["float8_e4m3fn"].overflows(x).tolist() == [True, True, False, True]
    assert FORMATS["float8_e5m2"].overflows(torch.tensor([61439.996, 61440.0])).tolist() == [False, True]


def test_fp32_overflows_in_float64_only() -> None:
    fp32 = FORMATS["fp32"]
    limit = fp32.overflow_threshold
    x = torch.tensor([math.nextafter(limit, 0), limit, -limit, math.inf], dtype=torch.float64)
    assert fp32.overflows(x).tolist() == [False, True, True, False]
    assert fp32.overflows(torch.tensor([fp32.max, math.inf])).tolist() == [False, False]


@each_dtype
@each_small
def test_overflows_and_underflows_agree_with_the_rounding(format: Format, dtype: torch.dtype) -> None:
    half = format.smallest_subnormal / 2
    ends = torch.tensor([half, 2 * half, format.max, format.overflow_threshold], dtype=torch.float64)
    x = torch.cat([neighbourhood(ends, dtype), neighbourhood(between(format)[1], dtype)])
    x = x[x.isfinite()]
    assert torch.equal(format.overflows(x), nearest_by_table(x, format, end=math.inf).isinf())
    assert torch.equal(format.underflows(x), (nearest_by_table(x, format) == 0) & (x != 0))
    near_zero = torch.tensor([half, -half, 1.25 * half, 0.0, -0.0, math.nan, math.inf]).to(dtype)
    assert format.underflows(near_zero).tolist() == [True, True, False, False, False, False, False]


# -- ulp


@each_dtype
@each_small
def test_ulp_is_the_distance_to_the_next_code(format: Format, dtype: torch.dtype) -> None:
    low, middle, high = between(format)
    distance = (high - low).to(dtype)  # beyond the largest number, `between` goes on as below it
    for x in (low.to(dtype), -low.to(dtype), middle.to(dtype), torch.nextafter(high.to(dtype), low.to(dtype))):
        assert same(format.ulp(x), distance)


def test_ulp_of_fp32_is_numpys_spacing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 0x7F80_0000, (100_000,), generator=generator).to(torch.int32).view(torch.float32)
    x = torch.cat([x, torch.tensor([0.0, 2.0**-149, 2.0**-126, 1.0])])
    assert same(FORMATS["fp32"].ulp(x), torch.from_numpy(np.spacing(x.numpy())))


@each_format
def test_ulp_at_the_ends(format: Format) -> None:
    x = [0.0, -0.0, format.tiny, format.max, 8.0 * format.max, math.inf, -math.inf, math.nan]
    small, large = format.smallest_subnormal, format.eps * 2.0**format.emax
    expected = torch.tensor([small, small, small, large, large, math.inf, math.inf, math.nan], dtype=torch.float64)
    assert same(format.ulp(torch.tensor(x, dtype=torch.float64)), expected)
    assert same(torch.tensor([format.ulp(v) for v in x], dtype=torch.float64), expected)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.one_of(number_64, in_range))
def test_ulp_of_a_float_and_of_a_tensor_are_the_same(format: Format, value: float) -> None:
    assert format.ulp(torch.tensor(value, dtype=torch.float64)).item() == format.ulp(value)


# -- stochastic rounding


def neighbours(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The numbers of the format around finite x, by magnitude, and beyond the range what overflow gives."""
    table, magnitude = with_end(format), x.double().abs().numpy()
    low = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, len(table) - 1)
    high = np.minimum(low + (table[low] < magnitude), len(table) - 1)
    ended = np.append(magnitudes(format), beyond(format))
    return tuple(torch.from_numpy(ended[i]).copysign(x.double()).to(x.dtype) for i in (low, high))  # type: ignore[return-value]


@each_dtype
@each_small
def test_stochastic_gives_one_of_the_two_neighbours(format: Format, dtype: torch.dtype) -> None:
    low, middle, high = between(format)
    generator = torch.Generator().manual_seed(1)
    inside = low + (high - low) * torch.rand(low.shape, dtype=torch.float64, generator=generator)
    x = torch.cat([with_both_signs(inside.to(dtype)), neighbourhood(middle, dtype), neighbourhood(low, dtype)])
    x = torch.cat([x, torch.tensor([2 * format.max, -3 * format.max]).to(dtype)])
    x = x[x.isfinite()]
    below, above = neighbours(x, format)
    rounded = round_to(x, format, "stochastic", generator)
    took_below = rounded == below
    took_above = (rounded == above) | (rounded.isnan() & above.isnan())  # past the end of a format without inf
    assert (took_below | took_above).all()
    assert torch.equal(rounded.signbit() & ~rounded.isnan(), x.signbit() & ~rounded.isnan())
    undecided = below != above  # about half of the midpoints go each way
    assert (took_below & undecided).sum() > undecided.sum() / 4
    assert (took_above & undecided).sum() > undecided.sum() / 4


@each_dtype
@each_small
def test_the_mean_of_stochastic_rounding_is_the_number(format: Format, dtype: torch.dtype) -> None:
    draws, generator = 20_000, torch.Generator().manual_seed(2)
    table = with_end(format)
    last_subnormal = 2**format.mantissa_bits - 1
    gaps = [0, 1, last_subnormal, last_subnormal + 1, len(table) // 2, len(table) - 2 - (format.overflow != "inf")]
    for gap in gaps:
        for chance in (1 / 64, 0.3, 0.5, 0.9):
            x = torch.tensor(table[gap] + chance * (table[gap + 1] - table[gap]), dtype=torch.float64).to(dtype)
            exact_chance = (x.item() - table[gap]) / (table[gap + 1] - table[gap])
            assert exact_chance == pytest.approx(chance, abs=1e-3)
            rounded = round_to(-x.expand(draws), format, "stochastic", generator).double()
            ups = int((rounded < -table[gap]).sum())
            assert int((rounded == -table[gap]).sum()) == draws - ups
            sigma = math.sqrt(draws * exact_chance * (1 - exact_chance))
            assert abs(ups - draws * exact_chance) < 5 * sigma, (gap, chance)


@each_small
def test_the_chance_is_fine_grained(format: Format) -> None:
    # Under one seed an element goes up from a certain fraction on. Find that fraction of each: they are uniform, also
    # in the bits that a draw of torch.rand in float32, of 24 bits, would not have.
    n, unit = 5000, format.smallest_subnormal
    low, high = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    for _ in range(50):
        fraction = (low + high) / 2
        up = round_to(fraction * unit, format, "stochastic", torch.Generator().manual_seed(3)) == unit
        low, high = torch.where(up, low, fraction), torch.where(up, fraction, high)
    for uniform in (high, (high * 2.0**24).frac(), (high * 2.0**36).frac()):
        assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-4
    never = torch.full((n,), unit, dtype=torch.float64) * 2.0**-63
    assert (round_to(never, format, "stochastic") == 0).all()


def test_stochastic_rounding_keeps_a_sum_that_nearest_loses() -> None:
    generator = torch.Generator().manual_seed(4)
    nearest, stochastic = torch.ones(256), torch.ones(256)
    for _ in range(512):
        nearest = round_to(nearest + 2.0**-10, "bf16")
        stochastic = round_to(stochastic + 2.0**-10, "bf16", "stochastic", generator)
    assert (nearest == 1).all()
    # 512 roundings of at most an ulp's spread, over 256 sums: five standard errors of the mean.
    bound = 5 * math.sqrt(512 * 2.0**-14 / 4 / 256)
    assert abs(stochastic.mean().item() - 1.5) < bound


@each_small
def test_a_generator_decides_and_the_global_one_is_left_alone(format: Format) -> None:
    x = torch.linspace(0.1, 3, 1000)
    state = torch.get_rng_state()
    first, again, other = (round_to(x, format, "stochastic", torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    by_default = round_to(x, format, "stochastic")
    torch.manual_seed(7)
    assert torch.equal(round_to(x, format, "stochastic"), by_default)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(ALL), st.one_of(number_32, in_range), st.sampled_from(WIDE), st.integers(0, 2**32))
def test_stochastic_is_within_an_ulp_and_exact_where_possible(
    format: Format, value: float, dtype: torch.dtype, seed: int
) -> None:
    x = torch.tensor(value, dtype=torch.float64).to(dtype)
    rounded = round_to(x, format, "stochastic", torch.Generator().manual_seed(seed))
    if rounded.isnan():
        assert format.overflow == "nan" and x.abs() > format.max
        return
    assert round_to(rounded, format).equal(rounded)
    if x.abs() <= format.max:
        assert abs(Fraction(rounded.item()) - Fraction(x.item())) < Fraction(format.ulp(x.item()))
    assert bool(rounded.signbit()) == bool(x.signbit())


# -- tensors of every kind


@each_dtype
@each_format
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2],
        lambda x: x.view(8, -1).t(),
        lambda x: x[:24].view(2, 3, 4).permute(2, 0, 1)[:, :, 1:],
        lambda x: x[:1].expand(5, 7),
        lambda x: x[:0],
        lambda x: x[:0].view(3, 0, 2),
        lambda x: x[3],
    ],
    ids=["strided", "transposed", "permuted", "expanded", "empty", "empty of three axes", "0-d"],
)
def test_layout_does_not_matter(
    format: Format, dtype: torch.dtype, rounding: Rounding, view: Callable[[Tensor], Tensor]
) -> None:
    x = view(torch.randn(64, generator=torch.Generator().manual_seed(8)).to(dtype))
    before = x.clone()
    rounded = round_to(x, format, rounding, torch.Generator().manual_seed(9))
    compact = round_to(x.contiguous(), format, rounding, torch.Generator().manual_seed(9))
    assert rounded.shape == x.shape and same(rounded, compact)
    assert same(x, before)
    assert format.ulp(x).shape == format.overflows(x).shape == format.underflows(x).shape == x.shape
    assert same(format.ulp(x), format.ulp(x.contiguous()))


@each_dtype
@each_format
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_result_is_new_and_has_no_gradient(format: Format, dtype: torch.dtype, rounding: Rounding) -> None:
    x = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    rounded = round_to(x, format, rounding)
    assert type(rounded) is Tensor and rounded.dtype == dtype and not rounded.requires_grad
    assert not format.ulp(x).requires_grad
    rounded.zero_()
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float16, torch.float8_e4m3fn], ids=str
)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    x = torch.zeros(3).to(dtype)
    bf16 = FORMATS["bf16"]
    calls: list[Callable[[], Tensor]] = [
        lambda: round_to(x, bf16),
        lambda: bf16.ulp(x),
        lambda: bf16.overflows(x),
        lambda: bf16.underflows(x),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"float32 and float64 tensors, not on {dtype}") as caught:
            call()
        assert ("x.float()" in str(caught.value)) is dtype.is_floating_point


def test_an_unknown_rounding_is_told_what_exists() -> None:
    with pytest.raises(ValueError, match=r"unknown rounding 'up'\. Known: nearest, stochastic"):
        round_to(torch.ones(1), "bf16", "up")  # type: ignore[arg-type]  # what a user may type

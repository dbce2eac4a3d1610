"""Storage of FP32 masters: over every exponent and lower half of FP32, every 16-bit code, and a twin in fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from storage_cases import (
    LOW,
    all_codes,
    encoded,
    every_exponent,
    every_upper_half,
    exponent,
    noise_of,
    of_bits,
    power,
    same_bits,
)
from torch import Tensor

from halfstep import formats
from halfstep.optim import masters
from halfstep.optim.masters import Master

BF16, FP16 = torch.bfloat16, torch.float16
ONES = -1  # dither whose bits are all set: the largest


def decoded(parameter: Tensor, kept: Tensor | None) -> Tensor:
    return masters.decode(parameter, kept)


def assert_nan_stays(x: Tensor, parameter: Tensor, master: Tensor) -> None:
    """NaN is NaN in the parameter and in the master, with its sign, and nothing else is."""
    nan = x.isnan()
    assert torch.equal(parameter.isnan(), nan) and torch.equal(master.isnan(), nan)
    assert torch.equal(parameter[nan].signbit(), x[nan].signbit())
    assert torch.equal(master[nan].signbit(), x[nan].signbit())


# bf16 -----------------------------------------------------------------------------------------------------------------


def test_bf16_exact_gives_every_pattern_back() -> None:
    for x in (*every_exponent(), every_upper_half()):
        parameter, kept = encoded(x, BF16, "exact")
        back = decoded(parameter, kept)
        assert_nan_stays(x, parameter, back)
        number = ~x.isnan()
        assert same_bits(back[number], x[number])


def test_bf16_parameter_is_the_rounded_master_but_on_ties() -> None:
    for x in (*every_exponent(), every_upper_half()):
        parameter, _ = encoded(x, BF16, "exact")
        nearest = formats.round_to(x, "bf16")
        tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
        differs = (parameter.float() != nearest) & ~x.isnan()
        assert not (differs & ~tie).any()
        number = tie & ~x.isnan()
        assert (parameter.float().abs() > x.abs())[number].all()  # away from zero


def test_bf16_24bit_is_within_its_bound_and_rounds_to_nearest() -> None:
    for x in (*every_exponent(), every_upper_half()):
        parameter, kept = encoded(x, BF16, "24bit")
        back = decoded(parameter, kept)
        assert_nan_stays(x, parameter, back)
        # The largest 2^7 numbers round to inf, as FP32's largest do in a cast to bf16.
        finite = (x.view(torch.int32) & 0x7FFFFFFF) < 0x7F7FFF80
        assert back[finite].isfinite().all() and torch.equal(back[x.isinf()], x[x.isinf()])
        error, bound = (back.double() - x.double()).abs()[finite], power(exponent(x) - 16)[finite]
        assert (error <= bound).all() and (error == bound).any()  # the bound is met, at ties
        assert torch.equal(back.signbit(), x.signbit())


@pytest.mark.parametrize(("master", "remainders"), [("exact", 1 << 16), ("24bit", 1 << 8)])
def test_bf16_pairs_decode_to_masters_that_stay(master: Master, remainders: int) -> None:
    """Whatever parameter and remainder meet: the master is near the parameter, and encoding changes nothing."""
    parameter = all_codes(BF16)
    noise = noise_of(np.random.default_rng(0), parameter.numel())
    dtype, last = (torch.int16 if master == "exact" else torch.int8), remainders // 2 - 1
    for r in (*range(-remainders // 2, last, remainders // 23), -1, 0, 1, last):
        x = decoded(parameter, torch.full((1 << 16,), r, dtype=dtype))
        # inf lies beyond the largest number; half a spacing inwards of it there are numbers, outwards NaN.
        ordinary = parameter.isfinite()
        assert not x[ordinary].isnan().any()
        half_spacing = power(exponent(parameter.float()) - 8)
        assert ((x.double() - parameter.double()).abs() <= half_spacing)[ordinary].all()
        for bits in (None, noise, torch.full_like(noise, ONES)):
            again = decoded(*encoded(x, BF16, master, noise=bits))
            assert torch.equal(again.isnan(), x.isnan())
            assert same_bits(again[~x.isnan()], x[~x.isnan()])


def test_a_bf16_parameter_set_to_zero_from_outside_is_no_nan() -> None:
    """A mask writes 0 (or -0) over parameters whose remainders are negative: across the sign bit lie the NaNs."""
    for master in ("exact", "24bit"):
        parameter, kept = encoded(torch.tensor([0.9999, -0.9999, 3.14159]), BF16, master)
        for zero in (0.0, -0.0):
            parameter.fill_(zero)
            assert (decoded(parameter, kept).abs() < 2.0**-125).all()


# fp16 -----------------------------------------------------------------------------------------------------------------


def test_fp16_exact_is_exact_from_2_to_the_minus_16_up_and_within_2_to_the_minus_40_below() -> None:
    inexact = 0
    for x in (*every_exponent(), every_upper_half()):
        parameter, kept = encoded(x, FP16, "exact")
        back = decoded(parameter, kept)
        assert_nan_stays(x, parameter, back)
        assert same_bits(parameter[~x.isnan()], x[~x.isnan()].half())  # rounded as in a cast
        magnitude = x.abs()
        held = (magnitude >= 2.0**-16) & (magnitude < 65520)
        assert same_bits(back[held], x[held])
        below = magnitude < 2.0**-16
        error = (back.double() - x.double()).abs()[below]
        assert (error <= 2.0**-40).all()
        inexact += int((error > 2.0**-41).sum())
        beyond = magnitude >= 65520
        assert torch.equal(back[beyond], torch.copysign(torch.tensor(math.inf), x[beyond]))
    assert inexact


def test_fp16_24bit_is_within_its_bound() -> None:
    closest = 0.0
    for x in (*every_exponent(), every_upper_half()):
        parameter, kept = encoded(x, FP16, "24bit")
        back = decoded(parameter, kept)
        assert_nan_stays(x, parameter, back)
        held = x.abs() < 65520
        # Below fp16's normal range the spacing stays, and so does the bound.
        error = (back.double() - x.double()).abs()[held] / power(exponent(x, -14) - 18)[held]
        assert (error <= 1).all()
        closest = max(closest, float(error.max()) if error.numel() else 0.0)
    assert closest == 1


@pytest.mark.parametrize(("master", "largest"), [("exact", (1 << 13) - 2), ("24bit", 127)])
def test_fp16_pairs_decode_to_masters_that_stay(master: Master, largest: int) -> None:
    parameter = all_codes(FP16)
    noise = noise_of(np.random.default_rng(0), parameter.numel())
    for r in (*range(-largest, largest, largest // 11), -1, 0, 1, largest):
        x = decoded(parameter, torch.full((1 << 16,), r, dtype=torch.int16 if master == "exact" else torch.int8))
        ordinary = parameter.isfinite()
        half_spacing = power(exponent(parameter.float(), -14) - 11)
        assert ((x.double() - parameter.double()).abs() <= half_spacing)[ordinary].all()
        assert same_bits(x[parameter.isinf()], parameter[parameter.isinf()].float())
        for bits in (None, noise, torch.full_like(noise, ONES)):
            again = decoded(*encoded(x, FP16, master, noise=bits))
            assert torch.equal(again.nan_to_num(7.0, 8.0, 9.0), x.nan_to_num(7.0, 8.0, 9.0))


# All storages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("master", ["fp32", "exact", "24bit", "none"])
def test_a_16_bit_checkpoint_without_remainders_is_its_own_master(master: Master, dtype: torch.dtype) -> None:
    parameter = all_codes(dtype)
    _, kept = encoded(parameter.float(), dtype, master)
    if kept is not None and kept.dtype is not torch.float32:
        kept.zero_()
    x = decoded(parameter, kept)
    number = ~parameter.isnan()
    assert torch.equal(x[number], parameter[number].float()) and x[~number].isnan().all()
    again, _ = encoded(x, dtype, master)
    assert torch.equal(again[number], parameter[number]) and again[~number].isnan().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("master", ["fp32", "exact", "24bit", "none"])
@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1.5, -(2.0**-14), 2.0**-24, 2.0**-140])
def test_values_at_the_edges(value: float, master: Master, dtype: torch.dtype) -> None:
    x = torch.tensor([value])
    parameter, kept = encoded(x, dtype, master)
    assert same_bits(parameter, x.to(dtype))
    back = decoded(parameter, kept)
    if dtype is BF16 or value not in (2.0**-140,):
        assert torch.equal(back, x) if master != "none" else torch.equal(back, parameter.float())
    if dtype is BF16 or master in ("fp32", "none"):
        assert torch.equal(back.signbit(), x.signbit())  # with a remainder, fp16 forgets the sign of a zero


@pytest.mark.parametrize("dtype", LOW)
def test_an_fp32_master_loses_to_a_parameter_that_was_changed(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0001, 2.0002, 3.0003, math.nan])
    parameter, kept = encoded(x, dtype, "fp32")
    parameter[1] = -7.0
    back = decoded(parameter, kept)
    assert torch.equal(back[:3], torch.tensor([x[0], -7.0, x[2]])) and back[3].isnan()


def test_an_fp32_parameter_is_its_own_master() -> None:
    x = every_upper_half()
    parameter = torch.empty_like(x)
    masters.encode(x, parameter, None)
    back = decoded(parameter, None)
    assert same_bits(back, x) and back.data_ptr() != parameter.data_ptr()
    assert all(masters.extra(m, "nearest", torch.float32) is None for m in ("fp32", "exact", "24bit", "none"))


@pytest.mark.parametrize("dtype", LOW)
def test_a_compensation_adds_bits(dtype: torch.dtype) -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal(1 << 16).astype(np.float32))
    parameter, kept = encoded(x, dtype, "none", "kahan")
    assert kept is not None and kept.dtype is dtype and same_bits(parameter, x.to(dtype))
    error = (decoded(parameter, kept).double() - x.double()).abs()
    # Half its own spacing, which in fp16 ends at 2^-24; then the sum is rounded to FP32.
    half_spacing = power(exponent(x) - 17) if dtype is BF16 else power(exponent(x) - 23).clamp(min=2.0**-25)
    assert (error <= half_spacing + power(exponent(x) - 24)).all()


@pytest.mark.parametrize("dtype", LOW)
def test_small_updates_add_up_in_a_compensation(dtype: torch.dtype) -> None:
    alone, _ = encoded(torch.ones(1), dtype, "none")
    parameter, kept = encoded(torch.ones(1), dtype, "none", "kahan")
    for _ in range(300):
        masters.encode(decoded(alone, None) - 1e-4, alone, None)
        masters.encode(decoded(parameter, kept) - 1e-4, parameter, kept)
    assert alone.item() == 1 and abs(decoded(parameter, kept).item() - 0.97) < 0.03 * 0.03


@pytest.mark.parametrize("dtype", LOW)
def test_a_compensation_larger_than_the_rounding_error_of_what_was_written_is_dropped(dtype: torch.dtype) -> None:
    parameter, kept = encoded(torch.tensor([100.1, 100.1, math.inf, math.nan]), dtype, "none", "kahan")
    assert kept is not None and kept[:2].ne(0).all() and kept[2:].eq(0).all()
    parameter[:1] = 0
    assert decoded(parameter, kept)[0] == 0 and abs(decoded(parameter, kept)[1].item() - 100.1) < 1e-3
    # Every compensation that a rounding leaves is taken: those of the largest errors, at a power of two, too.
    edges = torch.tensor([1 + 2.0**-8, 1 - 2.0**-9, 1 + 2.0**-11, 1 - 2.0**-12, -1 - 2.0**-8])
    assert torch.equal(decoded(*encoded(edges, dtype, "none", "kahan")), edges)


# A twin in Python -----------------------------------------------------------------------------------------------------


def twin_bf16(x: float, eight: bool) -> tuple[int, int, float]:
    """Code of the parameter, remainder, and the master, by integers of any size."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    if math.isnan(x):
        magnitude = 0x7FC00000
    elif eight and magnitude < 0x7F800000:
        # Half goes up in the bits of the number, so away from zero.
        magnitude = (magnitude + 128) // 256 * 256
    upper = (magnitude + 0x8000) // 0x10000
    remainder = magnitude - upper * 0x10000
    (master,) = struct.unpack("<f", struct.pack("<I", sign << 31 | magnitude))
    return sign << 15 | upper, remainder // 256 if eight else remainder, master


def twin_fp16(x: float, eight: bool) -> tuple[int, int, float]:
    """The same by fractions."""
    try:
        near = struct.unpack("<e", struct.pack("<e", x))[0]  # Python's own rounding, to nearest even
    except OverflowError:
        near = math.copysign(math.inf, x)
    (code,) = struct.unpack("<H", struct.pack("<e", near))
    if not math.isfinite(near):
        return code, 0, near
    field = code >> 10 & 31
    unit = Fraction(2) ** (max(field, 1) - 33 if eight else field - 39)
    count = round((Fraction(x) - Fraction(near)) / unit)
    if eight:
        count = max(-127, min(127, count))
    return code, count, float(Fraction(near) + count * unit)


@pytest.mark.parametrize("master", ["exact", "24bit"])
@pytest.mark.parametrize("dtype", LOW)
def test_codes_are_those_of_a_twin_in_fractions(dtype: torch.dtype, master: Master) -> None:
    generator = np.random.default_rng(2)
    anything = of_bits(torch.from_numpy(generator.integers(0, 1 << 32, 2000)))
    ordinary = torch.from_numpy(generator.standard_normal(2000) * 10.0 ** generator.integers(-8, 6, 2000)).float()
    x = torch.cat([anything[~anything.isnan()], ordinary, every_upper_half()[::1009].nan_to_num(1.0)])
    parameter, kept = encoded(x, dtype, master)
    assert kept is not None
    twin = twin_bf16 if dtype is BF16 else twin_fp16
    expected = [twin(value, master == "24bit") for value in x.tolist()]
    codes = parameter.view(torch.int16).to(torch.int32) & 0xFFFF
    assert codes.tolist() == [code for code, _, _ in expected]
    assert kept.tolist() == [remainder for _, remainder, _ in expected]
    assert decoded(parameter, kept).tolist() == [value for _, _, value in expected]


# Stochastic rounding --------------------------------------------------------------------------------------------------


def rounded(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    return decoded(*encoded(x, dtype, "none", "stochastic", noise))


def samples(dtype: torch.dtype) -> list[float]:
    generator = np.random.default_rng(3)
    spread = generator.standard_normal(24) * 10.0 ** generator.integers(-4, 4, 24)
    edges = [1.0, -1 - 2.0**-20, 2 - 2.0**-23, 65503.9, -(2.0**-14) * 1.0001, 0.0]
    if dtype is BF16:
        edges += [1e-40, -3e-45, 3e38]
    return torch.tensor([*spread, *edges], dtype=torch.float32).tolist()


@pytest.mark.parametrize(("dtype", "dropped"), [(BF16, 16), (FP16, 13)])
def test_over_all_dithers_the_mean_is_the_value(dtype: torch.dtype, dropped: int) -> None:
    """Exactly: each of the 2^16 (fp16: 2^13) parts of a spacing is rounded up by as many of the dithers."""
    noise = (torch.arange(1 << dropped) << (32 - dropped)).to(torch.int32)
    for value in samples(dtype):
        if dtype is FP16 and abs(value) < 2.0**-14:
            continue
        results = rounded(torch.full((1 << dropped,), value), dtype, noise).double()
        assert results.mean().item() == value
        assert len(results.unique()) <= 2


def test_over_all_dithers_the_mean_is_the_value_below_fp16s_normal_range() -> None:
    noise = (torch.arange(1 << 16) << 16).to(torch.int32)
    for whole, part in [(0, 1), (0, 65535), (1, 0), (511, 40000), (1022, 65535), (1023, 1), (3, 2**15)]:
        value = -(whole + part / 65536) * 2.0**-24
        x = torch.full((1 << 16,), value)
        if x[0].item() != value:
            continue  # no FP32 number
        assert rounded(x, FP16, noise).double().mean().item() == value


@pytest.mark.parametrize("dtype", LOW)
def test_over_all_dithers_the_mean_of_24_bit_masters_is_the_value(dtype: torch.dtype) -> None:
    noise = (torch.arange(256) << 24).to(torch.int32)
    checked = 0
    for value in samples(dtype):
        if dtype is FP16 and abs(value) < 2.0**-14:
            continue
        x = torch.full((256,), value)
        parameter, kept = encoded(x, dtype, "24bit", noise=noise)
        assert kept is not None
        if dtype is FP16 and kept.abs().max() == 127:
            continue  # at the code's limit
        assert decoded(parameter, kept).double().mean().item() == value
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_gives_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(4)
    x = every_upper_half()
    x = x[x.isfinite() & (x.abs() < (65504 if dtype is FP16 else 3e38))]
    twin = np.float16 if dtype is FP16 else ml_dtypes.bfloat16
    near = x.numpy().astype(twin)
    towards = np.where(near.astype(np.float32) < x.numpy(), np.inf, -np.inf).astype(twin)
    other = torch.from_numpy(np.nextafter(near, towards).astype(np.float32))
    nearest = torch.from_numpy(near.astype(np.float32))
    up = 0
    for noise in (noise_of(generator, x.numel()), torch.full((x.numel(),), ONES), torch.zeros(x.numel())):
        result = rounded(x, dtype, noise.to(torch.int32))
        assert ((result == nearest) | ((result == other) & (x != nearest))).all()
        assert torch.equal(result.signbit(), x.signbit())
        up += int((result == other).sum())
    assert up > x.numel() / 4


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_leaves_numbers_of_the_format_alone(dtype: torch.dtype) -> None:
    parameter = all_codes(dtype)
    number = ~parameter.isnan()
    for noise in (noise_of(np.random.default_rng(5), 1 << 16), torch.full((1 << 16,), ONES, dtype=torch.int32)):
        again, _ = encoded(parameter.float(), dtype, "none", "stochastic", noise)
        assert same_bits(again[number], parameter[number]) and again[~number].isnan().all()


def test_what_is_finite_stays_finite_as_far_as_documented() -> None:
    ones = torch.full((4,), ONES, dtype=torch.int32)
    fp16 = rounded(torch.tensor([65504.0, 65505.0, -65519.99, 65520.0]), FP16, ones)
    assert fp16.tolist() == [65504.0, 65504.0, -65504.0, math.inf]
    largest = formats.of("bf16").max
    beyond = of_bits(torch.tensor([0x7F7F0001, 0x7F7FFFFF]))
    assert rounded(torch.tensor([largest, -largest]), BF16, ones[:2]).tolist() == [largest, -largest]
    assert rounded(beyond, BF16, ones[:2]).tolist() == [math.inf, math.inf]
    assert rounded(beyond, BF16, torch.zeros(2, dtype=torch.int32)).tolist() == [largest, largest]

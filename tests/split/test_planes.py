"""The encoding of an FP32 number in two 16-bit planes, over every exponent with every lower half."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfstep.optim import masters
from halfstep.split import join, split


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def every_lower_half(upper: int) -> Tensor:
    """The 65,536 float32 numbers with this upper half of their bits."""
    signed = upper - (1 << 16) if upper >= 1 << 15 else upper
    return (torch.arange(1 << 16, dtype=torch.int64) + (signed << 16)).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("mantissa", [0x00, 0x01, 0x55, 0x7E, 0x7F])
def test_every_exponent_and_lower_half_comes_back(sign: int, mantissa: int) -> None:
    for exponent in range(256):
        x = every_lower_half(sign << 15 | exponent << 7 | mantissa)
        hi, lo = split(x)
        assert hi.dtype is torch.bfloat16 and lo.dtype is torch.int16
        back, nan = join(hi, lo), x.isnan()
        assert torch.equal(bits(back)[~nan], bits(x)[~nan])
        assert back[nan].isnan().all() and torch.equal(back.signbit(), x.signbit())
        # The upper plane is the nearest bfloat16: PyTorch's cast, but for ties.
        cast, tie = x.bfloat16(), (bits(x) & 0xFFFF) == 0x8000
        same = (hi.view(torch.int16) == cast.view(torch.int16)) | (hi.isnan() & cast.isnan())
        assert (same | tie).all()
        ties = hi[tie & ~nan].float().abs()
        assert (ties >= x[tie & ~nan].abs()).all()  # away from zero


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.floats(width=32))
def test_it_is_the_exact_master_of_the_optimizers(value: float) -> None:
    x = torch.tensor([value])
    hi, lo = split(x)
    parameter, kept = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    masters.encode(x.clone(), parameter, kept)
    assert torch.equal(hi.view(torch.int16), parameter.view(torch.int16)) and torch.equal(lo, kept)
    assert torch.equal(bits(masters.decode(hi, lo)), bits(join(hi, lo)))


def test_shapes_strides_and_what_is_left_alone() -> None:
    x = torch.randn(4, 6, 2, 2).to(memory_format=torch.channels_last)
    before = x.clone()
    hi, lo = split(x)
    assert hi.shape == lo.shape == x.shape and hi.stride() == lo.stride() == x.stride()
    assert torch.equal(join(hi, lo), x) and torch.equal(x, before)
    for empty in (torch.zeros(0, 3), torch.tensor(math.pi)):
        assert torch.equal(join(*split(empty)), empty)

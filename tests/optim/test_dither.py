"""The dither: a twin in Python's integers, how even it is in one step and over steps, and how independent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.optim import dither
from halfstep.optim.dither import STATE, WEIGHT

MASK = (1 << 32) - 1


def twin_key(seed: int, ordinal: int, stream: int) -> int:
    x = seed * 0x9E3779B9 + ordinal * 0x9E3779B1 + stream * 0x85EBCA6B & MASK
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def twin(i: int, key: int, step: int) -> int:
    x = i * 0x9E3779B1 + key & MASK
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    return x + step * 0x9E3779B9 & MASK


def unsigned(bits: Tensor) -> list[int]:
    return [int(b) & MASK for b in bits]


def draws(numel: int, key: int, step: int) -> Tensor:
    """In [0, 1), float64."""
    return dither.uniform(dither.dither(numel, key, step)).double()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 12345, (1 << 24) - 1])
@pytest.mark.parametrize(("seed", "ordinal", "stream"), [(0, 0, WEIGHT), (1, 0, STATE[0]), (2**31, 147, 2), (-5, 9, 3)])
def test_bits_are_those_of_the_twin(seed: int, ordinal: int, stream: int, step: int) -> None:
    key = dither.key(seed, ordinal, stream)
    assert key == twin_key(seed, ordinal, stream)
    expected = [twin(i, key, step) for i in range(1000)]
    assert unsigned(dither.dither(1000, key, step)) == expected
    assert unsigned(dither.dither(1000, key, torch.tensor(float(step)))) == expected
    assert dither.uniform(dither.dither(1000, key, step)).tolist() == [(x >> 8) / 2**24 for x in expected]


@pytest.mark.parametrize("places", [8, 16, 19, 24])
def test_shifts_are_of_unsigned_numbers(places: int) -> None:
    values = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF]
    bits = torch.tensor(values).to(torch.int32)
    assert dither.shift_right(bits, places).tolist() == [value >> places for value in values]


def test_keys_differ() -> None:
    keys = {dither.key(seed, i, s) for seed in range(8) for i in range(300) for s in (WEIGHT, *STATE)}
    assert len(keys) == 8 * 300 * 4


def test_every_step_fills_the_interval_evenly() -> None:
    numel = 1 << 16
    for step in (1, 2, 1000):
        for seed in range(4):
            x = draws(numel, dither.key(seed, 0, WEIGHT), step)
            counts = torch.bincount((x * 256).long(), minlength=256).double()
            # Chi-squared with 255 degrees of freedom: 255 in the mean, 400 with a chance of 1e-8.
            assert (((counts - 256) ** 2) / 256).sum() < 400
            assert abs(x.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / numel)


def lag(x: Tensor, places: int) -> float:
    return float(torch.corrcoef(torch.stack([x[:-places], x[places:]]))[0, 1])


def test_neighbours_in_memory_are_independent() -> None:
    for seed in range(3):
        x = draws(1 << 16, dither.key(seed, 1, WEIGHT), 7)
        # 0.004 is one standard deviation. One round of hashing is not perfect; so much does rounding no harm.
        assert max(abs(lag(x, places)) for places in (*range(1, 65), 128, 256, 512, 768, 1024, 4096)) < 0.03


def test_streams_parameters_and_seeds_are_independent() -> None:
    keys = [dither.key(seed, i, s) for seed in range(3) for i in range(4) for s in (WEIGHT, *STATE)]
    correlations = torch.corrcoef(torch.stack([draws(1 << 14, key, 3) for key in keys]))
    correlations.fill_diagonal_(0)
    assert correlations.abs().max() < 0.06  # one standard deviation is 0.008


@pytest.mark.parametrize("part", [0.001, 0.1, 1 / 3, 0.5, 0.618, 0.987])
def test_over_steps_the_error_of_a_constant_drift_grows_like_a_logarithm(part: float) -> None:
    """A value that moves by this part of its spacing each step: roundings upwards against what is due."""
    steps, numel, key = 2048, 256, dither.key(0, 0, WEIGHT)
    total = torch.zeros(numel, dtype=torch.float64)
    independent = np.zeros(numel)
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        total += draws(numel, key, step) + part >= 1
        independent += generator.random(numel) + part >= 1
        assert (total - step * part).abs().max() < 1.2 + 0.3 * math.log(step)
    error = (total - steps * part).square().mean().sqrt().item()
    random_walk = math.sqrt(steps * part * (1 - part))
    assert abs(np.sqrt(((independent - steps * part) ** 2).mean()) / random_walk - 1) < 0.25
    assert error < random_walk * 0.8 and error < 1.0


def test_the_mean_over_elements_is_right_in_every_step() -> None:
    key = dither.key(0, 0, WEIGHT)
    for step in range(1, 30):
        up = (draws(1 << 14, key, step) + 0.3 >= 1).double().mean().item()
        assert abs(up - 0.3) < 5 * math.sqrt(0.21 / (1 << 14))

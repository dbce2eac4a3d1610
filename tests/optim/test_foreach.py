"""Many tensors at once get the bits of one by one, whatever is among them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from halfstep.optim import foreach

FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class Subclass(Tensor):
    """A class with a meaning of its own."""


def mixture() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 5, generator=generator).to(FORMATS[i % 3]) for i in range(6)]
    values[0][1, 2], values[1][0, 0], values[2][2, 4] = math.inf, math.nan, 65504.0
    return [
        *values,
        values[0].t(),
        torch.randn(6, 8, generator=generator)[:, ::2],
        torch.zeros(0, 4),
        torch.tensor(3.0),
        nn.Parameter(torch.randn(4, generator=generator)),
        torch.randn(4, generator=generator).as_subclass(Subclass),
    ]


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype is right.dtype and torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0))


@torch.no_grad()
@pytest.mark.parametrize("dtype", FORMATS)
def test_copies(dtype: torch.dtype) -> None:
    sources = mixture()
    destinations = [torch.zeros_like(source, dtype=dtype) for source in sources]
    versions = [destination._version for destination in destinations]
    foreach.copy_(destinations, sources)
    for destination, source, version in zip(destinations, sources, versions, strict=True):
        assert same(destination, source.to(dtype))
        assert destination._version > version


def test_float32_copies_are_copies() -> None:
    sources = [*mixture(), torch.eye(3).to_sparse()]
    for copy, source in zip(foreach.float32_of(sources), sources, strict=True):
        wanted = source.detach().to(torch.float32, copy=True)
        assert copy.layout is wanted.layout
        assert not copy.requires_grad
        if copy.layout is torch.strided:
            assert same(copy, wanted)
            assert copy.stride() == wanted.stride()
            assert copy.numel() == 0 or copy.data_ptr() != source.data_ptr()
        else:
            assert same(copy.to_dense(), wanted.to_dense())


@torch.no_grad()
def test_products() -> None:
    factor = torch.tensor(0.3)
    ours, theirs = [[value.clone() for value in mixture()] for _ in range(2)]
    foreach.multiply_(ours, factor)
    for our, their in zip(ours, theirs, strict=True):
        assert same(our, their.mul_(factor))


@torch.no_grad()
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, math.inf])
def test_norms(norm_type: float) -> None:
    values = [value for value in mixture() if value.numel()]
    for found, value in zip(foreach.norms(values, norm_type), values, strict=True):
        assert same(found, torch.linalg.vector_norm(value, norm_type, dtype=torch.float32))
    assert foreach.norms([], 2.0) == []

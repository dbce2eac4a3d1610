"""Whether a parameter was written from outside since its master was rounded into it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep.optim import exchange

#: Sizes about those at which parameters are looked at in parts, and four elements together.
SIZES = (0, 1, 3, 4, 5, 64, 999, exchange._PART - 1, exchange._PART, exchange._PART + 1, 2 * exchange._PART + 6)


def by_elements(parameter: Tensor, master: Tensor) -> bool:
    """The obvious twin."""
    return bool((parameter != master.to(parameter.dtype)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_one_element_anywhere_is_seen(size: int, dtype: torch.dtype) -> None:
    master = torch.linspace(-2, 2, size)
    parameter = master.to(dtype)
    assert not exchange._differs(parameter, master)
    for place in {0, size // 2, size - 1} if size else ():
        changed = parameter.clone()
        changed.view(torch.int16)[place] += 1
        assert by_elements(changed, master)
        assert exchange._differs(changed, master)


@given(st.integers(0, 7), st.integers(0, 70), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 2**31))
def test_views_that_begin_anywhere(begin: int, size: int, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    master = torch.randn(begin + size, generator=random)[begin:]
    parameter = torch.empty(begin + size, dtype=dtype)[begin:]
    parameter.copy_(master)
    if size and seed % 2:
        parameter[seed % size] *= 1 + 2.0**-6
    assert exchange._differs(parameter, master) == by_elements(parameter, master)


def test_zeros_of_either_sign_are_equal() -> None:
    assert not exchange._differs(torch.tensor([0.0, -0.0, 1, 2]).half(), torch.tensor([-0.0, 0.0, 1, 2]))


@pytest.mark.parametrize("shape", [(6, 8), (3, 5)])
def test_parameters_in_another_order(shape: tuple[int, int]) -> None:
    master = torch.randn(shape)
    parameter = master.bfloat16().t().contiguous().t()
    assert not exchange._differs(parameter, master)
    parameter[1, 2] += 1
    assert exchange._differs(parameter, master)

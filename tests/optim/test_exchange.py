"""Masters that follow parameters which were written from outside: compiled and plain, the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from halfstep.optim.backends import native
from halfstep.optim.master_weights import exchange

HALVES = [torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "there")


def followed(parameter: Tensor, master: Tensor) -> Tensor:
    """The obvious twin: what the master must become."""
    return torch.where(parameter == master.to(parameter.dtype), master, parameter.float())


@pytest.fixture(params=["compiled", "plain"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "missing", lambda: "no compiler")
        monkeypatch.setattr(native, "_library", lambda: "no compiler")
    elif native.missing():
        pytest.skip(native.missing())


def check(parameter: Tensor, master: Tensor) -> None:
    expected = followed(parameter, master)
    exchange._follow([(parameter, master)])
    assert torch.equal(master.view(torch.int32), expected.view(torch.int32))


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [0, 1, 31, 1023, 1024, 1025, 65_535, 65_536, 65_537, 400_001])
def test_one_element_anywhere_is_followed(size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size)
    master = torch.randn(size, generator=draw)
    before = master.clone()
    parameter = master.to(dtype)
    exchange._follow([(parameter, master)])
    assert torch.equal(master, before)
    for place in {0, size // 2, size - 1} if size else ():
        parameter.view(torch.int16)[place] += 1
        check(parameter, master)
        assert (master != before).sum() == 1
        master.copy_(before)
        parameter.copy_(before)


@needs_library
@pytest.mark.parametrize("dtype", HALVES)
def test_every_parameter_beside_masters_around_it(dtype: torch.dtype) -> None:
    """All 2^16 halves, with FP32 numbers at and about the middles to their neighbours."""
    parameter = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    neighbours = (parameter.view(torch.int16) + 1).view(dtype)
    middle = ((parameter.double() + neighbours.double()) / 2).float()
    for master in (parameter.float(), neighbours.float(), middle, -parameter.float()):
        for distance in (-1, 0, 1):
            near = (master.view(torch.int32) + distance).view(torch.float32)
            expected = followed(parameter, near)
            native.follow([(parameter, near)])
            nan = expected.isnan() & near.isnan()  # which NaN a NaN is may differ
            assert torch.equal(near.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])


@pytest.mark.usefixtures("either")
def test_zeros_of_either_sign_are_equal() -> None:
    for half, low in ((0.0, -1e-41), (-0.0, 1e-41), (0.0, -0.0), (-0.0, 0.0)):
        check(torch.tensor([half]).bfloat16(), torch.tensor([low]))


@needs_library
@given(st.integers(0, 7), st.integers(0, 70), st.sampled_from(HALVES), st.integers(0, 2**31))
def test_views_that_begin_anywhere(begin: int, size: int, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    master = torch.randn(begin + size, generator=draw)
    parameter = master.to(dtype)
    if size and seed % 2:
        parameter[begin + seed % size] *= 1 + 2.0**-6
    outside = parameter[:begin].zero_(), master[:begin].clone()
    check(parameter[begin:], master[begin:])
    assert torch.equal(master[:begin], outside[1])


@pytest.mark.usefixtures("either")
def test_parameters_in_any_order() -> None:
    master = torch.randn(6, 8)
    for parameter in (
        master.bfloat16().t().contiguous().t(),  # another order than the master's
        torch.zeros(6, 16).bfloat16()[:, ::2],  # with gaps
        master.bfloat16(),
    ):
        parameter.copy_(master)
        parameter[1, 2] += 1
        check(parameter, master.clone())
    check(master.t().bfloat16() + 1, master.t())  # both in one order, neither contiguous


@needs_library
def test_several_pairs_on_several_threads() -> None:
    draw = torch.Generator().manual_seed(0)
    masters = [torch.randn(n, generator=draw) for n in (5, 0, 200_000, 1, 70_001, 0)]
    parameters = [m.to(HALVES[i % 2]) for i, m in enumerate(masters)]
    for parameter in parameters:
        parameter[1::97] += 1
    expected = [followed(p, m) for p, m in zip(parameters, masters, strict=True)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        native.follow(list(zip(parameters, masters, strict=True)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(m, e) for m, e in zip(masters, expected, strict=True))


@needs_library
@pytest.mark.parametrize(
    ("parameter", "master"),
    [
        (torch.zeros(3).bfloat16(), torch.zeros(4)),
        (torch.zeros(3).bfloat16(), torch.zeros(3).double()),
        (torch.zeros(6).bfloat16()[::2], torch.zeros(6)[::2]),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(3, 2).t()),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3).bfloat16().to("meta"), torch.zeros(3)),
        (torch.zeros(3).bfloat16(), torch.zeros(3, device="meta")),
    ],
    ids=["shape", "float64", "gaps", "order", "float32", "parameter elsewhere", "master elsewhere"],
)
def test_pairs_that_do_not_go_together_are_refused(parameter: Tensor, master: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"16-bit parameter and its float32|must be (bfloat16 or float16|float32) in the host's memory"
    ):
        native.follow([(parameter, master)])


@pytest.mark.parametrize("n", [0, 7, 700_000])
def test_gradients_of_masters_are_copies(n: int) -> None:
    """They are multiplied by what unscales and clips; the parameters' own stay as they are."""
    parameter = nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter])
    made = exchange.Exchange(optimizer, {parameter: torch.zeros(n)})
    parameter.grad = torch.ones(n, dtype=torch.bfloat16)
    made.pull_gradients([torch.tensor(0.5)])
    grad: Any = made.masters[parameter].grad
    assert grad.dtype is torch.float32
    assert bool((grad == 0.5).all())
    assert bool((parameter.grad == 1).all())


def test_large_sparse_gradients_of_masters() -> None:
    parameter = nn.Parameter(torch.zeros(70_000, 16, dtype=torch.bfloat16))
    made = exchange.Exchange(torch.optim.SparseAdam([parameter]), {parameter: torch.zeros(70_000, 16)})
    rows = torch.tensor([3, 69_999])
    torch.nn.functional.embedding(rows, parameter, sparse=True).sum().backward()
    made.pull_gradients([torch.tensor(0.5)])
    grad: Any = made.masters[parameter].grad
    assert grad.dtype is torch.float32
    assert grad.is_sparse
    assert torch.equal(grad.coalesce().indices()[0], rows)
    assert bool((grad.coalesce().values() == 0.5).all())

"""Optimizer state in huge pages: PyTorch's zeros in every respect but where they lie."""

from __future__ import annotations

import copy
import io
import mmap
import os
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfstep import optim
from halfstep.optim.pages import HUGE, Room, zeros_like

linux = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason="huge pages are asked for on Linux alone",
)


def is_asked_for(address: int) -> bool:
    """Whether the system knows that huge pages are wanted where a byte lies."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if borders := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(borders[1], 16) <= address < int(borders[2], 16)
        elif here and line.startswith("VmFlags"):
            return "hg" in line.split()
    raise LookupError(f"nothing is mapped at {address:#x}")


def resident(begin: int, end: int) -> int:
    """Bytes of a range of addresses that occupy memory."""
    first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as entries:
        entries.seek(8 * first)
        found = array("Q", entries.read(8 * (last - first)))
    return mmap.PAGESIZE * sum(entry >> 63 for entry in found)


PATTERNS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.ones(1024, 1025),
    "channels last": lambda: torch.ones(8, 16, 64, 200).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.ones(1500, 1024).t(),
    "with gaps": lambda: torch.ones(1024, 2050)[:, ::2],
    "small": lambda: torch.ones(7),
    "empty": lambda: torch.ones(0, 3),
    "without dimensions": lambda: torch.ones(()),
    "just a page": lambda: torch.ones(HUGE // 4),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(1024, 1024)),
    "meta": lambda: torch.ones(2048, 2048, device="meta"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("case", PATTERNS)
def test_it_is_what_torch_gives(case: str, dtype: torch.dtype) -> None:
    pattern = PATTERNS[case]()
    ours, theirs = zeros_like(pattern, dtype), torch.zeros_like(pattern, dtype=dtype, requires_grad=False)
    assert (ours.shape, ours.stride(), ours.dtype, ours.device) == (
        theirs.shape,
        theirs.stride(),
        theirs.dtype,
        theirs.device,
    )
    assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    assert ours.storage_offset() == 0
    assert not ours.requires_grad
    if ours.device.type != "meta":
        assert torch.equal(ours, theirs)
        ours.fill_(1)
        assert ours.double().sum() == ours.numel()


@linux
@pytest.mark.parametrize("numel", [HUGE // 4, HUGE // 4 + 1, 3 * HUGE // 4, 1_300_001])
def test_it_begins_at_a_huge_page_and_asks_for_whole_ones_only(numel: int) -> None:
    state = zeros_like(torch.ones(numel), torch.float32)
    begin, end = state.data_ptr(), state.data_ptr() + numel * 4
    assert begin % HUGE == 0
    border = begin + numel * 4 // HUGE * HUGE
    assert is_asked_for(begin)
    assert is_asked_for(border - 1)
    assert end == border or not is_asked_for(border)
    small = zeros_like(torch.ones(HUGE // 4 - 1), torch.float32)
    assert small.data_ptr() % HUGE != 0  # what malloc gives lies behind a header


@linux
def test_memory_is_occupied_where_it_is_written() -> None:
    size = 3 * HUGE // 2
    states = [zeros_like(torch.ones(size // 4), torch.float32) for _ in range(4)]
    assert [resident(state.data_ptr(), state.data_ptr() + size) for state in states] == [0, 0, 0, 0]
    for state in states:
        state.fill_(1)
    assert [resident(state.data_ptr(), state.data_ptr() + size) for state in states] == [size] * 4


@linux
def test_memory_goes_back_with_the_last_tensor() -> None:
    state = zeros_like(torch.ones(HUGE), torch.float32).fill_(1)
    address, view = state.data_ptr(), state[HUGE // 2 :]
    del state
    assert float(view.sum()) == HUGE // 2
    assert resident(address, address + 4 * HUGE) == 4 * HUGE
    del view
    assert resident(address, address + 4 * HUGE) == 0


@linux
def test_where_the_system_has_none_torch_gives_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr("halfstep.optim.pages.mmap.mmap", Refusing)
    state = zeros_like(torch.ones(1024, 1024), torch.float32)
    assert state.sum() == 0
    assert state.data_ptr() % HUGE != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_copies_in_one_piece_of_memory_are_what_pytorch_copies(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    patterns = [make() for name, make in PATTERNS.items() if name != "meta"]
    given = [torch.empty_strided(p.shape, p.stride(), dtype=dtype) for p in patterns]
    for tensor in given:
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    given.append(torch.ones(3, dtype=dtype).expand(600_000, 3))
    given.append(torch.eye(900, dtype=dtype).to_sparse())
    before = [t.clone() for t in given]
    copies = Room().float32_of(given)
    for tensor, copied in zip(given, copies, strict=True):
        expected = tensor.float()
        assert copied.dtype is torch.float32 and not copied.requires_grad
        assert copied.shape == tensor.shape and copied.layout is tensor.layout
        if not tensor.is_sparse:
            assert copied.stride() == tensor.to(torch.float32, copy=True).stride()
        assert torch.equal(copied.to_dense(), expected.to_dense())
    for copied in copies:
        copied.mul_(0)  # into nobody else's elements
    assert all(torch.equal(t.to_dense(), b.to_dense()) for t, b in zip(given, before, strict=True))


def test_copies_do_not_overlap() -> None:
    copies = Room().float32_of([torch.full((n,), float(n)).bfloat16() for n in (1, 0, 15, 16, 17, HUGE // 4, 33)])
    for number, copied in enumerate(copies):
        copied.fill_(number)
    assert [copied.unique().tolist() for copied in copies] == [[0.0], [], [2.0], [3.0], [4.0], [5.0], [6.0]]
    assert all(copied.data_ptr() % 64 == 0 for copied in copies if copied.numel() >= HUGE // 4)


def test_copies_of_nothing() -> None:
    assert Room().float32_of([]) == []


@linux
def test_copies_take_huge_pages_and_give_them_back() -> None:
    room = Room()
    copies = room.float32_of([torch.ones(HUGE // 4).half() for _ in range(4)])
    address = copies[0].data_ptr()
    assert address % HUGE == 0
    assert is_asked_for(address)
    assert resident(address, address + 4 * HUGE) == 4 * HUGE
    del copies, room
    assert resident(address, address + 4 * HUGE) == 0


@linux
def test_what_was_lent_is_used_again() -> None:
    room = Room()
    given = [torch.randn(HUGE // 4).half(), torch.randn(17).half()]
    copies = room.float32_of(given)
    address = copies[0].data_ptr()
    copies.clear()
    for _ in range(3):
        room.lend()
        copies = room.float32_of(given)
        assert copies[0].data_ptr() == address
        assert all(torch.equal(copied, tensor.float()) for copied, tensor in zip(copies, given, strict=True))
        copies.clear()
    room.lend()
    others = room.float32_of([torch.ones(HUGE // 2).half()])  # of another size
    assert bool((others[0] == 1).all())


@linux
def test_what_somebody_holds_is_never_lent_nor_written() -> None:
    room = Room()
    held = room.float32_of([torch.ones(HUGE // 4).half()])[0][5:]
    room.lend()
    again = room.float32_of([torch.zeros(HUGE // 4).half()])
    assert bool((held == 1).all())
    assert room.float32_of([torch.full((HUGE // 4,), 2.0)])[0][0] == 2  # without lending in between
    assert bool((again[0] == 0).all())
    assert bool((held == 1).all())


@linux
def test_a_system_that_takes_no_loans_gets_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("halfstep.optim.pages.mmap.MADV_FREE")
    room = Room()
    copies = room.float32_of([torch.ones(HUGE // 4).half()])
    address = copies[0].data_ptr()
    del copies
    room.lend()
    assert resident(address, address + HUGE) == 0


@linux
def test_masters_gradients_that_a_script_keeps_stay_what_they_were() -> None:
    parameter = torch.nn.Parameter(torch.zeros(HUGE // 4, dtype=torch.bfloat16))
    optimizer = optim.MasterWeights(torch.optim.SGD([parameter], lr=0.5))
    kept = []
    for value in (1.0, 2.0, 3.0):
        parameter.grad = torch.full_like(parameter, value)
        with optimizer.exchanged():
            kept.append(optimizer.param_groups[0]["params"][0].grad)
        optimizer.step()
    assert [tensor.unique().tolist() for tensor in kept] == [[1.0], [2.0], [3.0]]
    assert bool((optimizer.of(parameter) == -3).all())


def a_step(weight: Tensor) -> tuple[torch.nn.Parameter, optim.AdamW]:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = optim.AdamW([parameter], lr=1e-2)
    parameter.grad = torch.linspace(-1, 1, weight.numel()).to(weight.dtype).view_as(weight)
    optimizer.step()
    return parameter, optimizer


def test_optimizers_keep_their_state_there_and_hand_it_on() -> None:
    parameter, optimizer = a_step(torch.linspace(-1, 1, 1 << 20).bfloat16().view(1024, 1024))
    state = optimizer.state[parameter]
    if not linux.args[0]:
        assert all(state[name].data_ptr() % HUGE == 0 for name in ("exp_avg", "exp_avg_sq", "remainder"))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < 10 * (1 << 20) + 100_000  # 4 + 4 + 2 bytes each: no room around them is saved
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["state"][0]
    copied = copy.deepcopy(optimizer).state_dict()["state"][0]
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(loaded[name], value), name
        assert torch.equal(copied[name], value), name
        assert loaded[name].data_ptr() != value.data_ptr() != copied[name].data_ptr()
    shared = state["exp_avg"].clone()
    assert torch.equal(state["exp_avg"].share_memory_(), shared)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_copy_of_its_own() -> None:
    state = zeros_like(torch.ones(1024, 1024), torch.float32)
    child = os.fork()
    if child == 0:  # pragma: no cover
        state[0, 0] = 1  # one element: torch's threads did not come along
        os._exit(0 if state[0, 0].item() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert state.sum() == 0

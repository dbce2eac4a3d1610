"""Memory for what an optimizer keeps on the CPU, in huge pages where the system has them.

A step goes once through every byte of the state. In pages of 4 KiB it meets a new page every thousand elements in each
of five arrays, and the processor starts anew at each: address translation, and its reading ahead, which ends with a
page. Pages of 2 MiB save a twentieth of a step (`benchmarks/optimizers.py`). Linux gives them out by itself only
where its administrator set ``transparent_hugepage/enabled`` to ``always``; many distributions set ``madvise``, where a
program has to ask.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from halfstep.optim import foreach
from halfstep.optim.layout import is_plain

#: Bytes of a huge page on x86-64, and on arm64 with pages of 4 KiB.
HUGE = 2 << 20


def zeros_like(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape, order and sharding of ``pattern``, without a gradient.

    Of 2 MiB and more in the host's memory they begin at a huge page, and as many whole ones as fit are asked for: no
    byte more is occupied than otherwise. Anything else is PyTorch's own.
    """
    size = pattern.numel() * dtype.itemsize
    if size >= HUGE and is_plain(pattern) and (new := _map(size)) is not None:
        return new.tensor(dtype).as_strided(pattern.shape, pattern.stride())
    return torch.zeros_like(pattern, dtype=dtype, requires_grad=False)


class Room:
    """Memory for FP32 copies that are needed for a while at every step; between steps the system may have it back.

    Given back and taken anew each time, it would have to be cleared and mapped, which takes longer than the copying,
    and many times longer where several threads ask on a virtual machine. So it is kept, and lent: marked with
    ``MADV_FREE``, it goes to whoever asks when the system is short of memory, and else costs nothing to use again.
    """

    def __init__(self) -> None:
        self._mapped: _Mapped | None = None

    def float32_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies in FP32, without gradients; those in the host's memory lie in one piece of it.

        Of less than 2 MiB together, or elsewhere, they are PyTorch's own.
        """
        size = sum(_whole_lines(tensor) for tensor in tensors if is_plain(tensor)) * torch.float32.itemsize
        if self._mapped is None or self._mapped.size != size or self._mapped.is_in_use():
            self._mapped = _map(size) if size >= HUGE else None
        if self._mapped is None:
            return foreach.float32_of(tensors)
        rest = self._mapped.tensor(torch.float32)
        copies = []
        for tensor in tensors:
            if is_plain(tensor):
                copy = rest.as_strided(tensor.shape, tensor.stride(), rest.storage_offset()).copy_(tensor.detach())
                rest = rest[_whole_lines(tensor) :]
            else:
                copy = tensor.detach().to(torch.float32, copy=True)
            copies.append(copy)
        return copies

    def lend(self) -> None:
        """Nobody needs the copies any more, until the next; where somebody holds one, they stay theirs for good."""
        if self._mapped is not None and (self._mapped.is_in_use() or not self._mapped.lend()):
            self._mapped = None


def _whole_lines(tensor: Tensor) -> int:
    """FP32 elements that it takes, up to the next line of a cache (64 bytes)."""
    return -(-tensor.numel() // 16) * 16


class _Mapped:
    """Zeros of the system, ``size`` bytes from ``begin`` on; given back with the last tensor that lies in them."""

    def __init__(self, memory: mmap.mmap, begin: int, size: int) -> None:
        self._memory, self._begin, self.size = memory, begin, size

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self._memory, dtype=dtype, count=self.size // dtype.itemsize, offset=self._begin)

    def is_in_use(self) -> bool:
        """Whether tensors lie in it: each storage holds the mapping, besides this object and the question itself."""
        return sys.getrefcount(self._memory) > 2

    def lend(self) -> bool:
        """Let the system take the pages, without their content, when it needs them; False where it knows of no such."""
        try:
            self._memory.madvise(mmap.MADV_FREE, self._begin, self.size // mmap.PAGESIZE * mmap.PAGESIZE)
        except (AttributeError, OSError):
            return False
        return True


def _map(size: int) -> _Mapped | None:
    """So many bytes in huge pages; None where the system has none.

    What is mapped and never touched takes no memory. Private: a forked process gets its own copy, as of all memory.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
        whole = size // HUGE * HUGE
        memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
        memory.madvise(mmap.MADV_NOHUGEPAGE, begin + whole, size + HUGE - begin - whole)  # where all get them unasked
    except OSError:  # a kernel built without, or a limit on address space, of which PyTorch's allocator says the rest
        return None
    return _Mapped(memory, begin, size)

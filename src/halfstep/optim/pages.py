"""Memory for what an optimizer keeps on the CPU, in huge pages where the system has them.

A step goes once through every byte of the state. In pages of 4 KiB it meets a new page every thousand elements in each
of five arrays, and the processor starts anew at each: address translation, and its reading ahead, which ends with a
page. Pages of 2 MiB save a twentieth of a step (`benchmarks/optimizers.py`). Linux gives them out by itself only
where its administrator set ``transparent_hugepage/enabled`` to ``always``; many distributions set ``madvise``, where a
program has to ask.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from halfstep.optim.layout import is_plain

#: Bytes of a huge page on x86-64, and on arm64 with pages of 4 KiB.
HUGE = 2 << 20


def zeros_like(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape, order and sharding of ``pattern``, without a gradient.

    Of 2 MiB and more in the host's memory they begin at a huge page, and as many whole ones as fit are asked for: no
    byte more is occupied than otherwise. Anything else is PyTorch's own.
    """
    new = _in_huge_pages(pattern, dtype)
    return torch.zeros_like(pattern, dtype=dtype, requires_grad=False) if new is None else new


def float32_of(tensor: Tensor) -> Tensor:
    """A copy in FP32, without a gradient, in memory as of `zeros_like`.

    Large memory that is taken and given back at every step is the system's to find and clear anew each time, which
    takes longer than the copying; in huge pages half as long.
    """
    new = _in_huge_pages(tensor, torch.float32)
    return tensor.detach().to(torch.float32, copy=True) if new is None else new.copy_(tensor.detach())


def _in_huge_pages(pattern: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The zeros of `zeros_like`, or None where they are PyTorch's own."""
    size = pattern.numel() * dtype.itemsize
    if size < HUGE or not is_plain(pattern) or (found := _memory(size)) is None:
        return None
    memory, begin = found
    flat = torch.frombuffer(memory, dtype=dtype, count=pattern.numel(), offset=begin)
    return flat.as_strided(pattern.shape, pattern.stride())


def _memory(size: int) -> tuple[mmap.mmap, int] | None:
    """Zeros of the system and where in them ``size`` bytes begin; None where it has no huge pages.

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
    return memory, begin

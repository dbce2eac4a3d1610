"""Memory for optimizer state on the CPU, in huge pages where the system has them.

A step goes once through every byte of the state. In pages of 4 KiB it meets a new page every thousand elements in each
of five arrays, and the processor starts anew at each: address translation, and its reading ahead, which ends with a
page. Pages of 2 MiB save a twentieth of a step (`benchmarks/optimizers.py`). Linux gives them out by itself only
where its administrator set ``transparent_hugepage/enabled`` to ``always``; many distributions set ``madvise``, where a
program has to ask.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

from halfstep.optim.layout import is_dense

#: Bytes of a huge page on x86-64, and on arm64 with pages of 4 KiB.
HUGE = 2 << 20


def zeros_like(pattern: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape, order and sharding of ``pattern``, without a gradient.

    Of 2 MiB and more in the host's memory they begin at a huge page, and as many whole ones as fit are asked for: no
    byte more is occupied than otherwise. Anything else is PyTorch's own.
    """
    size = pattern.numel() * dtype.itemsize
    plain = type(pattern) in (Tensor, nn.Parameter) and pattern.device.type == "cpu" and is_dense(pattern)
    if plain and size >= HUGE and (found := _memory(size)) is not None:
        memory, begin = found
        flat = torch.frombuffer(memory, dtype=dtype, count=pattern.numel(), offset=begin)
        return flat.as_strided(pattern.shape, pattern.stride())
    return torch.zeros_like(pattern, dtype=dtype, requires_grad=False)


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

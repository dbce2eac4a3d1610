"""Memory for what an optimizer keeps on the CPU, in huge pages where the system has them.

A step goes once through every byte of the state. In pages of 4 KiB it meets a new page every thousand elements in each
of five arrays, and the processor starts anew at each: address translation, and its reading ahead, which ends with a
page. Pages of 2 MiB save a twentieth of a step (`benchmarks/optimizers.py`). Linux gives them out by itself only
where its administrator set ``transparent_hugepage/enabled`` to ``always``; many distributions set ``madvise``, where a
program has to ask.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

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
    size = pattern.numel() * dtype.itemsize
    if size >= HUGE and is_plain(pattern) and (memory := _memory(size)) is not None:
        return memory.view(dtype).as_strided(pattern.shape, pattern.stride())
    return torch.zeros_like(pattern, dtype=dtype, requires_grad=False)


def float32_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in FP32, without gradients; those in the host's memory lie in one piece of it, freed with the last.

    What is taken and given back at every step the system has to find, clear and take away anew each time, which costs
    more than the copying: in huge pages, and all at once, a fraction of that.
    """
    plain = [tensor for tensor in tensors if is_plain(tensor)]
    size = sum(_whole_lines(tensor) for tensor in plain) * torch.float32.itemsize
    memory = _memory(size) if size >= HUGE else None
    if memory is None:
        return [tensor.detach().to(torch.float32, copy=True) for tensor in tensors]
    rest = memory.view(torch.float32)
    copies = []
    for tensor in tensors:
        if is_plain(tensor):
            copy = rest.as_strided(tensor.shape, tensor.stride(), rest.storage_offset()).copy_(tensor.detach())
            rest = rest[_whole_lines(tensor) :]
        else:
            copy = tensor.detach().to(torch.float32, copy=True)
        copies.append(copy)
    return copies


def _whole_lines(tensor: Tensor) -> int:
    """FP32 elements that it takes, up to the next line of a cache (64 bytes)."""
    return -(-tensor.numel() // 16) * 16


def _memory(size: int) -> Tensor | None:
    """So many bytes of zeros in huge pages of the system; None where it has none.

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
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin)

"""Tensors of any shape, layout and sharding as flat ones in memory order, which is all that backends see."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.split import SplitTensor

#: Types whose elements are where they say.
PLAIN: tuple[type, ...] = (Tensor, nn.Parameter)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded (DTensor) tensor, sharing memory; any other tensor as it is."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def memory_of(tensor: Tensor) -> Tensor:
    """The tensor that holds this rank's part in memory: of one that is stored in planes, the upper plane."""
    part = local(tensor)
    return part.hi if isinstance(part, SplitTensor) else part


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, asked without importing the distributed packages."""
    return hasattr(tensor, "to_local")


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a piece of memory without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def is_plain(tensor: Tensor, device_type: str = "cpu") -> bool:
    """Whether the elements lie in such memory, without gaps, and nowhere else: no subclass decides otherwise."""
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided
    return plain and tensor.device.type == device_type and is_dense(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order: a view (n,)."""
    tensor = tensor.detach()
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """``tensor`` in the memory order of the dense ``pattern`` of the same shape; itself where it has that already."""
    if tensor.stride() == pattern.stride():
        return tensor
    return torch.empty_strided(pattern.shape, pattern.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def shards_first_dimension(tensor: Tensor) -> bool:
    """Whether a DTensor is whole or sharded along its first dimension, on every dimension of its mesh."""
    placements: Any = tensor.placements  # type: ignore[attr-defined]  # DTensor's
    return all(p.is_replicate() or p.is_shard(0) for p in placements)


def first_element(tensor: Tensor) -> int:
    """Where this rank's part begins in the whole of a tensor sharded along its first dimension; 0 for any other."""
    if not is_sharded(tensor) or not shards_first_dimension(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    _, offset = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    return int(offset[0]) * math.prod(tensor.shape[1:]) if offset else 0


def sharded_like(part: Tensor, pattern: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A DTensor of global ``shape`` from this rank's contiguous ``part``, placed as the DTensor ``pattern``."""
    from torch.distributed.tensor import DTensor

    stride = [1] * len(shape)
    for index in range(len(shape) - 2, -1, -1):
        stride[index] = stride[index + 1] * max(shape[index + 1], 1)
    mesh, placements = pattern.device_mesh, pattern.placements  # type: ignore[attr-defined]  # DTensor's
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))

"""What of a tensor's memory is stored: all that the state sees of it, once, and little that it does not see.

torch.save writes the whole storage of a tensor, of which a view may see little: one row of a table of gigabytes writes
gigabytes. A storage is written as it is, without a copy, if the state sees at least half of it, so that copies never
need more than half of the memory that the state already keeps alive. Of other storages, each part that is seen is
copied, once for all tensors that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfstep.checkpoint.error import CheckpointError
from halfstep.split import PlainCopies, SplitTensor


@dataclass(frozen=True)
class _View:
    """A tensor of the state as a view of its storage: the bytes that it sees lie in [first, last)."""

    identity: int
    place: str
    tensor: Tensor  #: detached: without graph, hooks and Python attributes
    first: int
    last: int

    @property
    def geometry(self) -> tuple[torch.Size, tuple[int, ...], int | torch.SymInt]:
        return self.tensor.size(), self.tensor.stride(), self.tensor.storage_offset()


def without_unseen(tensors: dict[int, tuple[str, Tensor]]) -> dict[int, Tensor]:
    """What to store for each tensor of ``tensors`` (place and tensor by identity), by identity."""
    stored: dict[int, Tensor] = {}
    of_storage: dict[int, list[_View]] = {}
    copies = PlainCopies()
    for identity, (place, tensor) in tensors.items():
        plain = copies.of(tensor) if isinstance(tensor, SplitTensor) else tensor.detach().resolve_conj().resolve_neg()
        if plain.numel() == 0:
            stored[identity] = torch.empty_strided(plain.size(), plain.stride(), dtype=plain.dtype, device=plain.device)
            continue
        elements = 1 + sum((size - 1) * step for size, step in zip(plain.size(), plain.stride(), strict=True))
        first = int(plain.storage_offset()) * plain.itemsize
        view = _View(identity, place, plain, first, first + elements * plain.itemsize)
        if view.last > plain.untyped_storage().nbytes():
            raise CheckpointError(
                f"{place} needs {view.last} bytes of memory, and {plain.untyped_storage().nbytes()} are left: its "
                "memory was released, as sharded training does. Gather the full parameters before taking the state"
            )
        of_storage.setdefault(plain.untyped_storage()._cdata, []).append(view)
    for views in of_storage.values():
        stored.update(_parts(views))
    for identity, (_, tensor) in tensors.items():
        if isinstance(tensor, nn.Parameter):
            stored[identity] = nn.Parameter(stored[identity], tensor.requires_grad)
        else:
            stored[identity].requires_grad_(tensor.requires_grad)
    return stored


def _parts(views: list[_View]) -> dict[int, Tensor]:
    """The views of one storage: on it where they see most of it, else on copies of what they see."""
    overlapping: list[list[_View]] = []
    for view in sorted(views, key=lambda view: view.first):
        if overlapping and view.first < max(other.last for other in overlapping[-1]):
            overlapping[-1].append(view)
        else:
            overlapping.append([view])
    one_dtype = len({view.tensor.dtype for view in views}) == 1
    size = views[0].tensor.untyped_storage().nbytes()
    if one_dtype and size % views[0].tensor.itemsize == 0 and 2 * sum(map(_bytes_needed, overlapping)) >= size:
        return {view.identity: view.tensor for view in views}
    return {identity: tensor for group in overlapping for identity, tensor in _copied(group).items()}


def _bytes_needed(group: list[_View]) -> int:
    """Bytes to store overlapping views: all from the first to the last, or the elements of a single one with gaps."""
    span = max(view.last for view in group) - group[0].first
    if len({view.geometry for view in group}) == 1:
        return min(span, group[0].tensor.nbytes)
    return span


def _copied(group: list[_View]) -> dict[int, Tensor]:
    first, tensor = group[0], group[0].tensor
    for view in group:
        if view.tensor.dtype is not tensor.dtype:
            raise CheckpointError(
                f"{first.place} ({tensor.dtype}) and {view.place} ({view.tensor.dtype}) are views of the same memory "
                "in two formats, which the file cannot keep: store one of them, or a clone() of the other"
            )
    span = max(view.last for view in group) - first.first
    if _bytes_needed(group) < span:
        copy = tensor.clone(memory_format=torch.preserve_format)  # the order of its dimensions in memory
        return {view.identity: copy.detach() for view in group}
    copy = tensor.as_strided((span // tensor.itemsize,), (1,), first.first // tensor.itemsize).clone()
    return {
        view.identity: copy.as_strided(
            view.tensor.size(), view.tensor.stride(), (view.first - first.first) // tensor.itemsize
        )
        for view in group
    }

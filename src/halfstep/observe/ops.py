"""`OpObserver`: one dispatch mode that records the numbers of every op, forward, backward and optimizer.

    with OpObserver("profile", policy) as observer:
        train_step()
    observer.profile            # -> Profile

Two levels. "scan" takes the exact largest magnitude of each result and the exponent histogram of a sample: cheap enough
to run every so many steps. "profile" counts every element of forward and backward results: one FP32 step of it predicts
what a 16-bit format would do. No format is predicted from an optimizer's results, which are many and as large as the
model: "profile" samples them, "scan" keeps their largest magnitudes only, and their histograms are empty.

Largest magnitudes and counts stay on their device until they are asked for: no op is waited for. An op's inputs are
mostly results of earlier ops, so how large they were is known already: a storage remembers the number of the result
that was last written to it. Only parameters and data are measured when they are first read. (An address that is freed
and given to data made outside of ops keeps its old number: `OpRecord.operand_amax` may then be that of the earlier
tensor.)

Not recorded: views and other results that share an input's memory without writing to it, tensors filled with constants
or not at all, sparse and integer ones.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from halfstep.observe.attribution import Attribution, remember
from halfstep.observe.histogram import ExponentHistogram, count
from halfstep.observe.low_tags import LowTags
from halfstep.observe.lowering import Composites, only_first
from halfstep.observe.place import Place
from halfstep.observe.profile import OpRecord, Profile, larger
from halfstep.policy import Policy
from halfstep.split import parts

__all__ = ["Level", "OpObserver", "OpRecord", "Profile"]

Level = Literal["scan", "profile"]

_SAMPLE = 1 << 14  #: elements of a sampled histogram: shares are good to half a percent of the whole
_SAMPLE_OF_UPDATES = 1 << 12
_UNREAD = 2048  #: results whose largest magnitude is left on the device before all are fetched at once
#: Fresh tensors that no arithmetic made: uninitialised, or one constant throughout.
_FILLED = ("empty", "zeros", "ones", "full", "fill_", "zero_", "scalar_tensor")


class _Unread(NamedTuple):
    """A result whose smallest and largest element are still on the device."""

    number: int
    ends: tuple[Tensor, Tensor]
    tally: _Tally | None
    inputs: tuple[int, ...]


class _Tally:
    """An `OpRecord` in the making."""

    __slots__ = ("amax", "calls", "counts", "elements", "growth", "lowered", "operand_amax")

    def __init__(self) -> None:
        self.calls = self.elements = 0
        self.counts: dict[torch.device, Tensor] = {}  # as `histogram.count` gives them
        self.lowered = False
        self.amax = self.operand_amax = self.growth = None  # type: float | None

    def add(self, counts: Tensor) -> None:
        known = self.counts.get(counts.device)
        self.counts[counts.device] = counts if known is None else known + counts

    def record(self, place: Place, dtype: str, counts: Iterable[Tensor]) -> OpRecord:
        """Its `counts`, brought to the host, are given."""
        histogram = ExponentHistogram.merge(map(ExponentHistogram.from_counts, counts))
        amax = 0.0 if self.amax is None else self.amax
        values = (self.calls, self.elements, amax, self.lowered, histogram, self.operand_amax, self.growth)
        return OpRecord(place, dtype, *values)


class OpObserver(TorchDispatchMode):
    """Records what every op computes; see the module.

    Args:
        level: ``"scan"`` or ``"profile"``.
        policy: whose rules say which results would be in 16 bits (`OpRecord.lowered`); without one, none.
        attribution: one that others use too; else one of its own.

    Attributes:
        failures: exceptions inside, one line each; they never reach the run.

    Raises:
        ValueError: no such level.
    """

    def __init__(self, level: Level, policy: Policy | None = None, attribution: Attribution | None = None) -> None:
        if level not in ("scan", "profile"):
            raise ValueError(f"ops are observed at level 'scan' or 'profile', not {level!r}")
        super().__init__()  # type: ignore[no-untyped-call]  # torch lacks annotations here
        self.level = level
        self.attribution = Attribution() if attribution is None else attribution
        self.failures = self.attribution.failures
        self._tags = None if policy is None else LowTags(policy, self.attribution)
        self._composites = None if policy is None else Composites()
        self._tallies: dict[tuple[Place, torch.dtype], _Tally] = {}
        self._amax = array("d")  # by number of result; -1: of nothing
        self._number: dict[int, int] = {}  # address of a storage -> the result last written to it
        self._unread: dict[tuple[torch.device, torch.dtype], list[_Unread]] = {}
        self._unread_count = 0
        self._gradients: dict[str, Tensor] = {}  # counts, as those of a tally
        self._accumulated: dict[str, Tensor] = {}  # of the step under way
        self._step = 1
        self._hooked: dict[int, Any] = {}
        self._hooked_roots = 0

    def __enter__(self) -> OpObserver:
        self.attribution.__enter__()
        if self._composites is not None:
            self._composites.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._composites is not None:
            self._composites.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self.attribution.__exit__(kind, error, trace)
        for hook in self._hooked.values():
            hook.remove()
        self._hooked, self._hooked_roots = {}, 0

    @property
    def profile(self) -> Profile:
        """All that was seen so far; waits for the devices."""
        with _disable_current_modes():
            self._read()
            gradients = dict(self._gradients)
            _add_up(gradients, self._accumulated)
            rows = [row for tally in self._tallies.values() for row in tally.counts.values()]
            fetched = iter(_fetched([*rows, *gradients.values()]))
            records = {
                (place, str(dtype)): tally.record(place, str(dtype), [next(fetched) for _ in tally.counts])
                for (place, dtype), tally in self._tallies.items()
            }
        return Profile(records, {name: ExponentHistogram.from_counts(next(fetched)) for name in gradients})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = self.attribution.place(func, args)
        result = func(*args, **kwargs)
        try:
            if place.phase == "backward":
                self._follow_gradients()
            lowered = self._tags is not None and self._tags.see(func, args, kwargs, result, place.phase)
            if _kind(func) != "skipped":
                self._see(func, args, kwargs, result, place, lowered)
            elif "empty" in place.op:  # memory of an earlier tensor: what that held is not what this one does
                for x in _tensors((result,)):
                    self._number.pop(_address(x), None)
        except Exception as error:
            remember(self.failures, f"observing {place.op}", error)
        return result

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any, place: Place, lowered: bool) -> None:
        inputs = _tensors((args, kwargs))
        kind = _kind(func)
        if kind == "writes, returns nothing":
            outputs = [x for x in _tensors([args[i] for i in _written(func) if i < len(args)]) if _is_dense(x)]
        else:
            outputs = [x for x in _tensors((result,)) if _is_dense(x)]
            if kind == "statistics follow":
                outputs = outputs[:1]
        if not outputs:
            return
        read = tuple([self._number_of(x) for x in inputs if _is_dense(x)]) if place.phase == "forward" else ()
        addresses = () if kind.startswith("writes") else {_address(x) for x in inputs}
        tally = None
        for output in outputs:
            output = _dense(output)
            address = _address(output)
            if address in addresses:  # a view, though the op's schema does not say so
                continue
            key = (place, output.dtype)
            tally = self._tallies.get(key)
            if tally is None:
                tally = self._tallies[key] = _Tally()
            tally.elements += output.numel()
            tally.lowered = tally.lowered or lowered
            self._number[address] = self._measure(output, tally, read)
            if place.phase != "optimizer":
                tally.add(count(output, None if self.level == "profile" else _SAMPLE))
            elif self.level == "profile":
                tally.add(count(output, _SAMPLE_OF_UPDATES))
        if tally is not None:
            tally.calls += 1

    def _number_of(self, x: Tensor) -> int:
        """The result that a tensor holds; what no op has made is measured now."""
        x = _dense(x)
        address = _address(x)
        number = self._number.get(address)
        if number is None:
            number = self._number[address] = self._measure(x, None, ())
        return number

    def _measure(self, x: Tensor, tally: _Tally | None, inputs: tuple[int, ...]) -> int:
        number = len(self._amax)
        self._amax.append(-1.0)
        if x.numel():
            values = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
            if values.dtype.itemsize < 2:  # 8-bit formats have no kernels for this
                values = values.float()
            low, high = torch.aminmax(values.detach())
            self._unread.setdefault((x.device, low.dtype), []).append(_Unread(number, (low, high), tally, inputs))
            self._unread_count += 1
            if self._unread_count >= _UNREAD:
                self._read()
        return number

    def _read(self) -> None:
        """Fetch what is still on the devices, and book it."""
        unread, self._unread, self._unread_count = self._unread, {}, 0
        for waiting in unread.values():
            ends = torch.stack([end for entry in waiting for end in entry.ends]).double().tolist()
            for entry, low, high in zip(waiting, ends[::2], ends[1::2], strict=True):
                self._amax[entry.number] = max(abs(low), abs(high))  # with a NaN anywhere, both are NaN
        for waiting in unread.values():
            for entry in waiting:
                tally = entry.tally
                if tally is None:
                    continue
                amax, operands = self._amax[entry.number], None
                for number in entry.inputs:
                    operands = larger(operands, self._amax[number] if self._amax[number] != -1.0 else None)
                tally.amax = larger(tally.amax, amax)
                tally.operand_amax = larger(tally.operand_amax, operands)
                if operands and math.isfinite(operands):
                    tally.growth = larger(tally.growth, amax / operands)

    def _follow_gradients(self) -> None:
        """See the gradients of all parameters of the modules called so far, as they are accumulated."""
        roots = self.attribution.roots
        if len(roots) == self._hooked_roots:
            return
        self._hooked_roots = len(roots)
        for root in roots:
            for parameter in root.parameters():
                if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._hooked:
                    hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._accumulates
                    )
                    self._hooked[id(parameter)] = hook

    def _accumulates(self, parameter: Tensor) -> None:
        try:
            name = self.attribution.parameter_name(parameter)
            if name is None or parameter.grad is None or not _is_dense(parameter.grad):
                return
            if self._step != self.attribution.step:
                self._step = self.attribution.step
                _add_up(self._gradients, self._accumulated)
                self._accumulated = {}
            with _disable_current_modes():
                sample = None if self.level == "profile" else _SAMPLE
                # Of several backward passes before one step, the last sees the sum.
                self._accumulated[name] = count(_dense(parameter.grad), sample)
        except Exception as error:
            remember(self.failures, "observing a gradient", error)


def _add_up(sums: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    for name, row in new.items():
        sums[name] = sums[name].to(row.device) + row if name in sums else row


def _fetched(rows: Sequence[Tensor]) -> list[Tensor]:
    """All rows on the host, waiting once for each device."""
    found = list(rows)
    away: dict[torch.device, list[int]] = {}
    for index, row in enumerate(rows):
        if row.device.type != "cpu":
            away.setdefault(row.device, []).append(index)
    for indices in away.values():
        for index, row in zip(indices, torch.stack([rows[i] for i in indices]).cpu(), strict=True):
            found[index] = row
    return found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among an op's arguments or results; PyTorch's own tree functions took most of the time here."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _is_dense(x: Tensor) -> bool:
    return (
        (x.is_floating_point() or x.is_complex())
        and not isinstance(x, FakeTensor)
        and x.layout is torch.strided
        and x.device.type != "meta"
    )


def _dense(x: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; any other tensor itself."""
    local = getattr(x, "_local_tensor", None)
    return x if local is None else local


def _address(x: Tensor) -> int:
    try:
        return int(parts(_dense(x))[0].untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass without a storage of its own
        return id(x)


@functools.cache
def _kind(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return "computes"
    name = schema.name.rpartition("::")[2]
    if func.is_view or name.removeprefix("new_").removeprefix("_").startswith(_FILLED):
        return "skipped"
    if schema.is_mutable:
        return "writes" if schema.returns else "writes, returns nothing"
    return "statistics follow" if only_first(func) else "computes"


@functools.cache
def _written(func: Any) -> tuple[int, ...]:
    """Which arguments an op writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple(i for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)

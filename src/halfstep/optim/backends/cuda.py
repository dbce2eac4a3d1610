"""The backend for CUDA devices: Triton kernels that step many tensors in one launch.

`update` launches `halfstep.optim.backends.triton_kernels.prepare` once, and one kernel for each combination of dtypes
among the jobs, over a table of addresses. The host only compares addresses with those of the last call: where they
changed (new gradients), the table goes to the device again, in one copy that nothing waits for. Everything else a step
depends on is read by the kernels: step counts, the coefficient, the flag for a skip, a learning rate that is a tensor
on the device. So nothing keeps steps from being captured in a CUDA graph; what a capture copies from is kept for its
replays.

Triton is imported at the first call: torch's builds for CUDA bring it. With ``TRITON_INTERPRET=1`` in the environment
the kernels run on tensors in the host's memory, slowly, which is how they are tested without a device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfstep.optim import dither
from halfstep.optim.moments import GROUP
from halfstep.optim.rules import SGD, Adam, Rule
from halfstep.optim.update import Arrival, Job, Survey
from halfstep.transaction import to_the_end

if TYPE_CHECKING:
    from halfstep.optim.arrivals import Tally

name = "triton"

#: Groups of 64 elements in a tile (1024: 8 for each thread), and tiles in a chunk, which one program works off.
GROUPS = 16
TILES = 8
#: How many tables are kept: there is one for each list of parameters that is stepped together.
TABLES = 4096
_ALIGNMENT = 16
_PREPARED = 128  # jobs that one program of `prepare` counts
_COMBINED = 1024  # chunks that the second stage of a survey takes at a time
# No contraction: storage must not change results. Dither is meant to wrap, also where Triton debugs. Subnormal numbers
# are numbers: in floor and abs Triton takes them for zero otherwise.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "sanitize_overflow": False, "enable_reflect_ftz": False}


class _Place(NamedTuple):
    """Where one job's tensors are, and of what kind: all that a table depends on."""

    parameter: int
    gradient: int
    kept: int
    states: tuple[int, ...]
    scales: tuple[int, ...]
    step: int
    numel: int
    row: int
    seed: int
    ordinal: int
    first: int
    dtypes: tuple[torch.dtype | None, ...]  #: parameter, gradient, kept, then the states


class _Format(NamedTuple):
    """What jobs of one launch have in common."""

    dtypes: tuple[torch.dtype | None, ...]
    ragged: bool  #: there are scales, and rows end within groups
    aligned: bool  #: addresses and lengths are multiples of 16


class _Launch(NamedTuple):
    """The jobs of one format."""

    format: _Format
    chunks: Tensor  #: int32 (chunks, 2), on the device: job, and first group
    first: int  #: chunks in the launches before


@dataclass(frozen=True)
class _Plan:
    """The launches for jobs of these kinds, lengths and rows."""

    shapes: tuple[tuple[_Format, int, int], ...]
    launches: tuple[_Launch, ...]
    spans: Tensor  #: int32 (jobs, 2), on the device: first chunk, and number of chunks
    chunks: int


@dataclass(frozen=True)
class _Table:
    """The addresses of a list of jobs."""

    places: tuple[_Place, ...]
    on_device: Tensor  #: int64 (jobs, columns)
    plan: _Plan


_tables: OrderedDict[tuple[Any, ...], _Table] = OrderedDict()
#: What replays of captured graphs read, by id, for as long as the process lives; nothing tells when a graph is gone.
#: It is memory on the host that a capture copies from (128 bytes a parameter), and tables and plans that were on the
#: device before. Not what a capture puts there: that lies in the graph's own memory, and each replay writes it again.
_captured: dict[int, object] = {}


def missing(device_type: str) -> str:
    """What is missing for this backend on such a device, in one line; empty where nothing is."""
    if device_type != "cuda":
        return "its kernels work in a GPU's memory only"
    return "" if importlib.util.find_spec("triton") is not None else "the package triton is not installed"


def update(
    jobs: Sequence[Job], rule: Rule, *, stochastic: bool, coefficient: Tensor | None, found_inf: Tensor | None
) -> None:
    """Step every job: `halfstep.optim.update.Backend.update`."""
    if not jobs:
        return
    device = jobs[0].parameter.device
    with _on(device):
        kernels = _kernels()
        table = _table_of(tuple(map(_place, jobs)), device)
        numbers = torch.empty(len(jobs), kernels.NUMBERS.value, dtype=torch.float32, device=device)
        kernel, hyperparameters, flags = _kernel(rule)
        launched = -1  # `prepare` counts the step: it is launched once

        def write() -> None:
            # To look whether a launch happened would be to wait for the device, so that one moment is left to chance:
            # between a launch and its being counted here.
            nonlocal launched
            if launched < 0:
                _prepare(table.on_device, numbers, rule, found_inf)
                launched = 0
            for launch in table.plan.launches[launched:]:
                weight, gradient, kept, *states = launch.format.dtypes
                drops = weight is not torch.float32 and kept in (None, torch.int8)
                kernel[(len(launch.chunks),)](
                    table.on_device, launch.chunks, numbers, coefficient, found_inf, *hyperparameters, **flags,
                    WEIGHT=_dtype(weight), GRAD=_dtype(gradient), MASTER=_dtype(kept),
                    STOCHASTIC=stochastic and drops,
                    **{f"STATE{index}": _dtype(state) for index, state in enumerate(states)},
                    RAGGED=launch.format.ragged, ALIGNED=launch.format.aligned, GROUPS=GROUPS, TILES=TILES, **_OPTIONS,
                )  # fmt: skip
                launched += 1

        to_the_end(write, "an update")


def survey(gradients: Sequence[Tensor]) -> Survey:
    """Look at gradients, once: `halfstep.optim.update.Backend.survey`. Sums are put together in one order always."""
    device = gradients[0].device if gradients else torch.device("cpu")
    sums = torch.empty(len(gradients), dtype=torch.float64, device=device)
    amax = torch.empty(len(gradients), dtype=torch.float32, device=device)
    if gradients:
        with _on(device):
            plan, partial, largest = _chunks_surveyed(gradients, device)
            _kernels().survey_gradient[(len(gradients),)](
                plan.spans, partial, largest, sums, amax, BLOCK=_COMBINED, **_OPTIONS
            )
    return Survey(sums.sum(), (~amax.isfinite()).any().float(), amax)


def arrive(
    gradient: Tensor, tally: Tally, inverse_scale: Tensor | None, norm_before: Tensor | None, limit: float | None
) -> Arrival:
    """Look at a gradient, and add it to others: `halfstep.optim.update.Arriving.arrive`. Two launches."""
    device = gradient.device
    total = torch.empty((), dtype=torch.float64, device=device)
    found_inf = torch.empty((), dtype=torch.float32, device=device)
    survey = Survey(total, found_inf, torch.empty(1, dtype=torch.float32, device=device))
    with _on(device):
        plan, partial, largest = _chunks_surveyed([gradient], device)
        _kernels().arrive[(1,)](
            plan.spans, partial, largest, *survey, tally.sum_of_squares, tally.found_inf, tally.found,
            tally.coefficient, inverse_scale, norm_before, _bits(1.0 if limit is None else limit),
            LIMITED=limit is not None, BLOCK=_COMBINED, **_OPTIONS,
        )  # fmt: skip
    return Arrival(survey, tally.found, None if limit is None else tally.coefficient)


def follow(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set each element of a master that does not round to its parameter's to what the parameter is, in place.

    Args:
        pairs: a bfloat16 or float16 parameter and its float32 master, of one device; their elements lie in one order,
            without gaps.
    """
    if not pairs:
        return
    device = pairs[0][0].device
    with _on(device):
        table = _table_of(tuple([_place_of_pair(*pair) for pair in pairs]), device)
        for launch in table.plan.launches:
            _kernels().follow[(len(launch.chunks),)](
                table.on_device, launch.chunks, WEIGHT=_dtype(launch.format.dtypes[0]),
                ALIGNED=launch.format.aligned, GROUPS=GROUPS, TILES=TILES, **_OPTIONS,
            )  # fmt: skip


def _chunks_surveyed(gradients: Sequence[Tensor], device: torch.device) -> tuple[_Plan, Tensor, Tensor]:
    """Sums of squares (float64) and bits of the largest magnitudes (int32) of all chunks, and the plan of these."""
    table = _table_of(tuple(map(_place_of_gradient, gradients)), device)
    partial = torch.empty(table.plan.chunks, dtype=torch.float64, device=device)
    largest = torch.empty(table.plan.chunks, dtype=torch.int32, device=device)
    for launch in table.plan.launches:
        _kernels().survey_chunk[(len(launch.chunks),)](
            table.on_device, launch.chunks, launch.first, partial, largest,
            GRAD=_dtype(launch.format.dtypes[1]), ALIGNED=launch.format.aligned,
            GROUPS=GROUPS, TILES=TILES, **_OPTIONS,
        )  # fmt: skip
    return table.plan, partial, largest


def _bits(number: float) -> int:
    """Of a positive float64: an int64."""
    return int.from_bytes(struct.pack("<d", number), "little")


# Rules ----------------------------------------------------------------------------------------------------------------


def _prepare(table: Tensor, numbers: Tensor, rule: Rule, found_inf: Tensor | None) -> None:
    device = numbers.device
    on_device = isinstance(rule.lr, Tensor) and rule.lr.device == device
    lr = 0.0 if on_device else float(rule.lr)
    betas = (rule.beta1, rule.beta2) if isinstance(rule, Adam) else (1.0, 1.0)
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    doubles = [half for value in (lr, *logs, rule.weight_decay) for half in _halves(value)]
    _kernels().prepare[(-(-len(numbers) // _PREPARED),)](
        table, numbers, len(numbers), found_inf, rule.lr if on_device else None, *doubles,
        ADAM=isinstance(rule, Adam), BLOCK=_PREPARED, **_OPTIONS,
    )  # fmt: skip


def _kernel(rule: Rule) -> tuple[Any, tuple[float, ...], dict[str, bool]]:
    """The rule's kernel, its hyperparameters, and those that are compiled in."""
    kernels = _kernels()
    decays = bool(rule.weight_decay)
    if isinstance(rule, Adam):
        weights = (1 - rule.beta1, float(rule.beta2), 1 - rule.beta2)
        flags = {
            "DECOUPLED": decays and rule.decoupled,
            "COUPLED": decays and not rule.decoupled,
            "AMSGRAD": rule.amsgrad,
        }
        return kernels.adam, (*weights, float(rule.eps), float(rule.weight_decay)), flags | {"MAXIMIZE": rule.maximize}
    if isinstance(rule, SGD):
        flags = {
            "MOMENTUM": bool(rule.momentum),
            "NESTEROV": rule.nesterov,
            "COUPLED": decays,
            "MAXIMIZE": rule.maximize,
        }
        return kernels.sgd, (float(rule.momentum), float(1 - rule.dampening), float(rule.weight_decay)), flags
    return kernels.lion, (1 - rule.beta1, 1 - rule.beta2), {"DECOUPLED": decays, "MAXIMIZE": rule.maximize}


def _halves(value: float) -> tuple[float, float]:
    """A number as two float32, which is how Triton takes floats."""
    high = float(np.float32(value))
    return high, float(value) - high if math.isfinite(high) else 0.0


@functools.cache
def _kernels() -> Any:
    from halfstep.optim.backends import triton_kernels

    return triton_kernels


@functools.cache
def _dtype(dtype: torch.dtype | None) -> Any:
    """Triton's name of a dtype."""
    return None if dtype is None else getattr(_kernels().tl, str(dtype).removeprefix("torch."))


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# Tables ---------------------------------------------------------------------------------------------------------------


def _place(job: Job) -> _Place:
    parameter, kept = job.parameter, job.kept
    if parameter.dtype is torch.float32:
        kept = None  # it is its own master
    return _Place(
        parameter.data_ptr(),
        job.gradient.data_ptr(),
        0 if kept is None else kept.data_ptr(),
        tuple([state.data_ptr() for state in job.states]),
        tuple([0 if scale is None else scale.data_ptr() for scale in job.scales]),
        job.step.data_ptr(),
        parameter.numel(),
        job.row,
        job.seed,
        job.ordinal,
        job.first,
        (parameter.dtype, job.gradient.dtype, None if kept is None else kept.dtype, *[s.dtype for s in job.states]),
    )


def _place_of_gradient(gradient: Tensor) -> _Place:
    numel = gradient.numel()
    return _Place(0, gradient.data_ptr(), 0, (), (), 0, numel, numel, 0, 0, 0, (None, gradient.dtype, None))


def _place_of_pair(parameter: Tensor, master: Tensor) -> _Place:
    numel, dtypes = parameter.numel(), (parameter.dtype, None, torch.float32)
    return _Place(parameter.data_ptr(), 0, master.data_ptr(), (), (), 0, numel, numel, 0, 0, 0, dtypes)


def _table_of(places: tuple[_Place, ...], device: torch.device) -> _Table:
    """The table of these places: the last one for this list, or a new one on its way to the device."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    first = places[0]
    owner = first.parameter or (first.gradient if len(places) == 1 else 0)  # gradients that arrive one by one
    # By stream: what another one sent may not have come yet, and is freed for that one, whatever this one still reads.
    key = (_stream(device), device, len(places), owner, first.numel, first.dtypes)
    table = _tables.get(key)
    if table is None and capturing:
        # In a stream of its own, mostly. What others sent is there: torch waits for the device before. And it is kept.
        table = next((other for known, other in _tables.items() if known[1:] == key[1:]), None)
    if table is None or table.places != places:
        shapes = tuple([(_format(place), place.numel, place.row) for place in places])
        plan = table.plan if table is not None and table.plan.shapes == shapes else None
        if capturing and plan is not None:
            _captured[id(plan)] = plan
        rows = torch.tensor([_row(place) for place in places], dtype=torch.int64, device="cpu")
        table = _Table(places, _send(rows, device), _plan(shapes, device) if plan is None else plan)
        if not capturing:  # a captured copy runs at the replay only
            _tables[key] = table
            if len(_tables) > TABLES:
                _tables.popitem(last=False)
    elif capturing:
        _captured[id(table)] = table
    else:
        _tables.move_to_end(key)
    return table


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _format(place: _Place) -> _Format:
    scaled = any(place.scales)
    ragged = scaled and place.row % GROUP != 0
    lengths = (place.numel, place.row) if ragged else (place.numel,)
    numbers = (place.parameter, place.gradient, place.kept, *place.states, *lengths)
    return _Format(place.dtypes, ragged, all(number % _ALIGNMENT == 0 for number in numbers))


def _row(place: _Place) -> list[int]:
    """One row of the table, in the order of the columns in `halfstep.optim.backends.triton_formats`."""
    three = [(*addresses, 0, 0, 0)[:3] for addresses in (place.states, place.scales)]
    keys = [dither.key(place.seed, place.ordinal, stream, place.first) for stream in (dither.WEIGHT, *dither.STATE)]
    addresses = [place.parameter, place.gradient, place.kept, *three[0], *three[1], place.step]
    return [*addresses, place.numel, place.row, *keys]


def _plan(shapes: tuple[tuple[_Format, int, int], ...], device: torch.device) -> _Plan:
    """Sort jobs by format, and cut them into chunks."""
    jobs: dict[_Format, list[int]] = {}
    for index, (format_, numel, _) in enumerate(shapes):
        if numel:
            jobs.setdefault(format_, []).append(index)
    spans = np.zeros((len(shapes), 2), dtype=np.int32)
    launches, first = [], 0
    for format_, members in jobs.items():
        groups = [_groups(numel, row, format_.ragged) for _, numel, row in (shapes[index] for index in members)]
        counts = -(-np.array(groups) // (GROUPS * TILES))
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        chunks = np.stack([np.repeat(members, counts), within * GROUPS * TILES], axis=1).astype(np.int32)
        spans[members] = np.stack([first + starts, counts], axis=1)
        launches.append(_Launch(format_, _send(torch.from_numpy(chunks), device), first))
        first += len(chunks)
    return _Plan(shapes, tuple(launches), _send(torch.from_numpy(spans), device), first)


def _groups(numel: int, row: int, ragged: bool) -> int:
    return numel // row * -(-row // GROUP) if ragged else -(-numel // GROUP)


def _send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nothing waits for; a replayed CUDA graph makes it again, from the same memory."""
    if device.type != "cuda":
        return host.to(device)
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured[id(pinned)] = pinned
    return pinned.to(device, non_blocking=True)

"""The backend in C: for tensors in the host's memory, every job of an update in one call.

What is computed is `halfstep.optim.backends.eager`'s, bit for bit but where `tests/optim/test_native.py` says
otherwise. The C sources lie in ``kernels/`` (begin with ``halfstep.h``); the package's installation compiles them into
a plain shared library beside this file where there is a compiler, and goes on without where there is none: `missing`
then says why. The library knows of neither torch nor Python: it gets a table of addresses, and the interpreter's lock
is free while it works.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from halfstep.optim.layout import is_dense
from halfstep.optim.moments import GROUP
from halfstep.optim.rules import SGD, Adam, Rule
from halfstep.optim.update import Job, Survey

name = "native"

#: Of ``halfstep.h``: raised together with it.
VERSION = 3

_HALF = {torch.bfloat16: 2, torch.float16: 3}
_FLOAT = {torch.float32: 1, **_HALF}
_KEPT = {**_FLOAT, torch.int16: 4, torch.int8: 5}
_STATE = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 5, torch.uint8: 6}
_FLOAT32 = {torch.float32: 1}
_STATES = 3
_ROW = 16  # 64-bit integers in a job's row
_GRADIENT, _NUMEL, _FORMATS = 1, 10, 15  # columns of it
_GRADIENT_ROW, _PAIR_ROW = 3, 4
_NO_MEMORY, _UNKNOWN_FORMAT = 1, 2


class _Rule(ctypes.Structure):
    """``struct hs_rule``."""

    _fields_ = (
        *((field, ctypes.c_double) for field in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *(
            (field, ctypes.c_int32)
            for field in ("kind", "decoupled", "amsgrad", "nesterov", "maximize", "stochastic", "unscale")
        ),
    )


def missing() -> str:
    """Why the library cannot be used, in one line; empty where it can."""
    library = _library()
    return library if isinstance(library, str) else ""


def update(
    jobs: Sequence[Job],
    rule: Rule,
    *,
    stochastic: bool,
    coefficient: Tensor | None,
    found_inf: Tensor | None,
    unscale: bool = False,
) -> None:
    """Step every job: `halfstep.optim.update.Backend.update`.

    Args:
        unscale: multiply the gradients that are not float16 by ``coefficient`` in memory too, in the same pass.
    """
    table = _table(jobs, rule)
    result = _loaded().hs_update(
        table.buffer_info()[0],
        len(jobs),
        ctypes.byref(_rule(rule, stochastic, unscale)),
        _scalar(coefficient, "coefficient"),
        _scalar(found_inf, "found_inf"),
        torch.get_num_threads(),
    )
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory for the plan of {len(jobs)} updates")
    if result == _UNKNOWN_FORMAT:  # each is one that C knows
        raise ValueError(f"{rule}: a job's dtypes do not go together: {[_dtypes(job) for job in jobs]}")


def survey(gradients: Sequence[Tensor]) -> Survey:
    """Look at gradients, once: `halfstep.optim.update.Backend.survey`."""
    table = array("q")
    for gradient in gradients:
        format = _FLOAT.get(gradient.dtype)
        if format is None or not gradient.is_cpu:
            raise ValueError(_wrong(f"a gradient of shape {tuple(gradient.shape)}", gradient, _FLOAT))
        if not gradient.is_contiguous():
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} has strides {gradient.stride()}: not flat")
        table.extend((gradient.data_ptr(), gradient.numel(), format))
    total = torch.empty((), dtype=torch.float64, device="cpu")
    amax = torch.empty(len(gradients), dtype=torch.float32, device="cpu")
    result = _loaded().hs_survey(
        table.buffer_info()[0], len(gradients), total.data_ptr(), amax.data_ptr(), torch.get_num_threads()
    )
    if result == _NO_MEMORY:
        raise MemoryError(f"no memory to look at {len(gradients)} gradients")
    return Survey(total, (~amax.isfinite()).any().float(), amax)


def follow(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set each element of a master that does not round to its parameter's to what the parameter is, in place.

    Args:
        pairs: a bfloat16 or float16 parameter and its float32 master, with their elements in one order, without gaps.

    Raises:
        ValueError: two do not go together, have other dtypes, or do not lie in the host's memory.
    """
    table = array("q")
    for parameter, master in pairs:
        format = _HALF.get(parameter.dtype)
        if format is None or not parameter.is_cpu:
            raise ValueError(_wrong(f"a 16-bit parameter of shape {tuple(parameter.shape)}", parameter, _HALF))
        if master.dtype is not torch.float32 or not master.is_cpu:
            raise ValueError(_wrong(f"a master of shape {tuple(master.shape)}", master, _FLOAT32))
        if parameter.shape != master.shape or parameter.stride() != master.stride() or not is_dense(parameter):
            both = [(tuple(t.shape), t.stride()) for t in (parameter, master)]
            raise ValueError(f"a 16-bit parameter and its float32 master in one order without gaps, not {both}")
        table.extend((parameter.data_ptr(), master.data_ptr(), parameter.numel(), format))
    _loaded().hs_follow(table.buffer_info()[0], len(pairs), torch.get_num_threads())


def _table(jobs: Sequence[Job], rule: Rule) -> array[int]:
    """``struct hs_job`` for each job. Written for speed: a model has hundreds of parameters, and they wait for this."""
    table = array("q")
    for job in jobs:
        notes, gradient = job.notes, job.gradient
        row = None if notes is None else notes.get(name)
        if row is None:
            row = _row(job, [state for state, _ in rule.states])
            if notes is not None:
                notes[name] = row
        format = _FLOAT.get(gradient.dtype)
        if format is None or not gradient.is_cpu:
            raise ValueError(_wrong(f"gradient of parameter {job.ordinal}", gradient, _FLOAT))
        if gradient.numel() != row[_NUMEL] or not gradient.is_contiguous():
            raise ValueError(_unsound(job))
        row[_GRADIENT] = gradient.data_ptr()
        row[_FORMATS] = row[_FORMATS] & ~0xF0 | format << 4
        table += row
    return table


def _row(job: Job, names: Sequence[str]) -> array[int]:
    """``struct hs_job``, without the gradient. C reads and writes what this says, so each tensor is looked at first.

    Args:
        names: of the states.
    """
    numel = job.parameter.numel()
    formats, sound = _format(job, "", job.parameter, _FLOAT), job.parameter.is_contiguous()
    kept_address = 0
    if job.kept is not None:
        formats |= _format(job, "master, remainder or compensation", job.kept, _KEPT) << 8
        sound = sound and job.kept.numel() == numel and job.kept.is_contiguous()
        kept_address = job.kept.data_ptr()
    places, groups = [0] * (2 * _STATES), numel // job.row * -(-job.row // GROUP) if numel else 0
    for index, (state, scale) in enumerate(zip(job.states, job.scales, strict=True)):
        what = names[index] if index < len(names) else f"state {index}"
        formats |= _format(job, what, state, _STATE) << (12 + 4 * index)
        sound = sound and state.numel() == numel and state.is_contiguous()
        places[index] = state.data_ptr()
        if scale is not None:
            _format(job, f"{what}_scale", scale, _FLOAT32)
            sound = sound and scale.numel() == groups and scale.is_contiguous()
            places[_STATES + index] = scale.data_ptr()
    if not sound:
        raise ValueError(_unsound(job))
    _format(job, "step", job.step, _FLOAT32)
    if job.step.numel() != 1:
        raise ValueError(f"step of parameter {job.ordinal}: one number, not {tuple(job.step.shape)}")
    key = (job.seed & 0xFFFFFFFF, job.ordinal & 0xFFFFFFFF, job.first)
    return array(
        "q", (job.parameter.data_ptr(), 0, kept_address, *places, job.step.data_ptr(), numel, job.row, *key, formats)
    )


def _format(job: Job, what: str, tensor: Tensor, formats: Mapping[torch.dtype, int]) -> int:
    """How C calls the tensor's dtype, one of ``formats``; ``what`` of the job it is, or nothing for the parameter."""
    if tensor.dtype not in formats or not tensor.is_cpu:
        if not what:
            raise ValueError(_wrong(f"parameter {job.ordinal}", tensor, formats))
        wrong = _wrong(f"{what} of parameter {job.ordinal}", tensor, formats)
        raise ValueError(f"{wrong}. The optimizer's load_state_dict converts a state that was made elsewhere")
    return formats[tensor.dtype]


def _wrong(what: str, tensor: Tensor, formats: Mapping[torch.dtype, int]) -> str:
    """What is said of a tensor that C would take for another, or whose memory is not the host's."""
    *others, last = [str(dtype).removeprefix("torch.") for dtype in formats]
    wanted = f"{', '.join(others)} or {last}" if others else last
    return f"{what} must be {wanted} in the host's memory (cpu), not {tensor.dtype} on {tensor.device}"


def _unsound(job: Job) -> str:
    """What is said of tensors that C would read or write beyond."""
    tensors = (job.parameter, job.gradient, job.kept, *job.states, *job.scales)
    shapes = [None if t is None else (str(t.dtype), tuple(t.shape), t.stride()) for t in tensors]
    return (
        f"parameter {job.ordinal}: all its tensors must have its {job.parameter.numel()} elements one after the other, "
        f"and scales one float32 for each {GROUP} of a row of {job.row}; these are {shapes}"
    )


def _rule(rule: Rule, stochastic: bool, unscale: bool) -> _Rule:
    """``struct hs_rule``: SGD's momentum and dampening lie where the others have their betas."""
    if isinstance(rule, Adam):
        lr, eps = float(rule.lr), rule.eps
        flags = (0, rule.decoupled, rule.amsgrad, False)
        return _Rule(lr, rule.beta1, rule.beta2, eps, rule.weight_decay, *flags, rule.maximize, stochastic, unscale)
    if isinstance(rule, SGD):
        flags = (1, False, False, rule.nesterov)
        lr, first, second = float(rule.lr), rule.momentum, rule.dampening
    else:
        flags = (2, True, False, False)
        lr, first, second = float(rule.lr), rule.beta1, rule.beta2
    return _Rule(lr, first, second, 0.0, rule.weight_decay, *flags, rule.maximize, stochastic, unscale)


def _scalar(value: Tensor | None, what: str) -> int | None:
    """The address of a float32 scalar in the host's memory."""
    if value is None:
        return None
    if value.dtype is not torch.float32 or value.numel() != 1 or not value.is_cpu:
        raise ValueError(
            f"{what}: one float32 in the host's memory, not {value.numel()} of {value.dtype} on {value.device}"
        )
    return value.data_ptr()


def _dtypes(job: Job) -> tuple[torch.dtype | None, ...]:
    tensors = (job.parameter, job.gradient, job.kept, *job.states)
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled optimizer kernels cannot be used: {library}")
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            return _open(path)
    return f"{Path(__file__).parent} holds no compiled _kernels: no C compiler was found when halfstep was installed"


def _open(path: Path) -> ctypes.CDLL | str:
    """Load the library, and hold that both sides mean the same by a row."""
    try:
        library = ctypes.CDLL(str(path))
        version = library.hs_version()
        sizes = (ctypes.c_int64 * 4)()
        library.hs_sizes(sizes)
    except (OSError, AttributeError) as error:
        return f"{path} does not load: {error}"
    expected = [8 * _ROW, ctypes.sizeof(_Rule), 8 * _GRADIENT_ROW, 8 * _PAIR_ROW]
    if version != VERSION or list(sizes) != expected:
        return (
            f"{path} was built from other sources (version {version}, sizes {list(sizes)}; "
            f"here {VERSION}, {expected}): install halfstep again"
        )
    address, integer = ctypes.c_void_p, ctypes.c_int64
    library.hs_update.argtypes = [address, integer, ctypes.POINTER(_Rule), address, address, ctypes.c_int32]
    library.hs_survey.argtypes = [address, integer, address, address, ctypes.c_int32]
    library.hs_follow.argtypes = [address, integer, ctypes.c_int32]
    return library

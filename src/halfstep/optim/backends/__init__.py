"""Which backend computes an optimizer's updates, and why.

============ ==================================================== ==========================
backend      what it is                                           ``"auto"`` takes it for
============ ==================================================== ==========================
``native``   C, one pass over memory, built when installed        the host's memory
``triton``   Triton kernels, one launch for all parameters        CUDA
``compile``  the eager one through ``torch.compile``              other accelerators
``eager``    plain torch operations; slow, and the meaning        where none of these is there
============ ==================================================== ==========================
"""

from __future__ import annotations

import functools
import warnings
from typing import Literal, cast, get_args

import torch

from halfstep.optim.backends import eager
from halfstep.optim.update import Backend

BackendName = Literal["auto", "native", "triton", "compile", "eager"]


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; says why."""


class SlowOptimizerWarning(UserWarning):
    """The fast backend for this device is missing, and a slow one is used."""


def choose(name: BackendName, device: torch.device) -> tuple[Backend, str]:
    """The backend for parameters on ``device``, and the reason.

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailableError: the backend asked for cannot run here.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend must be one of {', '.join(get_args(BackendName))}, not {name!r}")
    if name != "auto":
        backend, missing = _load(name, device.type)
        if backend is None:
            raise BackendUnavailableError(f"backend {name!r} cannot run on {device.type}: {missing}")
        return backend, "asked for"
    fastest = _fastest(device.type)
    backend, missing = _load(fastest, device.type)
    if backend is not None:
        return backend, f"the fastest for {device.type}"
    _notice(f"halfstep.optim steps in plain torch operations, many times slower than it could: {missing}")
    return cast(Backend, eager), f"{fastest} cannot run: {missing}"


def lacking(device_type: str) -> str:
    """Why the fastest backend for a device cannot run here; empty where it can."""
    return _load(_fastest(device_type), device_type)[1]


def _fastest(device_type: str) -> str:
    return {"cpu": "native", "cuda": "triton"}.get(device_type, "compile")


@functools.cache
def _load(name: str, device_type: str) -> tuple[Backend | None, str]:
    """The backend, or None and what is missing."""
    if name == "eager":
        return cast(Backend, eager), ""
    if name == "native":
        from halfstep.optim.backends import native

        missing = native.missing() if device_type == "cpu" else "its kernels work on the host's memory only"
        return (None, missing) if missing else (cast(Backend, native), "")
    if name == "triton":
        from halfstep.optim.backends import cuda

        missing = cuda.missing(device_type)
        return (None, missing) if missing else (cast(Backend, cuda), "")
    from halfstep.optim.backends import compiled

    missing = compiled.missing(device_type)
    return (None, missing) if missing else (cast(Backend, compiled), "")


@functools.cache
def _notice(text: str) -> None:
    warnings.warn(text, SlowOptimizerWarning, stacklevel=4)

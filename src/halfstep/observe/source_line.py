"""The line of a script that called PyTorch: the first frame that is neither PyTorch's nor halfstep's.

A walk over frame objects costs a microsecond; `traceback.extract_stack`, which also reads the files, costs a hundred.
The built-in scripts under ``halfstep/workloads`` know nothing of halfstep and count as anybody's script.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import FrameType

import torch
from torch.autograd.function import BackwardCFunction

_TORCH = str(Path(torch.__file__).parent) + os.sep
_CHECKPOINT = str(Path(_TORCH, "utils", "checkpoint.py"))
_HALFSTEP = str(Path(__file__).parents[1]) + os.sep
_SCRIPTS = _HALFSTEP + "workloads" + os.sep
_ENGINE = "_engine_run_backward"  # of torch.autograd.graph: calls the engine
_NODE = BackwardCFunction.apply.__code__  # the engine calls it for a node written in Python


def script_frame(in_backward: bool = False) -> FrameType | None:
    """The innermost frame of a script or of a library other than PyTorch; None on a thread without one.

    Args:
        in_backward: look no further than the backward pass that runs: who called that has not called what is computed
            in it. (On a device's thread there is nothing further.)
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if in_backward and code.co_name == _ENGINE:
            return None
        # Other modes and tensor subclasses pass ops on; the line that called them is further out.
        if _is_script(code.co_filename) and code.co_name not in ("__torch_dispatch__", "__torch_function__"):
            break
        frame = frame.f_back
    return frame


def recomputes() -> bool:
    """Whether activation checkpointing runs a function again right now, below the backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False


def begun_by_a_node() -> bool:
    """Whether the backward pass that runs was begun inside of another one, by a node that this thread evaluates."""
    frame: FrameType | None = sys._getframe(1)
    is_inner = False
    while frame is not None:
        is_inner = is_inner or frame.f_code.co_name == _ENGINE
        if is_inner and frame.f_code is _NODE:
            return True
        frame = frame.f_back
    return False


@functools.cache
def shown(filename: str) -> str:
    """The file as a reader finds it: relative to the working directory where it lies below it."""
    if filename.startswith("<"):
        return filename
    try:
        relative = os.path.relpath(filename)
    except (OSError, ValueError):  # another drive, or a working directory that is gone
        return filename
    return filename if relative.startswith(os.pardir) else relative


@functools.cache
def _is_script(filename: str) -> bool:
    # Generated code (graph modules, frozen importlib) is no line that anybody can open; "<string>" and "<stdin>" are
    # what a person typed.
    if filename.startswith(("<eval_with_key>", "<frozen ")):
        return False
    if filename.startswith(_HALFSTEP):
        return filename.startswith(_SCRIPTS)
    return not filename.startswith(_TORCH)

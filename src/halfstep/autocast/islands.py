"""FP32 islands: modules, named by path, that compute in FP32 inside an autocast region.

`keep_fp32` replaces the ``forward`` of every matching module by one that casts 16-bit inputs to FP32 and runs with
autocast off: the two lines that PyTorch's documentation has people write by hand, for modules that they cannot edit.
What an island returns is FP32; the ops after it cast as autocast always does.

The replacement is an attribute of the instance, an object of a public class that holds the module. It is copied with
the module, and pickled as the forward that it replaced, so that files load without halfstep. A closure would break
``pickle`` and leave ``copy.deepcopy`` with the *original's* forward; a pair of hooks that opens and closes
autocast cannot be traced by ``torch.compile``. Activation checkpointing calls ``forward`` again and finds the island
again.

Patterns are compared part by part: ``*`` stands for one part of a path or a piece of it, ``**`` for any number of
parts. The parts that wrappers add (``module`` of DistributedDataParallel, ``_orig_mod`` of compile, …) do not count.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from halfstep.autocast.containers import to_float32

#: Path parts added by DDP and DataParallel, torch.compile, checkpoint_wrapper and FSDP1.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class NoSuchModuleError(ValueError):
    """A pattern matches no module of this model; the message names the nearest paths."""


class Islands:
    """The modules kept in FP32, by path; `remove` (or leaving it as a context) makes them ordinary again."""

    def __init__(self, modules: dict[str, nn.Module], device_type: str) -> None:
        self.modules = modules
        for module in modules.values():
            module.forward = IslandForward(module, module.__dict__.get("forward"), device_type)

    def remove(self) -> None:
        for module in self.modules.values():
            forward = module.__dict__.get("forward")
            if isinstance(forward, IslandForward):  # else somebody has put theirs on top, or it is removed already
                del module.__dict__["forward"]
                if forward.inner is not None:
                    module.forward = forward.inner
        self.modules = {}

    def __enter__(self) -> Islands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class IslandForward:
    """A module's ``forward`` with 16-bit inputs cast to FP32 and autocast off."""

    def __init__(self, module: nn.Module, inner: Any, device_type: str) -> None:
        self.module = module
        self.inner = inner  #: a forward that stood on the instance before; None: the class's
        self.device_type = device_type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = to_float32(args), to_float32(kwargs)
        with torch.autocast(self.device_type, enabled=False):
            if self.inner is not None:
                return self.inner(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> IslandForward:
        copied = IslandForward.__new__(IslandForward)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> Any:
        if self.inner is not None:
            return functools.partial, (self.inner,)
        return getattr, (self.module, "forward")  # that of its class: unpickled before the instance has attributes

    @property
    def __wrapped__(self) -> Any:  # so that inspect.signature(module.forward) stays what it was
        return self.inner if self.inner is not None else type(self.module).forward.__get__(self.module)


def keep_fp32(model: nn.Module, patterns: Iterable[str], device_type: str | None = None) -> Islands:
    """Make the modules that match ``patterns`` FP32 islands of ``model``; the returned `Islands` undoes it.

    Args:
        patterns: module-path globs, such as ``blocks.*.mlp.wo`` or ``**.router``. A module inside a matching one is in
            the island with it.
        device_type: whose autocast is switched off; by default that of the model's first parameter.

    Raises:
        NoSuchModuleError: a pattern matches nothing.
        TypeError: a matching module is scripted: its forward cannot be replaced.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not find(model, (pattern,)):
            raise NoSuchModuleError(no_match([model], pattern))
    found = {path: module for path, module in find(model, patterns).items() if not _is_island(module)}
    for path, module in found.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"module {path!r} is scripted (torch.jit), so it cannot be made an FP32 island from outside"
            )
    if device_type is None:
        first = next(model.parameters(), None)
        device_type = "cpu" if first is None else first.device.type
    return Islands(found, device_type)


def find(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose path matches any of ``patterns``, by path; of nested matches, only the outermost."""
    if not patterns:
        return {}
    wanted = [_parts(pattern, wraps=_is_wrapper(model)) for pattern in patterns]
    found: dict[str, nn.Module] = {}
    for path, module in _paths(model):
        parts = path.split(".")
        inside = any(parts[: len(outer.split("."))] == outer.split(".") for outer in found)
        if not inside and any(_matches(parts, pattern) for pattern in wanted):
            found[path] = module
    return found


def no_match(models: Iterable[nn.Module], pattern: str) -> str:
    """The message for a pattern that matches nothing, with the paths that come nearest."""
    paths = [path for model in models for path, _ in _paths(model)]
    asked = ".".join(_parts(pattern))
    near = difflib.get_close_matches(asked, paths, n=3, cutoff=0.5)
    last = asked.split(".")[-1]
    near += [path for path in paths if path.split(".")[-1] == last and path not in near][:3]
    hint = f"Nearest: {', '.join(near)}." if near else f"It has {', '.join(paths[:8]) or 'no submodules'}."
    return f"keep_fp32 pattern {pattern!r} matches no module of the model. {hint}"


def _paths(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every submodule with its path as the user knows it; the model itself has none."""
    found = []
    for name, module in model.named_modules():
        path = ".".join(_parts(name, wraps=_is_wrapper(model)))
        if path:
            found.append((path, module))
    return found


def _parts(path: str, wraps: bool = False) -> list[str]:
    parts = [part for part in path.split(".") if part and part not in _WRAPPERS]
    return parts[1:] if wraps and parts[:1] == ["module"] else parts


def _is_wrapper(model: nn.Module) -> bool:
    model = getattr(model, "_orig_mod", model)
    return isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)


def _is_island(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), IslandForward)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])

"""A script that brings its own mixed precision, or goes where a policy cannot follow: found, named, left alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from halfstep.autocast import LOW_PRECISION
from halfstep.launch.scaling import scale_of

if TYPE_CHECKING:
    from halfstep.launch.session import Session

Original = Callable[..., Any]


class OwnPrecision:
    """What the script of ``session`` does itself."""

    def __init__(self, session: Session) -> None:
        self.scaler: torch.amp.GradScaler | None = None  #: the script's own, once it has scaled a loss
        self.stepping = False  #: its step() is running
        self._session = session

    def autocast(self, original: Original, context: torch.autocast) -> Any:
        """A script entering its own autocast."""
        lowers = context._enabled and context.fast_dtype in LOW_PRECISION
        if lowers and not self._session.entering_ours and not in_backward():
            where = caller()
            if where is not None:
                dtype = dtype_name(context.fast_dtype)
                self._session.notice(
                    "own-autocast",
                    f"the script enters its own {context.device} autocast ({dtype}); inside it halfstep stands back. "
                    "Remove it to let the policy decide",
                    where,
                )
        return original(context)

    def gradients(self, original: Original, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """``torch.autograd.grad``: its gradients go to the script, unscaled."""
        if self._session.scales_loss and not in_backward():
            stepped = {id(p) for o in list(self._session.stepped) for group in o.param_groups for p in group["params"]}
            if any(id(leaf) in stepped for leaf in tree_leaves(inputs)):
                self._session.notice(
                    "unscaled-gradients",
                    "the script takes gradients of parameters by torch.autograd.grad, which are not scaled: small ones "
                    f"become 0 in {self._session.policy.compute}. Use backward(), or a bf16 policy",
                    caller(),
                )
        return original(outputs, inputs, *args, **kwargs)

    def compiling(self, original: Original, *args: Any, **kwargs: Any) -> Any:
        """``torch.compile``: a module compiled as such is called from outside; one called inside a function is not."""
        model = args[0] if args else kwargs.get("model")
        if self._session.policy.lowers and not isinstance(model, nn.Module):
            self._session.notice(
                "compiled-function",
                "the script compiles a function; models called inside it stay in fp32, not "
                f"{self._session.policy.compute}. "
                "Compile the model: model = torch.compile(model)",
                caller(),
            )
        return original(*args, **kwargs)

    def scale(self, original: Original, scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        """A script's own ``GradScaler.scale``."""
        if not self._session.is_ours(scaler) and scaler.is_enabled() and self.scaler is None:
            self.scaler = scaler
            self._session.notice(
                "own-scaler",
                "the script scales its loss itself; halfstep's loss scaling stands back",
                caller(),
            )
        return original(scaler, outputs)

    def scaler_step(
        self,
        original: Original,
        scaler: torch.amp.GradScaler,
        optimizer: Optimizer,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A script's own ``GradScaler.step``: recorded with its verdict."""
        if self._session.is_ours(scaler) or self.scaler is None:
            return original(scaler, optimizer, *args, **kwargs)
        scale = scale_of(scaler)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._session.watcher is not None:
            self._session.watcher.step_starts(optimizer)
        self._session.steps.starts(parameters)
        self.stepping = True
        try:
            result = original(scaler, optimizer, *args, **kwargs)
        finally:
            self.stepping = False
        found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        # A fused optimizer unscales inside its kernel and leaves .grad scaled: no norm then, unless clipping gave it.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        with self._session.aside():
            norm = self._session.steps.norm(parameters, only_clipped=fused)
        self._session.ended(optimizer, norm, scale, tuple(found.values()))
        return result


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
#: What may stand between the script and PyTorch: this part of halfstep, and what examines a run.
_OUR_FOLDERS = tuple(str(Path(__file__).parents[1] / part) + os.sep for part in ("launch", "doctor", "observe"))


def caller() -> str | None:
    """File and line of the script's frame that got here; None if PyTorch itself did (as checkpointing does)."""
    frames: Iterator[FrameType] = _frames(sys._getframe(1))
    for frame in frames:
        file = frame.f_code.co_filename
        if file.startswith(_OUR_FOLDERS):
            continue
        if file.startswith(_TORCH_FOLDER) and "checkpoint" in file:
            return None
        if not file.startswith(_TORCH_FOLDER):
            return f"{file}:{frame.f_lineno}"
    return None


def makes_state_only() -> bool:
    """Whether PyTorch steps an optimizer with zeros, so that a distributed checkpoint finds a state to load into."""
    return any(
        frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"
        for frame in _frames(sys._getframe(1))
    )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back

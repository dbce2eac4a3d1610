"""Where halfstep meets an unmodified script: PyTorch's entry points, wrapped while a session is open.

Each wrapper asks whether a session is open and hands over to it, with the original to call. Only these are wrapped:

==================================== =========================================================
``nn.Module.__call__``               the outermost call enters autocast
``torch.autograd.backward``          scales; ``Tensor.backward`` goes through it
``DistributedDataParallel``          stores parameters in planes before it holds on to them
``Optimizer`` subclasses' ``step``   checks, skips, steps masters of 16-bit parameters, records
``Optimizer.state_dict``, ``load…``  carry the masters, and keep FP32 state FP32
``LRScheduler`` subclasses' ``step`` holds still after a skipped step
``torch.nn.utils.clip_grad_norm_``   only reads the norm it returns, for the record
``torch.autograd.grad``, ``compile`` notices what the policy cannot reach
``set_float32_matmul_precision``     undone where the policy says otherwise, and noticed
``torch.autocast.__enter__``         notices a script's own autocast
``torch.amp.GradScaler.scale, step`` notices a script's own loss scaling
``kernels.listeners``                notices an op that this CPU cannot run in the policy's format
``split.on_plain``                   notices a weight that cannot stay in planes
==================================== =========================================================

Nested calls of the same kind (a module inside a module, a wrapper optimizer around another, reentrant checkpointing's
backward inside backward) reach the original untouched. Everything is put back by `Patches.remove`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfstep.autocast.kernels import listeners
from halfstep.launch.own import caller
from halfstep.split import on_plain, swap_keeping_hooks

if TYPE_CHECKING:
    from halfstep.launch.session import Session

_Original = Callable[..., Any]


class Patches:
    """The wrapped entry points of one session."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session
        self._undo: list[Callable[[], None]] = []
        # A forked child (a data loader's worker) inherits the wrappers; there they must do nothing.
        os.register_at_fork(after_in_child=self._forget_session)

    def install(self) -> None:
        patches = self

        def call(original: _Original, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            session = patches._session
            if session is None or torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            return session.forward(original, module, args, kwargs)

        # No functools.partial here: Module.__call__ must stay a plain function to bind to the module.
        module_call = nn.Module.__call__

        def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            return call(module_call, self, *args, **kwargs)

        self._set(nn.Module, "__call__", __call__)
        self._wrap(torch.autograd, "backward", lambda session: session.backward)
        self._wrap(torch.autograd, "grad", lambda session: session.own.gradients)
        self._wrap(torch, "compile", lambda session: session.own.compiling)
        self._wrap(torch, "set_float32_matmul_precision", lambda session: session.float32.setting)
        self._wrap(nn.parallel.DistributedDataParallel, "__init__", lambda session: session.replicating)
        # What TorchScript makes of a model reads its weights' memory, and crashes where there is none.
        for owner, name in (
            (torch.jit, "trace"),
            (torch.jit, "trace_module"),
            (torch.jit, "script"),
            (torch.onnx, "export"),
        ):
            self._wrap(owner, name, lambda session: session.making_program)
        self._wrap(torch.utils, "swap_tensors", lambda session: swap_keeping_hooks)
        self._wrap(Optimizer, "state_dict", lambda session: session.optimizer_state)
        self._wrap(Optimizer, "load_state_dict", lambda session: session.load_optimizer_state)
        self._wrap(torch.autocast, "__enter__", lambda session: session.own.autocast)
        self._wrap(torch.amp.GradScaler, "scale", lambda session: session.own.scale)
        self._wrap(torch.amp.GradScaler, "step", lambda session: session.own.scaler_step)
        for owner in (torch.nn.utils, torch.nn.utils.clip_grad):
            self._wrap(owner, "clip_grad_norm_", lambda session: session.clipped)
        for scheduler in _with_own_step(LRScheduler):
            self._wrap(scheduler, "step", lambda session: session.scheduler_step)

        # Every Optimizer.__init__ passes here, those of classes that the script defines itself included.
        prepare_class = Optimizer._patch_step_function

        def patch_step_function(optimizer: Optimizer) -> None:
            prepare_class(optimizer)
            session = patches._session
            if session is not None and not hasattr(type(optimizer).step, "_halfstep"):
                patches._wrap(type(optimizer), "step", lambda session: session.step)

        self._set(Optimizer, "_patch_step_function", patch_step_function)
        add_param_group = Optimizer.add_param_group

        @functools.wraps(add_param_group)
        def add(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
            add_param_group(optimizer, param_group)
            if patches._session is not None:
                patches._session.new_parameters(optimizer, optimizer.param_groups[-1]["params"])

        self._set(Optimizer, "add_param_group", add)

        def kept_in_fp32(message: str) -> None:
            if patches._session is not None:
                patches._session.notice("no-kernel", message, caller())

        listeners.append(kept_in_fp32)
        self._undo.append(lambda: listeners.remove(kept_in_fp32))

        def became_plain(parameter: Tensor, because: str) -> None:
            if patches._session is not None:
                patches._session.notice(
                    "plain-storage",
                    f"a weight of shape {tuple(parameter.shape)} is a plain FP32 tensor from here on, and is cast as "
                    f"under bf16-mixed, because {because}",
                    caller(),
                )

        on_plain.append(became_plain)
        self._undo.append(lambda: on_plain.remove(became_plain))

    def remove(self) -> None:
        """Put every original back; wrappers that live on in instances pass straight through."""
        self._forget_session()
        while self._undo:
            self._undo.pop()()

    def _forget_session(self) -> None:
        self._session = None

    def _wrap(self, owner: Any, name: str, handler: Callable[[Session], Callable[..., Any]]) -> None:
        """Replace ``owner.name``: its calls go to ``handler(session)(original, *args, **kwargs)``."""
        original = getattr(owner, name)
        patches = self

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            session = patches._session
            if session is None or torch.compiler.is_compiling():
                return original(*args, **kwargs)
            return handler(session)(original, *args, **kwargs)

        wrapper._halfstep = True  # type: ignore[attr-defined]
        self._set(owner, name, wrapper)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        own = name in vars(owner)
        before = vars(owner).get(name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before) if own else delattr(owner, name))


def _with_own_step(base: type[LRScheduler]) -> list[type[LRScheduler]]:
    """``base`` and its subclasses that define ``step`` themselves."""
    found = [base] if "step" in vars(base) else []
    for subclass in base.__subclasses__():
        found += [cls for cls in _with_own_step(subclass) if cls not in found]
    return found

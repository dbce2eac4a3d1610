"""The torch optimizer under AdamW, Adam, SGD and Lion: groups, storage, and one call of a backend for each step.

To torch, to schedulers, to gradient scalers and trainers it is an optimizer like any other: ``param_groups`` hold the
model's own parameters, ``state`` holds plain tensors, and `step` may be called with a closure. What differs is how the
numbers are kept (`halfstep.optim.masters`, `halfstep.optim.moments`) and that a step reads and writes each of them
once. A step is made whole or not at all: first every update is prepared, then all are written, and whatever interrupts
that is raised when it is done (`halfstep.transaction`). Scale and skip reach that pass as scalars on the device: a
gradient scaler, PyTorch's too, sets ``grad_scale`` and ``found_inf`` on an optimizer that says
``_step_supports_amp_scaling``, and calls `step` whatever the flag says.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.autocast import LOW_PRECISION
from halfstep.optim import backends, masters, moments, pages
from halfstep.optim.adopting import adopt
from halfstep.optim.backends import BackendName
from halfstep.optim.clipping import inverse
from halfstep.optim.jobs import Jobs
from halfstep.optim.layout import (
    flat,
    is_dense,
    is_sharded,
    like,
    local,
    sharded_like,
    shards_first_dimension,
)
from halfstep.optim.loading import load_state, renamed
from halfstep.optim.masters import Master, Rounding
from halfstep.optim.moments import State
from halfstep.optim.options import check_storage
from halfstep.optim.release import GradientRelease
from halfstep.optim.rules import SGD, Rule
from halfstep.optim.surveying import gradient_coefficient, survey_of
from halfstep.optim.update import Backend, Job, Survey, Update
from halfstep.split import SplitTensor
from halfstep.transaction import to_the_end
from halfstep.transfer import moved


class MastersDroppedWarning(UserWarning):
    """Parameters changed their 16-bit format under an optimizer, and their masters' low bits are gone."""


class MasterOptimizer(Optimizer):
    """What the optimizers of `halfstep.optim` share.

    Args:
        master: where the FP32 master of a 16-bit parameter is kept; may differ between groups.
        state: the format of the optimizer's state; may differ between groups.
        rounding: of what a 24-bit master or no master drops; None: stochastic without a master, else to nearest.
        backend: what computes the update.
        seed: of stochastic rounding.
        release_gradients: step each parameter as soon as its gradient is there, and free it:
            `halfstep.optim.release`.

    Raises:
        TypeError: a parameter is neither float32, bfloat16 nor float16.
        ValueError: an option is unknown, or two do not go together.
    """

    _step_supports_amp_scaling = True

    steps_made: int  #: by this object, whole; skipped ones too
    _jobs: Jobs
    _ordinals: dict[int, int]  #: by the parameter's id
    _backends: dict[torch.device, Backend]
    _scalars: tuple[Tensor, Tensor | None] | None  #: coefficient and found_inf, inside `scaled`
    _unscales: bool  #: whether gradients are to be left multiplied by the coefficient

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        master: Master,
        state: State,
        rounding: Rounding | None,
        backend: BackendName,
        seed: int,
        release_gradients: bool,
    ) -> None:
        self.backend: BackendName = backend
        self.seed = seed
        self.release: GradientRelease | None = None
        self.steps_made = 0
        self._forget()
        super().__init__(params, {**defaults, "master": master, "state": state, "rounding": rounding})
        backends.choose(backend, next((local(p).device for p in self._parameters()), torch.device("cpu")))
        if release_gradients:
            self.release = GradientRelease(self)

    @abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The update rule of a parameter group with its present hyperparameters."""

    # As PyTorch's optimizers do it: torch.compiler.disable would import the compiler, which takes as long as torch.
    @torch._disable_dynamo  # type: ignore[untyped-decorator,no-untyped-call,attr-defined,unused-ignore]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; returns the closure's value.

        Not traced by ``torch.compile``: its kernels are compiled already, and a compiler that simplifies the rounding
        of a compensation takes it away.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        coefficient = None if scale is None else inverse(scale)
        if self.release is not None:
            self._unscales = False  # they are freed
            self.release.finish()
            return loss
        self._unscales = self._unscales or coefficient is not None
        if self._scalars is not None:
            coefficient, found_inf = self._scalars
        updates: list[Update] = []
        try:
            for group in self.param_groups:
                pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
                updates += self.updates(group, pairs, coefficient, found_inf)
        finally:
            self._unscales = False
        following = self.steps_made + 1

        def write() -> None:
            for update in updates:
                update.write()
            self.steps_made = following

        to_the_end(write, f"{type(self).__name__}.step()")
        return loss

    @property
    def is_scaled(self) -> bool:
        """Whether this is within `scaled`."""
        return self._scalars is not None

    def survey(self) -> Survey:
        """One look at all gradients as they are: norm, inf and NaN, largest magnitudes; over all shards."""
        self._scalars = None  # of a step that was interrupted
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        return survey_of(gradients, self.backend) if self.release is None else self.release.survey(gradients)

    def accumulating(self) -> contextlib.AbstractContextManager[None]:
        """For all micro-batches of a step but the last: within, ``release_gradients=True`` steps and frees nothing."""
        return contextlib.nullcontext() if self.release is None else self.release.accumulating()

    @torch.no_grad()
    def clipped_step(self, max_norm: float, *, inverse_scale: Tensor | float = 1.0, skip: bool = True) -> Survey:
        """Unscale, clip by the 2-norm and step, in two passes over memory: `survey`, then `step`.

        Args:
            max_norm: limit of the norm of the unscaled gradients; inf: no clipping.
            inverse_scale: what the gradients are to be multiplied by before; a number, or 0-d on the device.
            skip: change nothing where a gradient holds inf or NaN.

        Returns:
            The survey, of the gradients as they were; times ``inverse_scale`` its norm is that of the true ones.
        """
        if self.release is not None:
            raise RuntimeError(
                "clipped_step() comes too late with release_gradients=True: the backward pass has stepped the "
                "parameters. Set optimizer.release.max_grad_norm before it, and call step()"
            )
        if not (isinstance(max_norm, int | float) and max_norm > 0):
            raise ValueError(f"max_norm must be a positive number, or inf for no clipping, not {max_norm!r}")
        survey = self.survey()
        with self.scaled(gradient_coefficient(survey, max_norm, inverse_scale), survey.found_inf if skip else None):
            self.step()
        return survey

    @contextlib.contextmanager
    def scaled(self, coefficient: Tensor, found_inf: Tensor | None, *, in_memory: bool = False) -> Iterator[None]:
        """Within, `step` multiplies gradients by ``coefficient``, and changes nothing where ``found_inf`` is not 0.

        Args:
            in_memory: leave them multiplied in ``.grad``, as PyTorch's optimizers do, but FP16 ones, which would lose
                what they were scaled for; a gradient in the host's memory while it is read anyway.
        """
        self._scalars, self._unscales = (coefficient, found_inf), in_memory
        try:
            yield
        finally:
            self._scalars, self._unscales = None, False

    @torch.no_grad()
    def updates(
        self,
        group: dict[str, Any],
        pairs: Iterable[tuple[Tensor, Tensor]],
        coefficient: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Update]:
        """What steps these parameters of a group with these gradients, prepared; nothing is written yet."""
        rule = self.rule(group)
        by_device: dict[torch.device, Update] = {}
        states = rule.states
        unscale = coefficient is not None and self._unscales
        for parameter, gradient in pairs:
            copied: list[tuple[Tensor, Tensor]] = []
            job = self._job(parameter, gradient, group, rule, states, copied)
            device = job.parameter.device
            if (update := by_device.get(device)) is None:
                update = by_device[device] = Update(
                    self._backend(device),
                    rule,
                    stochastic=_rounding(group) == "stochastic",
                    coefficient=_scalar(coefficient, device),
                    found_inf=_scalar(found_inf, device),
                    unscale=unscale,
                )
            update.jobs.append(job)
            if unscale:
                update.scaled.append((gradient, job, gradient._version))
            update.copied += copied
            if isinstance(parameter, SplitTensor):
                update.in_planes.append(parameter)
        if self._jobs.dropped:
            self._tell_of_dropped_masters()
        return list(by_device.values())

    def master(self, parameter: Tensor) -> Tensor:
        """The FP32 master of a parameter of this optimizer: a new tensor of its shape (of a sharded one, this part)."""
        ours = local(parameter.detach())
        group = self._group_of(parameter)
        extra = masters.extra(group["master"], _rounding(group), parameter.dtype)
        kept = self.state[parameter].get(extra[0]) if extra and parameter in self.state else None
        if kept is None:
            return ours.float().clone()
        dense = ours if is_dense(ours) else ours.contiguous()
        master = masters.decode(flat(dense), flat(like(local(kept), dense)))
        return torch.empty_strided(dense.shape, dense.stride(), dtype=torch.float32, device=ours.device).copy_(
            master.as_strided(dense.shape, dense.stride())
        )

    def adopt(self, parameter: Tensor, float32: Tensor) -> None:
        """Take ``float32``, the values that a parameter had before it was put into 16 bits, as its master.

        The parameter becomes their rounding, as the storage of its group has it; a master with fewer bits, or none,
        holds what it can, to nearest. State of steps that were taken in FP32 stays.

        Raises:
            ValueError: this optimizer does not step the parameter, or the shapes differ.
        """
        group = self._group_of(parameter)
        adopt(self, parameter, float32, group, masters.extra(group["master"], _rounding(group), parameter.dtype))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_storage(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._forget()
        if self.release is not None:
            self.release.hook()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; with it a step that was interrupted is given up."""
        self._scalars = None
        if self.release is not None:
            self.release.abandon()
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it is: no entry is cast to its parameter's format.

        The state of an optimizer with other storage (another ``master`` or ``state``, or torch's own optimizer of this
        name) is converted to this one's. Hyperparameters are those of the state, as in torch; storage stays as it was
        constructed. Entries that somebody else keeps beside a parameter's state come back as they were saved.

        Raises:
            KeyError: it has no ``param_groups`` or no ``state``, as in torch; nothing has changed then.
            ValueError: groups or shapes do not match; nothing has changed then.
        """
        load_state(self, state_dict)
        self._forget()
        if self.release is not None:
            self.release.load(state_dict)

    def new_state(self, parameter: Tensor, group: dict[str, Any], rule: Rule) -> dict[str, Any]:
        """The state of a parameter before its first step, shaped and sharded as the parameter."""
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=local(parameter).device)}
        extra = masters.extra(group["master"], _rounding(group), parameter.dtype)
        if extra is not None:
            name, dtype = extra
            state[name] = pages.zeros_like(parameter, dtype)
            if name == "master":
                state[name].copy_(parameter)
        form = moments.format_for(group["state"], parameter.shape)
        if form == "8bit" and is_sharded(parameter) and not _groups_can_shard(parameter):
            form = "fp32"
        for name, square in rule.states:
            dtype = (moments.SQUARE_DTYPES if square else moments.SIGNED_DTYPES)[form]
            if form == "8bit":
                state[f"{name}_codes"] = pages.zeros_like(parameter, dtype)
                state[f"{name}_scale"] = _new_scale(parameter)
            else:
                state[name] = pages.zeros_like(parameter, dtype)
        return state

    def _job(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: dict[str, Any],
        rule: Rule,
        states: tuple[tuple[str, bool], ...],
        copied: list[tuple[Tensor, Tensor]],
    ) -> Job:
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not take sparse gradients (parameter of shape {tuple(parameter.shape)}): "
                "build the embedding with sparse=False, or give its parameters to torch.optim.SparseAdam"
            )
        state = self.state[parameter]
        if "step" not in state or (states and moments.entry(state, states[-1][0]) not in state):
            self._complete(state, parameter, group, rule)
        kept_as = masters.extra(group["master"], _rounding(group), parameter.dtype)
        if kept_as is not None:
            kept = state.get(kept_as[0])
            if kept is None or (kept.dtype is not kept_as[1] and kept.dtype in LOW_PRECISION):
                # The parameter had another format when it was stepped before.
                if kept is not None:
                    self._jobs.dropped.append(parameter)
                state[kept_as[0]] = self.new_state(parameter, group, rule)[kept_as[0]]
        ordinal = self._ordinal(parameter)
        return self._jobs.job(parameter, gradient, state, states, kept_as, ordinal, copied, self._name)

    def _complete(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any], rule: Rule) -> None:
        """Add what a state lacks: all before the first step, or a moment that hyperparameters ask for only now."""
        new = self.new_state(parameter, group, rule)
        present = [name for name, _ in rule.states if moments.entry(state, name) in state]
        for name in present:
            for entry in moments.entries(name):
                new.pop(entry, None)
        if isinstance(rule, SGD) and rule.momentum:
            # It counts its momentum's steps: the first sets the buffer, as PyTorch's does where there is none, whenever
            # the momentum was switched on; a buffer that somebody put there has had its first.
            new["step"].fill_(len(present))
            state.pop("step", None)
        state.update({**new, **state})

    def _tell_of_dropped_masters(self) -> None:
        dropped = self._jobs.dropped
        names = ", ".join(self._name(parameter) for parameter in dropped[:3])
        more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        dropped.clear()
        warnings.warn(
            f"the format of {names}{more} has changed since the last step: what was kept of the FP32 masters beside "
            "the old one cannot be read beside the new one and is dropped; masters start from the weights as they are. "
            "To keep it, take optim.export_fp32(model, optimizer) before model.half(), bfloat16() or float(), and "
            "optim.import_fp32 after",
            MastersDroppedWarning,
            stacklevel=8,  # past what PyTorch puts around a step
        )

    def _name(self, parameter: Tensor) -> str:
        """What messages call a parameter: its name where the groups were made of named parameters."""
        group = self._group_of(parameter)
        names = group.get("param_names")
        index = next(i for i, p in enumerate(group["params"]) if p is parameter)
        known = f" {names[index]!r}" if names is not None and index < len(names) else ""
        return f"parameter {self._ordinal(parameter)}{known} of shape {tuple(parameter.shape)}"

    def _backend(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = backends.choose(self.backend, device)[0]
        return self._backends[device]

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _group_of(self, parameter: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                return group
        raise ValueError(f"this optimizer does not step the parameter of shape {tuple(parameter.shape)}")

    def _ordinal(self, parameter: Tensor) -> int:
        if id(parameter) not in self._ordinals:  # at first, and where a parameter was put in another's place
            self._ordinals = {id(p): i for i, p in enumerate(self._parameters())}
            self._jobs.keep_only(self._ordinals)
        return self._ordinals[id(parameter)]

    def _forget(self) -> None:
        """Drop what is derived from groups and state."""
        self._jobs = Jobs(self.seed)
        self._ordinals = {}
        self._backends = {}
        self._scalars = None
        self._unscales = False

    def __getstate__(self) -> dict[str, Any]:
        released = None if self.release is None else self.release.options()
        own = {"backend": self.backend, "seed": self.seed, "released": released}
        return {**super().__getstate__(), **own}  # type: ignore[no-untyped-call,unused-ignore]

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_copy, released = "released" in state, state.pop("released", None)
        super().__setstate__(state)
        for key, held in self.state.items():
            if isinstance(key, Tensor) and isinstance(held, dict):
                self.state[key] = renamed(held, key)
        self.steps_made = 0
        self._forget()
        if is_copy:
            self.release = None if released is None else GradientRelease(self, **released)


def _rounding(group: dict[str, Any]) -> Rounding:
    chosen: Rounding | None = group["rounding"]
    return chosen or ("stochastic" if group["master"] == "none" else "nearest")


def _groups_can_shard(parameter: Tensor) -> bool:
    return moments.has_rows(parameter.shape) and shards_first_dimension(parameter)


def _new_scale(parameter: Tensor) -> Tensor:
    ours = local(parameter)
    part = torch.zeros(moments.scale_shape(ours.shape), dtype=torch.float32, device=ours.device)
    return sharded_like(part, parameter, moments.scale_shape(parameter.shape)) if is_sharded(parameter) else part


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else moved(value.detach().reshape(()), device, torch.float32)

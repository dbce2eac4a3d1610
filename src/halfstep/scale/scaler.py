"""Dynamic loss scaling: PyTorch's scaler, with what it lacks.

FP16 gradients below 2^-25 become zero, so the loss is multiplied by a scale before backward and the gradients are
divided by it before the step::

    scaler.scale(loss).backward()
    scaler.step(optimizer)          # unscale; look for inf and NaN; step unless they were found
    scaler.update()                 # move the scale: `halfstep.scale.trajectory`

`GradScaler` subclasses PyTorch's, so every library that takes PyTorch's takes it. Beyond it: a floor and a cap,
hysteresis, a static scale, an initial scale that is measured, a scale per loss, whether the step was applied, the
number of skipped steps, and an error with a diagnosis instead of skipping for ever. None of it makes the host wait for
the device where PyTorch's scaler does not: `halfstep.scale.skips`.

Source: Micikevicius et al. 2018, Mixed Precision Training; ``torch/amp/grad_scaler.py``.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

from halfstep.scale.diagnosis import Cause, LossScaleError, explain
from halfstep.scale.fused import divides_itself, is_listened_to
from halfstep.scale.gradients import Group, agreed, holds_fp16, multiply_
from halfstep.scale.measure import first_scale, in_float32
from halfstep.scale.separate import SeparateLosses
from halfstep.scale.skips import Skip, SkipCount, Verdict, Verdicts, read_together, total
from halfstep.scale.surveyed import Findings, Unscaling, flags_of, surveying
from halfstep.scale.trajectory import DEFAULT_SCALE, Rule, bounds, move_, take_
from halfstep.scale.watch import Watch

LIMITS = ("min_scale", "max_scale", "hysteresis", "dynamic", "consecutive_hysteresis")


class GradScaler(torch.amp.GradScaler):
    """PyTorch's gradient scaler with a floor, a cap, a skip flag, and an end to skipping.

    Args:
        device: "cuda" or "cpu", as in PyTorch.
        init_scale: as in PyTorch; or "auto", measured from the first loss by running its backward pass once more.
        growth_factor, backoff_factor, growth_interval, enabled: as in PyTorch.
        min_scale: the scale never falls below this; 1, or ``init_scale`` where that is lower.
        max_scale: the scale never grows above this; 2^24, or ``init_scale`` where that is higher.
        max_skipped: raise `LossScaleError` when this many updates in a row were skipped; 0 never does.
        hysteresis: lower the scale at this many overflowing updates in a row, and at each one after them; 1: at once.
        consecutive_hysteresis: False counts all overflowing updates since the scale last grew, in a row or not, as
            Megatron-LM does, and DeepSpeed unless it is given this option.
        dynamic: False keeps the scale where it is; steps that overflow are skipped all the same.
        process_group: the ranks that skip together; "auto": all of them, wherever there are several and their gradients
            may differ (not under FSDP2, nor under a watched DistributedDataParallel); None: each rank for itself.
        on_skip: called by `update` with a `Skip` for each skipped step; makes `update` wait for the device.

    Raises:
        ValueError: bounds that contradict each other or the initial scale.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float | Literal["auto"] = DEFAULT_SCALE,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        min_scale: float | None = None,
        max_scale: float | None = None,
        max_skipped: int = 50,
        hysteresis: int = 1,
        consecutive_hysteresis: bool = True,
        dynamic: bool = True,
        process_group: Group = "auto",
        on_skip: Callable[[Skip], object] | None = None,
    ) -> None:
        start, min_scale, max_scale = bounds(init_scale, min_scale, max_scale)
        super().__init__(device, start, growth_factor, backoff_factor, growth_interval, enabled)
        self._growth_factor, self._backoff_factor = growth_factor, backoff_factor  # PyTorch: not where disabled
        self._growth_interval = growth_interval
        factors = (growth_factor, backoff_factor, growth_interval)
        self._limits = Rule(*factors, min_scale, max_scale, hysteresis, dynamic, consecutive_hysteresis)
        self._max_skipped, self._on_skip = max_skipped, on_skip
        self._process_group: Group = process_group
        self._to_be_measured = init_scale == "auto"
        self._init_overflows = 0
        self._overflows: Tensor | None = None
        self._skips = SkipCount()
        self._separate = SeparateLosses()
        self._begin()

    def _begin(self) -> None:
        """What neither a state dict nor a copy carries: it belongs to an iteration, or to a process."""
        self._watched = Watch()
        self._verdicts = Verdicts()
        self._together = False  # whether scale() was called in this iteration

    @property
    def step_was_applied(self) -> bool:
        """Whether the last `step` changed the parameters. Waits for the device where the optimizer is fused."""
        return self._verdicts.last is None or not self._learn(self._verdicts.last)

    def was_applied(self, optimizer: Optimizer) -> bool:
        """Whether the last `step` of this optimizer changed its parameters; True where it never stepped."""
        verdict = self._verdicts.get(optimizer)
        return verdict is None or not self._learn(verdict)

    def read(self, optimizer: Optimizer, *numbers: Tensor) -> tuple[bool, float | None, list[float]]:
        """`was_applied`, the scale (None where disabled), numbers of one element: in one wait. Before `step`: of it."""
        if not self.is_enabled() or self._scale is None:
            return True, None, read_together(numbers, None)
        verdict = self._verdicts.present(optimizer, self._per_optimizer_states, self._scale.device)
        scale, *values = read_together([self._scale, *numbers], verdict)  # which knows its answer then
        return self.was_applied(optimizer), scale, values

    @property
    def skipped_steps(self) -> int:
        """Iterations (calls of `update`) so far in which a step was skipped."""
        return self._skips.in_all

    def step_scheduler(self, scheduler: Any, *args: Any, **kwargs: Any) -> bool:
        """Step a learning rate scheduler, unless its optimizer's last step was skipped; returns whether it did.

        Call it once per optimizer step, before or after `update`.
        """
        if not self.was_applied(scheduler.optimizer):
            return False
        scheduler.step(*args, **kwargs)
        return True

    def watch(self, model: nn.Module) -> None:
        """Look at ``model`` before its forward passes, which adds three things.

        Running statistics of its normalisation layers are put back when a step is skipped; errors name its parameters;
        and the diagnosis can tell data that are not finite from a forward pass that overflows. Watch a compiled model
        after ``torch.compile``, a replicated one after ``DistributedDataParallel``.
        """
        if self.is_enabled():
            self._watched.model(model)

    def keep_statistics(self, model: nn.Module) -> None:
        """Remember a model's running statistics as they are now, once per iteration; `update` puts them back."""
        if self.is_enabled():
            self._watched.statistics.keep(model)

    def cause_of_skip(self) -> Cause:
        """Why the present iteration's step is skipped; looked for when first asked, before data and losses are gone."""
        return self._watched.cause()

    def note_inputs(self, values: Iterable[Any]) -> None:
        """Tensors among ``values`` are data: a skipped step looks whether they are finite, if they still exist then."""
        if self.is_enabled():
            self._watched.inputs(values)

    def scale(self, outputs: Any) -> Any:
        """Multiply the loss, or each of several, by the scale; a 16-bit loss is scaled in FP32, where it fits."""
        if not self.is_enabled():
            return outputs
        if isinstance(outputs, Tensor):
            self._see(outputs)
            self._together = True
            return super().scale(in_float32(outputs))
        if isinstance(outputs, Iterable):
            scaled = [self.scale(output) for output in outputs]
            return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled
        raise ValueError(f"scale() takes a tensor or several, not {type(outputs).__name__}")

    @contextlib.contextmanager
    def scaled_loss(
        self, loss: Tensor, optimizers: Optimizer | Iterable[Optimizer], name: Hashable
    ) -> Iterator[Tensor]:
        """One of several losses that share parameters, at a scale of its own that its own overflows move::

            with scaler.scaled_loss(loss, optimizer, "adversarial") as scaled:
                scaled.backward()

        On exit the gradients of this backward pass are brought to the common scale, in FP32, and added to those that
        were there; `unscale_`, clipping, `step` and `update` then follow as always, and losses that were scaled by
        `scale` may take part. If any loss overflows the step is skipped, and only that loss's scale is lowered.

        Args:
            loss: 1 element.
            optimizers: those whose parameters the backward pass reaches.
            name: a str or int; a loss keeps its scale under its name.

        Raises:
            HalfGradientError: a gradient is FP16, where bringing it to another scale would lose it.
        """
        if not self.is_enabled():
            yield loss
            return
        self._see(loss)
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(loss.device)
        assert self._scale is not None
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        with self._separate.collecting(name, self._scale, optimizers, self._multiply_) as scale:
            yield in_float32(loss) * scale

    def check_unscaled(self, optimizer: Optimizer) -> None:
        """Look for inf and NaN in gradients that were unscaled as they arrived; stands in for `unscale_`."""
        if not self.is_enabled():
            return
        self._check_inf_per_device(optimizer)  # type: ignore[no-untyped-call,unused-ignore]  # typed since torch 2.13
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.UNSCALED

    def take_survey(self, optimizer: Optimizer, found: Findings) -> Unscaling:
        """Stands in for `unscale_` where an optimizer looks at its gradients itself; `step` then checks nothing more.

        Args:
            found: of the gradients as they are, which nobody divides: `halfstep.scale.surveyed`. After `unscale_` its
                verdict stays, and the inverse that this returns is 1.
        """
        scale, _ = self._check_scale_growth_tracker("take_survey")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        inverse = torch.ones_like(scale)
        if state["stage"] is OptState.READY:
            inverse = scale.double().reciprocal().float()
            flags = flags_of(found, inverse, look_again=self._limits.min_scale < 1)
            flags = agreed(flags, torch.zeros_like(scale), optimizer, self._watched, self._process_group)
            state.update(found_inf_per_device=flags, stage=OptState.UNSCALED)
        return Unscaling(scale, inverse, total(state["found_inf_per_device"].values(), scale.device))

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer`` unless its gradients hold inf or NaN; `step_was_applied` then says which.

        Returns what ``optimizer.step`` returns, None when skipped.

        Raises:
            HalfGradientError: gradients are FP16, and neither FP32 masters nor a fused optimizer unscale them.
        """
        if not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        self._verdicts.forget(optimizer, state)
        if state["stage"] is OptState.READY and (surveyor := surveying(optimizer)) is not None:
            _, inverse, found_inf = self.take_survey(optimizer, surveyor.survey())
            with surveyor.scaled(inverse, found_inf, in_memory=True):  # to leave in .grad what PyTorch's scaler leaves
                return self.step(optimizer, *args, **kwargs)
        listened_to = is_listened_to(optimizer)
        may_grow = self._limits.min_scale < 1  # a gradient, when it is divided
        if (may_grow or listened_to) and state["stage"] is not OptState.STEPPED and divides_itself(optimizer):
            if state["stage"] is OptState.READY:  # its kernel divides after the check, so divide and look before
                # FP16 is divided in FP32, within the step, where no quotient overflows.
                (self._check_inf_per_device if holds_fp16(optimizer) else self.unscale_)(optimizer)
            if listened_to and self._learn(self._verdict(optimizer)):
                state["stage"] = OptState.STEPPED
                return None
        result = super().step(optimizer, *args, **kwargs)
        if self._verdict(optimizer).is_known:
            self._learn(self._verdict(optimizer))
        return result

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Move the scale by what the steps since the last call found, inside its floor and cap.

        Args:
            new_scale: take this scale instead; a number, or a tensor of one element of any shape.

        Raises:
            LossScaleError: ``max_skipped`` iterations in a row were skipped.
        """
        if not self.is_enabled():
            return
        scale, good = self._check_scale_growth_tracker("update")
        assert self._overflows is not None
        verdict = self._verdicts.together(self._per_optimizer_states, scale.device)
        if verdict is None and new_scale is None:
            raise AssertionError("No inf checks were recorded prior to update.")
        rule = self._rule
        before = scale.clone() if self._on_skip is not None else None
        if new_scale is not None:
            take_(scale, new_scale, rule)
        elif verdict is not None and (self._together or not self._separate.any_used()):
            void = self._separate.found_inf()
            move_(scale, good, self._overflows, verdict.found_inf, rule, void=void)
        self._separate.move(rule)
        try:
            if verdict is not None:
                if not verdict.is_known or verdict.overflowed:
                    self._watched.statistics.restore(None if verdict.is_known else verdict.found_inf)
                self._count(verdict, before)
        finally:
            self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
            self._watched.forget()
            self._together = False

    def get_scale(self, name: Hashable | None = None) -> float:
        """The scale, or that of the loss of this name (see `scaled_loss`); 1 where disabled. Waits for the device."""
        if name is None or not self.is_enabled():
            return super().get_scale()
        return self._separate.get_scale(name)

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's five entries, and this class's; numbers, strings and dicts of them."""
        state = super().state_dict()
        if self.is_enabled():
            state |= {name: getattr(self._limits, name) for name in LIMITS} | {
                "max_skipped": self._max_skipped,
                "_overflows": self._get_overflows(),
                "_to_be_measured": self._to_be_measured,
                "_losses": self._separate.state(),
                **self._skips.state(),
            }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of PyTorch's own scaler (floor, cap and counts then stay as they are)."""
        super().load_state_dict(state_dict)
        if not self.is_enabled():
            return
        self._limits = replace(self._rule, **{name: state_dict[name] for name in LIMITS if name in state_dict})
        self._max_skipped = state_dict.get("max_skipped", self._max_skipped)
        self._skips = self._skips.loaded(state_dict)
        self._to_be_measured = state_dict.get("_to_be_measured", False)
        self._separate = SeparateLosses(state_dict.get("_losses", {}))
        self._init_overflows = state_dict.get("_overflows", 0)
        self._init_scale = self._limits.within(self._init_scale)
        if self._scale is not None and self._overflows is not None:
            self._scale.fill_(self._init_scale)
            self._overflows.fill_(self._init_overflows)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.is_enabled():
            state |= {"_init_overflows": self._get_overflows(), "_overflows": None, "_skips": self._skips.loaded({})}
        del state["_watched"], state["_verdicts"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin()
        super().__setstate__(state)

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        super()._lazy_init_scale_growth_tracker(dev)
        self._overflows = torch.full((), self._init_overflows, dtype=torch.int32, device=dev)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return self._multiply_(optimizer, inv_scale, found_inf, allow_fp16, self._limits.min_scale < 1)

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        return None if self._verdict(optimizer).overflowed else optimizer.step(*args, **kwargs)

    @property
    def _rule(self) -> Rule:
        """The limits with the factors as they are now: PyTorch has setters for these."""
        now = {name: getattr(self, f"_{name}") for name in ("growth_factor", "backoff_factor", "growth_interval")}
        if any(getattr(self._limits, name) != value for name, value in now.items()):
            self._limits = replace(self._limits, **now)
        return self._limits

    def _multiply_(
        self, optimizer: Optimizer, factor: Tensor, found_inf: Tensor, allow_fp16: bool, look_again: bool
    ) -> dict[torch.device, Tensor]:
        who = (self._watched, self._process_group)
        return multiply_(optimizer, factor, found_inf, *who, allow_fp16=allow_fp16, look_again=look_again)

    def _get_overflows(self) -> int:
        return self._init_overflows if self._overflows is None else int(self._overflows.item())

    def _see(self, loss: Tensor) -> None:
        """A loss, before it is scaled: remember it, and measure the first one if that was asked for."""
        self._watched.loss(loss)
        if self._to_be_measured and (scale := first_scale(loss, self._limits, self._process_group)) is not None:
            self._to_be_measured = False
            self._init_scale = scale
            if self._scale is not None:
                self._scale.fill_(scale)

    def _verdict(self, optimizer: Optimizer) -> Verdict:
        assert self._scale is not None  # step() has checked
        return self._verdicts.of(optimizer, self._per_optimizer_states[id(optimizer)], self._scale.device)

    def _learn(self, verdict: Verdict) -> bool:
        """Whether it overflowed; the cause is looked for as soon as the host learns of it, while all is at hand."""
        if verdict.overflowed and self._per_optimizer_states:
            self._watched.cause()
        return verdict.overflowed

    def _count(self, verdict: Verdict, before: Tensor | None) -> None:
        """Count an update; tell of a skip, and raise at too many, reading the device only if that may be necessary."""
        skips = self._skips
        skips.add(verdict)
        if before is not None and self._on_skip is not None and verdict.overflowed:
            scales = (float(before.item()), self.get_scale())
            self._on_skip(Skip(self.cause_of_skip(), *scales, skips.in_a_row, skips.in_all))
        limit = self._max_skipped
        if limit and skips.may_have_reached(limit) and skips.in_a_row >= limit:
            cause, seen = self.cause_of_skip(), self._watched.saw_inputs()
            scale = min([self.get_scale(), *self._separate.scales()])
            raise LossScaleError(explain(cause, skips.in_a_row, scale, self._rule, inputs_seen=seen))

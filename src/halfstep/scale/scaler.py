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

Whatever raises inside `unscale_`, `step` or `update` (Ctrl-C, a hook, no memory), gradients are divided by the scale
once. `unscale_` divides all of them or none, and `update` moves everything or nothing. A `step` that raised may be
called again if nothing was written; if another backward pass begins instead, it is given up, or, where it was made,
`update` is made up for.

Source: Micikevicius et al. 2018, Mixed Precision Training; ``torch/amp/grad_scaler.py``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from halfstep.scale.buffers import Entry
from halfstep.scale.diagnosis import Cause, LossScaleError, explain
from halfstep.scale.fused import divides_itself, is_listened_to
from halfstep.scale.gradients import Division, Group, agreed, by_kind, holds_fp16, multiply_, parameters
from halfstep.scale.measure import first_scale, in_float32
from halfstep.scale.progress import Progress, note_half_written
from halfstep.scale.separate import SeparateLosses
from halfstep.scale.skips import Skip, SkipCount, Verdict, Verdicts, read_together, total
from halfstep.scale.surveyed import Findings, Unscaling, flags_of, surveying
from halfstep.scale.trajectory import DEFAULT_SCALE, Move, Rule, bounds, take_
from halfstep.scale.watch import Watch
from halfstep.transaction import to_the_end

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
        self._watched = Watch(scales=self.is_enabled())
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

        Buffers that they write (running statistics, moving averages) are put back when the step is skipped that they
        are part of; errors name its parameters; and the diagnosis can tell data that are not finite from a forward pass
        that overflows. Watch a compiled model after ``torch.compile``, a replicated one after
        ``DistributedDataParallel``.
        """
        self._watched.model(model)

    def forward_of(self, model: nn.Module, *, keeps: bool | None = None) -> contextlib.AbstractContextManager[None]:
        """Within, forward passes of ``model``, of its parts, and of any watched model, are part of this scaler's step.

        Args:
            keeps: whether to remember buffers; None: where the scaler is enabled, for else it skips no step.
        """
        self._watched.keeps = self.is_enabled() if keeps is None else keeps
        return self._watched.forward_of(model)

    def backward_starts(self, loss: Tensor) -> None:
        """Where `scale` is not called: a backward pass of ``loss`` begins."""
        if self._watched.keeps:
            self._watched.buffers.before_backward([loss])

    def backward_ended(self) -> None:
        """Such a backward pass has ended."""
        if self._watched.keeps:
            self._watched.buffers.after_backward()

    def stepped_outside(self, optimizer: Optimizer, *, applied: bool) -> None:
        """A step that `step` did not make, or make here: where it was not applied, buffers are put back."""
        claimed = self._watched.buffers.claim(optimizer)
        if not applied:
            self._watched.buffers.put_back(claimed)
        self._watched.buffers.forget(claimed)

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
            return self._watched.seen_through(super().scale(in_float32(outputs)))
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
            yield self._watched.seen_through(in_float32(loss) * scale)

    def check_unscaled(self, optimizer: Optimizer) -> None:
        """Look for inf and NaN in gradients that were unscaled as they arrived; stands in for `unscale_`."""
        if not self.is_enabled():
            return
        state = self._state_of(optimizer)
        self._check_inf_per_device(optimizer)  # type: ignore[no-untyped-call,unused-ignore]  # typed since torch 2.13
        state["stage"] = OptState.UNSCALED

    def take_survey(self, optimizer: Optimizer, found: Findings) -> Unscaling:
        """Stands in for `unscale_` where an optimizer looks at its gradients itself; `step` then checks nothing more.

        Args:
            found: of the gradients as they are, which nobody divides: `halfstep.scale.surveyed`. After `unscale_` its
                verdict stays, and the inverse that this returns is 1.
        """
        scale, _ = self._check_scale_growth_tracker("take_survey")
        state = self._state_of(optimizer)
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError(_STEPPED_TWICE)
        inverse = torch.ones_like(scale)
        if state["stage"] is OptState.READY or "surveyed" in state:  # a survey that no step followed is of the past
            inverse = scale.double().reciprocal().float()
            flags = flags_of(found, inverse, look_again=self._limits.min_scale < 1)
            flags = agreed(flags, torch.zeros_like(scale), optimizer, self._watched, self._process_group)
            state = self._begin_state(optimizer)
            state.update(found_inf_per_device=flags, stage=OptState.UNSCALED, surveyed=True)
        return Unscaling(scale, inverse, total(state["found_inf_per_device"].values(), scale.device))

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer`` unless its gradients hold inf or NaN; `step_was_applied` then says which.

        Returns what ``optimizer.step`` returns, None when skipped.

        Raises:
            HalfGradientError: gradients are FP16, and neither FP32 masters nor a fused optimizer unscale them.
        """
        if not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        state = self._state_of(optimizer)
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError(_STEPPED_TWICE)
        progress = Progress(optimizer)
        scalars = {name: vars(optimizer).get(name) for name in ("grad_scale", "found_inf")}
        try:
            return self._step(optimizer, *args, **kwargs)
        except BaseException as error:
            for name, value in scalars.items():  # PyTorch's scaler has left its own there
                if value is None:
                    vars(optimizer).pop(name, None)
                else:
                    setattr(optimizer, name, value)
            self._interrupted(optimizer, progress, error)
            raise

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, in memory: all of them, or none if it raises.

        Raises:
            HalfGradientError: gradients are FP16.
            RuntimeError: they were divided already.
        """
        if not self.is_enabled():
            return
        scale, _ = self._check_scale_growth_tracker("unscale_")
        state = self._state_of(optimizer)
        if state["stage"] is OptState.UNSCALED:
            raise RuntimeError(_UNSCALED_TWICE)
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        inverse = scale.reciprocal() if scale.device.type == "mps" else scale.double().reciprocal().float()
        kinds = by_kind(optimizer, False, lambda parameter: self._watched.name_of(parameter, optimizer))
        division = Division(kinds, inverse, torch.zeros_like(scale), look_again=self._limits.min_scale < 1)
        divided = _first_gradient(optimizer)

        def write() -> None:
            division.write()
            state.update(
                found_inf_per_device=division.flags,
                divided=None if divided is None else TensorWeakRef(divided),  # one stands for all
                to_agree=True,
                stage=OptState.UNSCALED,
            )

        to_the_end(write, "unscale_()")
        self._agree(optimizer, state)

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
        rule, buffers = self._rule, self._watched.buffers
        before = scale.clone() if self._on_skip is not None else None
        moves: list[Move] = []
        taken = None
        if new_scale is not None:
            taken = scale.clone()
            take_(taken, new_scale, rule)
        elif verdict is not None and (self._together or not self._separate.any_used()):
            void = self._separate.found_inf()
            moves.append(Move(scale, good, self._overflows, verdict.found_inf, rule, void=void))
        moves += self._separate.moves(rule)
        claims = self._claims(scale.device)
        skips = self._skips if verdict is None else self._skips.with_one_more(verdict)
        skip = limit = None
        if verdict is not None:
            if before is not None and verdict.overflowed:
                skip = (self.cause_of_skip(), float(before.item()))
            if self._max_skipped and skips.may_have_reached(self._max_skipped) and skips.in_a_row >= self._max_skipped:
                limit = (self.cause_of_skip(), self._watched.saw_inputs())

        def write() -> None:
            if taken is not None:
                scale.copy_(taken)
            for move in moves:
                move.write()
            for entries, found in reversed(claims):
                if not found.is_known or found.overflowed:
                    buffers.put_back(entries, None if found.is_known else found.found_inf)
            for entries, _ in claims:
                buffers.forget(entries)
            self._skips = skips
            self._separate.forget()
            self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
            self._watched.forget()
            self._together = False

        to_the_end(write, "update()")
        if skip is not None and self._on_skip is not None:
            self._on_skip(Skip(*skip, self.get_scale(), skips.in_a_row, skips.in_all))
        if limit is not None:
            lowest = min([self.get_scale(), *self._separate.scales()])
            raise LossScaleError(explain(limit[0], skips.in_a_row, lowest, rule, inputs_seen=limit[1]))

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer waits for `update`."""
        state = self._per_optimizer_states.get(id(optimizer)) if self.is_enabled() else None
        return state is not None and state["stage"] is OptState.STEPPED

    def is_under_way(self) -> bool:
        """Whether anything was checked, divided or stepped since the last `update`."""
        return self.is_enabled() and bool(self._per_optimizer_states)

    def abandon(self, optimizer: Optimizer) -> None:
        """Forget what was checked of this optimizer's gradients, unless they are divided; it has not stepped."""
        state = self._per_optimizer_states.get(id(optimizer)) if self.is_enabled() else None
        if state is None:
            return
        if _is_divided(optimizer, state):
            state["interrupted"] = True
        else:
            del self._per_optimizer_states[id(optimizer)]

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
        super().__setstate__(state)
        self._begin()

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        try:
            super()._lazy_init_scale_growth_tracker(dev)
            self._overflows = torch.full((), self._init_overflows, dtype=torch.int32, device=dev)
        except BaseException:  # all three or none: the next loss makes them
            self._scale = self._growth_tracker = self._overflows = None
            raise

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
        if self._per_optimizer_states:
            self.resume()
        self._watched.loss(loss)
        self.backward_starts(loss)
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

    def _state_of(self, optimizer: Optimizer) -> dict[str, Any]:
        """PyTorch's state of an optimizer's step, with what this class adds to it."""
        state = self._per_optimizer_states[id(optimizer)]
        if "optimizer" not in state:
            state["optimizer"] = weakref.ref(optimizer)
        return state

    def _begin_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of a step of which nothing has happened."""
        self._per_optimizer_states.pop(id(optimizer), None)
        return self._state_of(optimizer)

    def _step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        state = self._state_of(optimizer)
        self._verdicts.forget(optimizer, state)
        surveyor = surveying(optimizer)
        if surveyor is not None and (
            state["stage"] is OptState.READY or ("surveyed" in state and not surveyor.is_scaled)
        ):
            _, inverse, found_inf = self.take_survey(optimizer, surveyor.survey())
            with surveyor.scaled(inverse, found_inf, in_memory=True):  # to leave in .grad what PyTorch's scaler leaves
                return self._step(optimizer, *args, **kwargs)
        self._agree(optimizer, state)
        if self._watched.keeps and "claims" not in state:
            state["claims"] = self._watched.buffers.claim(optimizer)
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

    def _interrupted(self, optimizer: Optimizer, progress: Progress, error: BaseException) -> None:
        """A step has raised: its state becomes that of a step that was made, or of one that was not begun."""
        state = self._state_of(optimizer)
        if state["stage"] is OptState.STEPPED or progress.has_moved():
            if state["stage"] is not OptState.STEPPED and not progress.is_whole:
                note_half_written(error, optimizer)
            state.update(stage=OptState.STEPPED, interrupted=True)
        elif "surveyed" in state or state["stage"] is OptState.READY:
            self._begin_state(optimizer)
        else:
            state["interrupted"] = True  # the gradients are divided, and the step may be called again

    def resume(self) -> None:
        """Another backward pass begins: bring interrupted steps to an end.

        One that was made gets the `update` that it lacks. One that was not is given up; gradients of it that are still
        there, and that others are about to be added to, are multiplied by the scale again.
        """
        was_made = False
        for key, state in list(self._per_optimizer_states.items()):
            optimizer = state["optimizer"]() if "optimizer" in state else None
            if optimizer is None:
                continue
            interrupted = "interrupted" in state
            if state["stage"] is OptState.STEPPED:
                was_made |= interrupted
            elif state["stage"] is OptState.UNSCALED and (
                interrupted or all(p.grad is None for p in parameters(optimizer))
            ):
                self._give_up(key, optimizer, state)
        if was_made:
            self.update()

    def _give_up(self, key: int, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if self._scale is None or not _is_divided(optimizer, state):
            del self._per_optimizer_states[key]
            return
        kinds = by_kind(optimizer, True, lambda parameter: self._watched.name_of(parameter, optimizer))
        scaling = Division(kinds, self._scale, torch.zeros_like(self._scale), look_again=False)

        def write() -> None:
            scaling.write()
            self._per_optimizer_states.pop(key, None)

        to_the_end(write, "an interrupted step's end")

    def _agree(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Make the flags those of all ranks, unless they are."""
        if "to_agree" in state:
            assert self._scale is not None
            flags, zero = state["found_inf_per_device"], torch.zeros_like(self._scale)
            flags = agreed(flags, zero, optimizer, self._watched, self._process_group)
            state["found_inf_per_device"] = flags
            del state["to_agree"]

    def _claims(self, device: torch.device) -> list[tuple[list[Entry], Verdict]]:
        """The forward passes of each optimizer's step, and the verdict on it."""
        claims: list[tuple[list[Entry], Verdict]] = []
        for state in self._per_optimizer_states.values():
            optimizer = state["optimizer"]() if "optimizer" in state else None
            if optimizer is None or not state["found_inf_per_device"]:
                continue
            entries = state["claims"] if "claims" in state else self._watched.buffers.claim(optimizer)
            if entries:
                claims.append((entries, self._verdicts.on(optimizer, state, device)))
        return claims


_STEPPED_TWICE = (
    "step() has already been called since the last update(). (If the loop was interrupted between the two, call "
    "update() before you go on.)"
)
_UNSCALED_TWICE = (
    "unscale_() has already been called on this optimizer since the last update(). (If the loop was interrupted "
    "between unscale_() and step(), call step(), or drop the gradients by optimizer.zero_grad(set_to_none=True).)"
)


def _first_gradient(optimizer: Optimizer) -> Tensor | None:
    return next((p.grad for p in parameters(optimizer) if p.grad is not None), None)


def _is_divided(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Whether the gradients that `unscale_` has divided are the optimizer's still."""
    divided = state.get("divided")
    return divided is not None and divided() is not None and divided() is _first_gradient(optimizer)

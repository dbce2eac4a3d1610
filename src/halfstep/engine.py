"""`MixedPrecision`: a training loop under a policy, in three calls.

::

    mp = halfstep.MixedPrecision(model, optimizer)     # policy="auto"
    for x, y in loader:
        with mp.autocast():
            loss = criterion(model(x), y)
        mp.backward(loss)
        step = mp.step(max_grad_norm=1.0)
        if step.applied:
            scheduler.step()

What `MixedPrecision.step` does, in this order::

    gradients of 16-bit parameters to FP32 masters      (a model that brings such parameters)
    unscale, in FP32; look for inf and NaN              (loss-scaling policies)
    clip by the norm of the unscaled gradients          (if asked)
    optimizer.step()                                    unless inf or NaN was found: then nothing changes, and
                                                        what the forward pass wrote to buffers is put back
    move the loss scale; zero the gradients

That is how any torch optimizer is stepped; unscaling and clipping read and write all gradients, once each. The host
waits once: to know whether to step, or, of one that is told on the device, after it. Those of `halfstep.optim` do all
of it in two passes::

    read all gradients: norm, largest magnitudes, inf and NaN           only where it clips or scales
    read each parameter's gradient, times 1 / scale and what clipping takes; step the parameter

Two numbers on the device tell the second pass what to multiply by and whether to change anything, so the host waits
once, at the end, to say in `StepResult` what happened; without scaling and clipping it never does. The numbers are
those of the same optimizer of ``torch.optim``, bit for bit. Where gradients are clipped they differ by a rounding: a
gradient is multiplied by the product of 1 / scale and the clip coefficient, and not by one after the other, and the
norm is summed in float64.

If it raises (Ctrl-C, a hook), the step was made and all that follows it was done, or it was not made. Then `step` may
be called again, unless gradients were unscaled or clipped in memory: those are dropped. With optimizers of
`halfstep.optim` it is one of these; others may be interrupted with half of the weights written, and the exception has a
note that says so.

Accumulate by calling ``backward(loss / n)`` n times before ``step``. The optimizer stays the user's: schedulers and
checkpoints go on using it, and its state dict; `MixedPrecision.state_dict` holds it and the loss scale. Parameters stay
FP32 to whoever looks, also where a policy stores them in 16-bit planes (`halfstep.split`).
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfstep import hardware
from halfstep.autocast import (
    LOW_PRECISION,
    autocast,
    float32_precision,
    keep_fp32,
    recomputation,
    store_in_planes,
)
from halfstep.autocast.explanation import Explanation, explain
from halfstep.checkpoint import save
from halfstep.observe.bad_steps import BadStepWatch
from halfstep.optim import MasterOptimizer, MasterWeights
from halfstep.optim.fused_on_planes import in_one_pass
from halfstep.optim.loading import STALE, load_beside_masters
from halfstep.optim.release import GradientRelease
from halfstep.optim.surveying import gradient_coefficient
from halfstep.policy import Policy, resolve
from halfstep.scale import GradScaler
from halfstep.scale.attempt import Attempt
from halfstep.scale.fused import asks_first
from halfstep.split import NarrowGradients, set_hooks_again
from halfstep.transfer import moved


class LargestGradients(Mapping[str, float]):
    """The largest magnitude of each parameter's unscaled gradient, by the parameter's name; inf or NaN if it has one.

    They were found in the pass that looks for inf and NaN. Reading the first of them waits for the device.

    Args:
        names: of the parameters that had gradients.
        amax: float32 (number of names,), of the gradients as they were.
        inverse_scale: float32 0-d: what they have to be multiplied by.
    """

    def __init__(self, names: Sequence[str], amax: Tensor, inverse_scale: Tensor | float) -> None:
        self._names = names
        self._amax = amax
        self._inverse_scale = inverse_scale
        self._read: dict[str, float] | None = None

    def __getitem__(self, name: str) -> float:
        if self._read is None:
            self._read = dict(zip(self._names, (self._amax * self._inverse_scale).tolist(), strict=True))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class StepResult:
    """What one `MixedPrecision.step` did."""

    #: False: the gradients held inf or NaN, and weights, optimizer and buffers are as they were. (With released
    #: gradients: those parameters whose own gradient held them; the backward pass has stepped the others.)
    applied: bool
    scale: float | None  #: the loss scale of this step's gradients; None without loss scaling
    grad_norm: float | None  #: 2-norm of the unscaled gradients before clipping; None unless clipping was asked for
    #: Largest magnitudes by parameter, where they were looked for in the first of two passes; else None.
    largest_gradients: LargestGradients | None = field(default=None, compare=False, repr=False)


class MixedPrecision:
    """A model and its optimizer under a policy.

    Args:
        model: on its device already. Under a ``-master`` policy, or with ``storage=split``, its FP32 matrices are
            stored in two 16-bit planes, in place; they stay the same objects, and FP32. Parameters that are 16-bit
            already, in the policy's format, stay so, and get FP32 masters.
        optimizer: any torch optimizer over the model's parameters; those of `halfstep.optim` step in two passes, and
            hold masters themselves.
        policy: a policy, its name, or "auto" for this device's best.
        scaler: the loss scaler to use instead of a default `GradScaler`; only where the policy scales the loss.

    Attributes:
        policy: the policy in effect.
        reason: why this policy.
        scaler: the loss scaler; disabled where the policy does not scale.
        islands: the modules that the policy keeps in FP32; ``islands.remove()`` makes them ordinary again.
        masters: `MasterWeights` around the optimizer where the model brings 16-bit parameters; else None.
        left_plain: by name, the weights that the policy would store in planes and could not, and why.

    Raises:
        UnknownPolicyError: no policy has this name.
        NoSuchModuleError: a ``keep_fp32`` pattern matches no module.
        ValueError: the model has no parameters, or they are in a 16-bit format that the policy does not train; or the
            optimizer takes no 16-bit gradients, where the policy keeps them so (``grads=bf16``).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        policy: str | Policy = "auto",
        *,
        scaler: GradScaler | None = None,
    ) -> None:
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError(f"{type(model).__name__} has no parameters: nothing to train")
        self.device_type = first.device.type
        self.policy, self.reason = resolve(str(policy), hardware.detect(first.device))
        self.model = model
        self.optimizer = optimizer
        _require_format(model, self.policy)
        self.islands = keep_fp32(model, self.policy.keep_fp32, self.device_type)
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        brings_16_bits = any(p.dtype in LOW_PRECISION for p in stepped)
        holds_masters = isinstance(optimizer, MasterOptimizer)
        self.masters = MasterWeights(optimizer) if brings_16_bits and not holds_masters else None
        self.left_plain = store_in_planes(model, self.policy)
        if self.policy.grads == "bf16":
            _require_narrow_gradients(model, optimizer)
            self._narrow = NarrowGradients(stepped)
        if scaler is not None and not self.policy.loss_scaling:
            raise ValueError(f"{self.policy} does not scale the loss: a scaler would only cost a pass over memory")
        self.scaler = scaler or GradScaler(self.device_type, enabled=self.policy.loss_scaling)
        self.scaler.watch(model)
        if isinstance(optimizer, MasterOptimizer) and optimizer.release is not None and self.scaler.is_enabled():
            optimizer.release.scale_with(self.scaler)
        self._names: dict[Tensor, str] = {}
        self._watch: weakref.ref[BadStepWatch] | None = None

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The context for the forward pass and the loss."""
        with (
            self.scaler.forward_of(self.model, keeps=self._may_skip()),
            float32_precision(self.policy),
            autocast(self.policy, self.device_type),
        ):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Backward through ``loss`` (one element), scaled where the policy scales; adds to ``.grad``.

        Args:
            kwargs: ``retain_graph``, ``create_graph``, ``inputs``, as in `torch.Tensor.backward`.
        """
        if (watch := self._watched_by()) is not None:
            watch.note_loss(loss)
        if self.scaler.has_stepped(self.optimizer):  # and was interrupted twice
            self.scaler.update()
        if self.policy.storage == "split":  # model.float() or .to(device) has swapped them, and hooks do not follow
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                set_hooks_again(parameter)
        scaling = self.scaler.is_enabled()
        if not scaling:
            self.scaler.backward_starts(loss)
        with float32_precision(self.policy), recomputation(self.policy, self.device_type):
            self.scaler.scale(loss).backward(**kwargs)
        if not scaling:
            self.scaler.backward_ended()

    def step(self, *, max_grad_norm: float | None = None, zero_grad: bool = True) -> StepResult:
        """Update the model from the gradients, unless they hold inf or NaN.

        Args:
            max_grad_norm: clip the unscaled gradients to this 2-norm.
            zero_grad: set gradients to None afterwards. Left there, they are unscaled and clipped, but FP16 ones, which
                would lose by it, as `backward` left them. Step hooks of an optimizer that takes two passes see all
                of them so.

        Raises:
            LossScaleError: too many steps in a row were skipped.
            RuntimeError: no gradient exists: `backward` was not called since the last step.
            ValueError: a limit that an optimizer with released gradients should have known before `backward`.
        """
        optimizer = self.optimizer
        release = optimizer.release if isinstance(optimizer, MasterOptimizer) else None
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]) and (
            release is None or not release.arrived
        ):
            raise RuntimeError("step() found no gradients: call backward(loss) first, on a loss of this model")
        watch = self._watched_by()
        attempt = Attempt(self.scaler, optimizer)
        try:
            held_back = False
            if watch is not None and not self.scaler.is_enabled():  # a scaler looks itself
                held_back = watch.holds_back(already_stepped=release is not None)
            if held_back:
                result = StepResult(applied=False, scale=None, grad_norm=None)
            elif release is not None:
                result = self._after_release(release, max_grad_norm)
            elif isinstance(optimizer, MasterOptimizer):
                result = self._two_passes(optimizer, max_grad_norm, leave=not zero_grad)
            else:
                result = self._many_passes(max_grad_norm, attempt)
            attempt.ended(applied=result.applied)
            if watch is not None:
                watch.stepped(applied=result.applied, scale=result.scale)
            attempt.close(zero_grad=zero_grad)
        except BaseException as error:
            attempt.interrupted(error, zero_grad=zero_grad)
            raise
        return result

    def _two_passes(self, optimizer: MasterOptimizer, max_grad_norm: float | None, *, leave: bool) -> StepResult:
        """Step an optimizer that surveys its gradients, and unscales and clips them while it steps."""
        scaler = self.scaler
        if not scaler.is_enabled() and max_grad_norm is None:
            scaler.step(optimizer)
            return StepResult(applied=True, scale=None, grad_norm=None)
        survey = optimizer.survey()
        device = survey.amax.device
        inverse, found_inf = torch.ones((), dtype=torch.float32, device=device), None
        if scaler.is_enabled():
            unscaling = scaler.take_survey(optimizer, survey)
            inverse, found_inf = moved(unscaling.inverse, device), unscaling.found_inf
        coefficient, norm = inverse, []
        if max_grad_norm is not None:
            coefficient = gradient_coefficient(survey, max_grad_norm, inverse)
            norm = [survey.sum_of_squares.sqrt() * inverse]
        names = [self._name(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with optimizer.scaled(coefficient, found_inf, in_memory=leave):
            scaler.step(optimizer)
        applied, scale, grad_norm = scaler.read(optimizer, *norm)
        largest = LargestGradients(names, survey.amax, inverse)
        return StepResult(applied, scale, grad_norm[0] if grad_norm else None, largest)

    def _after_release(self, release: GradientRelease, max_grad_norm: float | None) -> StepResult:
        """End the step of an optimizer that released its gradients: the backward pass has stepped the parameters."""
        if max_grad_norm is not None and max_grad_norm != release.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={max_grad_norm:g} comes too late: with release_gradients=True the backward pass has "
                f"stepped the parameters. Set optimizer.release.max_grad_norm = {max_grad_norm:g} before training"
            )
        self.scaler.step(self.optimizer)
        norm = [] if max_grad_norm is None or release.grad_norm is None else [release.grad_norm]
        applied, scale, grad_norm = self.scaler.read(self.optimizer, *norm)
        return StepResult(applied, scale, grad_norm[0] if grad_norm else None)

    def _name(self, parameter: Tensor) -> str:
        """The model's name of a parameter; a number for one that is not the model's."""
        if parameter not in self._names:
            self._names.update({p: name for name, p in self.model.named_parameters()})
        return self._names.setdefault(parameter, f"{len(self._names)}")

    def _many_passes(self, max_grad_norm: float | None, attempt: Attempt) -> StepResult:
        """Step an optimizer that knows nothing of scales: its gradients are unscaled and clipped in memory before."""
        scaler, optimizer, masters = self.scaler, self.optimizer, self.masters
        norm: list[Tensor] = []
        read: tuple[bool, float | None, list[float]] | None = None
        # Masters have gradients of their own, which go when they go; but some parameters stay FP32.
        attempt.spoils_gradients = scaler.is_enabled() or max_grad_norm is not None
        with masters.exchanged() if masters is not None else contextlib.nullcontext():
            scaler.unscale_(optimizer)
            if max_grad_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                norm = [nn.utils.clip_grad_norm_(parameters, max_grad_norm)]
            if scaler.is_enabled() and asks_first(optimizer):
                read = scaler.read(optimizer, *norm)  # where the host has to wait anyway, it waits for all of it
            with in_one_pass(optimizer):
                scaler.step(optimizer)
            if masters is not None:
                masters.cast_back()  # of a skipped step nothing that is not there already
        # The norm is read behind the step, not before it: the device would have nothing to do meanwhile.
        applied, scale, grad_norm = read or scaler.read(optimizer, *norm)
        return StepResult(applied, scale, grad_norm[0] if grad_norm else None)

    def explain(self, *batch: Any, **kwargs: Any) -> Explanation:
        """Which op runs in which format, how often and in which module, in a forward pass of ``model(*batch)``.

        Changes nothing: no gradients, and buffers and random number generators are put back. ``print`` it.
        """

        def run() -> None:
            with self.autocast():
                self.model(*batch, **kwargs)

        return explain(self.model, run, str(self.policy))

    def watch(
        self, folder: str | os.PathLike[str] = "halfstep-watch", *, every: int = 1, keep: int = 3
    ) -> BadStepWatch:
        """Watch for bad steps, and save the first ones so that they can be run again, bit for bit::

            with mp.watch() as watch:
                for x, y in watch(loader):
                    ...                         # the loop as it was

        A step is bad if its loss or a gradient is not finite; while a loss scaler looks for its scale, if the loss is
        not. What is needed to replay it goes to a file that `halfstep.doctor.replay` reads, and one warning says
        where it is. Where the policy does not scale the loss, a step whose gradients are not finite is not taken:
        ``StepResult.applied`` is False. A full disk or a strange batch ends the watch with a warning, never the run.

        Under several processes open it on all of them.

        Args:
            folder: made if it is not there. Nothing in it is ever overwritten.
            every: watch every so many steps only.
            keep: save this many bad steps at most.
        """
        if (watch := self._watched_by()) is not None:
            watch.close()
        watch = BadStepWatch(self, save, folder, every=every, keep=keep)
        self._watch = weakref.ref(watch)
        return watch

    def _may_skip(self) -> bool:
        """Whether a step of this one may not be taken: a scaler's, or a watch's."""
        return self.scaler.is_enabled() or self._watched_by() is not None

    def _watched_by(self) -> BadStepWatch | None:
        return None if self._watch is None else self._watch()

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimizer, and loss scale: tensors and plain values, for ``torch.save``.

        Only a model that brings 16-bit parameters has masters in it.
        """
        optimizer = self.masters.state_dict() if self.masters is not None else self.optimizer.state_dict()
        return {"policy": str(self.policy), "optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of the same policy; load the model's own state dict first.

        Raises:
            ValueError: the state is of another policy, or does not fit the optimizer.
        """
        if state_dict.get("policy") != str(self.policy):
            raise ValueError(
                f"this state is of policy {state_dict.get('policy')!r}, this run's is {str(self.policy)!r}: "
                "build MixedPrecision with the policy of the state, or load only the model's weights"
            )
        optimizer = self.masters or self.optimizer
        stale = load_beside_masters(optimizer, state_dict["optimizer"], optimizer.load_state_dict)
        if stale:
            warnings.warn(STALE.format(", ".join(stale)), stacklevel=2)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state_dict["scaler"])


def _require_narrow_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, MasterOptimizer):
        raise ValueError(
            f"grads=bf16 needs an optimizer of halfstep.optim: {type(optimizer).__name__} wants gradients of its "
            "parameters' type, so they would be FP32 all at once in the step"
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError("grads=bf16 does not go with DistributedDataParallel, whose buckets are FP32: leave it out")


def _require_format(model: nn.Module, policy: Policy) -> None:
    stored = policy.compute_dtype if policy.storage == "split" else torch.float32
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in LOW_PRECISION and parameter.dtype is not stored:
            low = str(parameter.dtype).removeprefix("torch.")
            kind = "bf16-master" if parameter.dtype is torch.bfloat16 else "fp16-master"
            raise ValueError(
                f"parameter {name!r} is {low}, and {policy} trains FP32 parameters: small updates to it would be "
                f"lost. Load the model in float32 (dtype=torch.float32), or use policy {kind!r}, which adds FP32 "
                "master weights"
            )

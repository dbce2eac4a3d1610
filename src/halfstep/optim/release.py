"""Stepping each parameter inside the backward pass, as soon as its gradient is there, and freeing the gradient.

::

    optimizer = halfstep.optim.AdamW(model.parameters(), release_gradients=True)
    for x, y in loader:
        criterion(model(x), y).backward()     # steps each parameter; no gradient outlives its own step
        optimizer.step()                      # ends the step; gradients that did not pass a hook are stepped here

A hook after each parameter's gradient accumulation (``register_post_accumulate_grad_hook``) does what `step` would do
with it. The numbers are those of the optimizer without release, bit for bit: an update looks at one parameter only.
What does look at all gradients at once is done as well as it can be:

================= ====================================================================================================
accumulation      `GradientRelease.accumulating` around all micro-batches but the last: hooks leave gradients alone
loss scaling      each gradient is looked at when it comes; a parameter whose gradient holds inf or NaN stays as it is,
                  the others were stepped. The scale falls as always: `GradientRelease.scale_with`
clipping          by the larger of two norms: that of the previous step, and that of what has arrived so far of this one
                  (which bounds the first step, and any single gradient that explodes): ``max_grad_norm``
================= ====================================================================================================

A backward pass that is interrupted has stepped some parameters, each of them whole, and not the others. It cannot be
repeated: another one, before `step` or ``zero_grad()``, is refused. After either of them training goes on.

Nothing here makes the host wait for the device (`tests/test_device_waits.py`).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from halfstep.optim.arrivals import Place, Tally, place_of
from halfstep.optim.layout import local
from halfstep.optim.surveying import survey_of
from halfstep.optim.update import Survey
from halfstep.transaction import to_the_end
from halfstep.transfer import moved

if TYPE_CHECKING:
    from halfstep.optim.base import MasterOptimizer


class GradientsKeptWarning(UserWarning):
    """Every gradient of a step existed at once, although the optimizer releases gradients."""


class GradientRelease:
    """The hooks on an optimizer's parameters, and what they have seen of the step under way.

    Args:
        optimizer: is held weakly; the hooks go when it goes.
        max_grad_norm: as the attribute.
        grad_norm: of the step before the first one.
    """

    def __init__(
        self, optimizer: MasterOptimizer, *, max_grad_norm: float | None = None, grad_norm: Tensor | None = None
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._name = type(optimizer).__name__
        self.max_grad_norm = max_grad_norm
        self._grad_norm = grad_norm
        self._scaler: torch.amp.GradScaler | None = None
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._groups_of: Any = None
        self._replicas_refused = False
        self._depth = 0
        self._accumulated = False
        self._begin()
        weakref.finalize(optimizer, _remove, self._handles).atexit = False
        self._hook_parameters(optimizer)
        optimizer.register_state_dict_post_hook(self._save)

    def _begin(self) -> None:
        """A new step."""
        self._is_abandoned = False
        self._stepped: set[Tensor] = set()
        self._surveys: list[Survey] = []
        self._was_surveyed = False
        self._tallies: dict[Place, Tally] = {}
        self._inverse: dict[Place, Tensor] = {}

    @property
    def max_grad_norm(self) -> float | None:
        """Limit of the 2-norm of the unscaled gradients; None: no clipping. May be set at any time."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, limit: float | None) -> None:
        if limit is not None and not limit > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, not {limit!r}")
        self._max_grad_norm = limit

    @property
    def grad_norm(self) -> Tensor | None:
        """The 2-norm of the last step's unscaled gradients, before clipping: float32 0-d, on the device.

        Of the last step that was free of inf and NaN (0 before there was one). None where none was measured: it takes
        a ``max_grad_norm``, or a scaler. Of DTensors it is the norm over all ranks, of other gradients this rank's.
        """
        return self._grad_norm

    @property
    def arrived(self) -> bool:
        """Whether a gradient has arrived since the last step."""
        return bool(self._stepped) or any(parameter.grad is not None for parameter in self._groups)

    @property
    def is_accumulating(self) -> bool:
        """Whether this is inside `accumulating`."""
        return self._depth > 0

    def scale_with(self, scaler: torch.amp.GradScaler) -> None:
        """Divide gradients by this scaler's scale, and leave parameters whose gradients hold inf or NaN as they are.

        Call it once, before the first backward pass; `scaler.step(optimizer)` and `scaler.update()` stay where they
        were. `halfstep.GradScaler` and `torch.amp.GradScaler` both work.
        """
        self._scaler = scaler

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within, backward passes leave gradients in ``.grad``: for all micro-batches of a step but the last."""
        self._depth += 1
        self._accumulated = True
        try:
            yield
        finally:
            self._depth -= 1

    def survey(self, left: list[Tensor]) -> Survey:
        """The survey of gradients that are ``left``, and of those released since the last step that were looked at."""
        optimizer = self._optimizer()
        surveys = list(self._surveys)
        if left or not surveys:
            surveys.insert(0, survey_of(left, "auto" if optimizer is None else optimizer.backend))
        self._was_surveyed = True
        device = surveys[0].amax.device
        return Survey(
            torch.stack([moved(survey.sum_of_squares, device) for survey in surveys]).sum(),
            torch.stack([moved(survey.found_inf, device) for survey in surveys]).amax(),
            torch.cat([moved(survey.amax, device) for survey in surveys]),
        )

    def hook(self) -> None:
        """Hook parameters that were added to the optimizer."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._hook_parameters(optimizer)

    def abandon(self) -> None:
        """The gradients are reset: unless the step is ended nevertheless, the next backward pass begins another one.

        That is how training goes on after a backward pass that was interrupted: what it had stepped stays stepped.
        """
        self._is_abandoned = bool(self._stepped)

    @torch.no_grad()
    def finish(self) -> None:
        """End a step: step parameters whose gradients did not pass a hook, tell the scaler, and start the next one.

        Some gradients never pass a hook: those of parameters that took part in earlier micro-batches only, and those
        that were assigned to ``.grad``.

        Raises:
            RuntimeError: called inside `accumulating`; a parameter got another gradient after it was stepped; or a
                scaler calls that `scale_with` was not told of.
        """
        optimizer = self._optimizer()
        assert optimizer is not None  # it calls
        called_by_scaler = hasattr(optimizer, "found_inf")
        self._check(called_by_scaler)
        left = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if left and self._is_abandoned:
            self._begin()
        self._check_left([p for _, p in left])
        # A scaler hands over nothing to multiply by where `unscale_` has divided what is left already.
        divided = called_by_scaler and optimizer._scalars is None and getattr(optimizer, "grad_scale", None) is None
        optimizer._scalars = None  # each parameter is judged by itself, as in its hook
        for group, parameter in left:
            self._step(optimizer, group, parameter, None if divided else self._inverse_scale())
        norm = self._measured()
        following = optimizer.steps_made + 1

        def write() -> None:
            if called_by_scaler and self._scaler is not None and not self._was_surveyed:
                _tell(self._scaler, optimizer, [tally.found_inf for tally in self._tallies.values()])
            self._grad_norm = norm
            self._accumulated = False
            self._begin()
            optimizer.steps_made = following

        to_the_end(write, f"{self._name}.step()")
        self._hook_parameters(optimizer)

    @torch.no_grad()
    def take(self, parameter: Tensor) -> None:
        """What the hook does: step a parameter, and free its gradient.

        Raises:
            RuntimeError: it was stepped already since the last `finish`; or DistributedDataParallel holds it.
        """
        optimizer = self._optimizer()
        if optimizer is None or self._depth or parameter.grad is None:
            return
        if self._is_abandoned:
            self._begin()
        if self._groups_of is not optimizer.param_groups:  # a state was loaded
            self._hook_parameters(optimizer)
        group = self._groups.get(parameter)
        if group is None:
            return
        if parameter in self._stepped:
            raise RuntimeError(
                f"a second backward pass reached the parameter of shape {tuple(parameter.shape)} before step(): the "
                f"first one has stepped it already, as {self._name}(release_gradients=True) does. Call step() after "
                "each backward pass, or run all of them but the last inside `with optimizer.accumulating():`. (A "
                "parameter shared by several segments of reentrant checkpointing gets there once for each: take "
                "use_reentrant=False.)"
            )
        if not self._replicas_refused:
            _refuse_replicas(self._groups, self._name)
            self._replicas_refused = True
        self._step(optimizer, group, parameter, self._inverse_scale())

    def options(self) -> dict[str, Any]:
        """What a copy is built with; it has to be told of its scaler anew."""
        return {"max_grad_norm": self.max_grad_norm, "grad_norm": self._grad_norm}

    def load(self, state_dict: dict[str, Any]) -> None:
        """Take the norm of the previous step from an optimizer's state dict."""
        self._grad_norm = state_dict.get("release", {}).get("grad_norm")

    def _save(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        if self._grad_norm is not None and self.max_grad_norm is not None:
            state_dict["release"] = {"grad_norm": self._grad_norm}

    def _step(
        self, optimizer: MasterOptimizer, group: dict[str, Any], parameter: Tensor, inverse_scale: Tensor | None
    ) -> None:
        gradient = parameter.grad
        assert gradient is not None
        coefficient, found_inf = inverse_scale, None
        scaled = self._scales()
        surveys = self._surveys
        tally = self._tally(local(gradient).device) if scaled or self.max_grad_norm is not None else None
        before = None if tally is None else (tally.sum_of_squares, tally.found_inf)
        try:
            if tally is not None:
                arrival = tally.take(
                    gradient,
                    optimizer.backend,
                    inverse_scale=inverse_scale,
                    norm_before=self._grad_norm,
                    limit=self.max_grad_norm,
                )
                surveys = [*surveys, arrival.survey]
                found_inf = arrival.found_inf if scaled else None
                if arrival.coefficient is not None:
                    coefficient = arrival.coefficient
            updates = optimizer.updates(group, [(parameter, gradient)], coefficient, found_inf)

            def write() -> None:
                for update in updates:
                    update.write()
                self._surveys = surveys
                self._stepped.add(parameter)
                parameter.grad = None

            to_the_end(write, f"the step of a parameter of shape {tuple(parameter.shape)}")
        except BaseException:
            if tally is not None and before is not None and parameter not in self._stepped:
                tally.sum_of_squares, tally.found_inf = before  # it will be added when it is stepped
            raise

    def _tally(self, device: torch.device) -> Tally:
        place = place_of(device)
        if place not in self._tallies:
            self._tallies[place] = Tally(device)
        return self._tallies[place]

    def _measured(self) -> Tensor | None:
        """The norm of this step, unless a gradient held inf or NaN: then the one before it goes on."""
        if not self._tallies:
            return self._grad_norm
        tallies = list(self._tallies.values())
        device = tallies[0].found_inf.device
        squares = torch.stack([moved(tally.sum_of_squares, device) for tally in tallies]).sum()
        found = torch.stack([moved(tally.found_inf, device) for tally in tallies]).sum()
        norm = squares.sqrt().float()
        before = torch.zeros_like(norm) if self._grad_norm is None else moved(self._grad_norm, device)
        return torch.where(found > 0, before, norm)

    def _scales(self) -> bool:
        return self._scaler is not None and self._scaler.is_enabled()

    def _inverse_scale(self) -> Tensor | None:
        """1 / scale, computed once a step: the scaler moves it after the step only."""
        scale = self._scaler._get_scale_async() if self._scaler is not None and self._scales() else None
        if scale is None:
            return None
        place = place_of(scale.device)
        if place not in self._inverse:
            self._inverse[place] = scale.double().reciprocal().float()
        return self._inverse[place]

    def _check(self, called_by_scaler: bool) -> None:
        if self._depth:
            raise RuntimeError(
                "step() was called inside `with optimizer.accumulating():`. End the block before the last "
                "micro-batch's backward pass, which steps, and call step() after it"
            )
        if called_by_scaler and self._scaler is None:
            raise RuntimeError(
                f"a gradient scaler steps {self._name}(release_gradients=True), which has stepped its parameters in "
                "the backward pass with gradients that were not divided by the scale: call "
                "optimizer.release.scale_with(scaler) once before training (reload the weights: this step spoilt them)"
            )

    def _check_left(self, left: list[Tensor]) -> None:
        twice = [parameter for parameter in left if parameter in self._stepped]
        if twice:
            raise RuntimeError(
                f"{len(twice)} parameters got another gradient after the backward pass had stepped them (the first of "
                f"shape {tuple(twice[0].shape)}): a backward pass inside `with optimizer.accumulating():` came after "
                "the last one, or something writes gradients when hooks are done, as DistributedDataParallel does. "
                "Accumulate first; and use FSDP2 (fully_shard), or release_gradients=False"
            )
        if left and not self._stepped and self._accumulated:
            warnings.warn(
                f"all {len(left)} gradients of this step were kept until step(): every backward pass since the last "
                "one was inside `with optimizer.accumulating():`. Run the last micro-batch outside of it",
                GradientsKeptWarning,
                stacklevel=5,
            )

    def _hook_parameters(self, optimizer: MasterOptimizer) -> None:
        """Bring hooks in line with the optimizer's groups: somebody may have replaced or unfrozen parameters."""
        self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self._groups_of = optimizer.param_groups
        for parameter in [p for p in self._handles if p not in self._groups]:
            self._handles.pop(parameter).remove()
        for parameter in self._groups:
            if parameter.requires_grad and parameter not in self._handles:
                if getattr(parameter, "_is_flat_param", False):
                    raise RuntimeError(_REFUSAL.format(name=self._name, who="FullyShardedDataParallel (FSDP1)"))
                hook = _Hook(self)
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call,unused-ignore]
                self._replicas_refused = False


class _Hook:
    """On a parameter, whose copies and pickles do not carry it. Holds the release weakly."""

    def __init__(self, release: GradientRelease) -> None:
        self._release = weakref.ref(release)

    def __call__(self, parameter: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.take(parameter)


_REFUSAL = (
    "{name}(release_gradients=True) cannot step parameters of {who}: it reduces gradients over ranks after the hook "
    "that would step them, and keeps them in buffers of its own, so that nothing could be freed. Use FSDP2 "
    "(torch.distributed.fsdp.fully_shard), or release_gradients=False"
)


def _refuse_replicas(parameters: dict[Tensor, Any], name: str) -> None:
    """Raise where a DistributedDataParallel holds one of the parameters.

    Nothing on a parameter tells, so the module is looked for among all objects. Once, and only where ranks exist.
    """
    module = sys.modules.get("torch.nn.parallel.distributed")
    if module is None or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    replicated = module.DistributedDataParallel
    for candidate in gc.get_objects():
        # By type, not isinstance: that one asks objects for their __class__, which proxies answer with side effects.
        if issubclass(type(candidate), replicated) and any(p in parameters for p in candidate.parameters()):
            raise RuntimeError(_REFUSAL.format(name=name, who="DistributedDataParallel"))


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()


def _tell(scaler: torch.amp.GradScaler, optimizer: MasterOptimizer, flags: list[Tensor]) -> None:
    """Record the flags where PyTorch's scaler, which found no gradients to look at, would have."""
    recorded = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for flag in flags:
        known = recorded.get(flag.device)
        recorded[flag.device] = flag if known is None else torch.maximum(known.reshape(()), flag)

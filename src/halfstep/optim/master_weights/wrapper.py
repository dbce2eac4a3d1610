"""FP32 master weights around any torch optimizer.

A 16-bit parameter cannot take an update smaller than half its ulp; the FP32 master beside it can. Each step::

    master.grad = float32(parameter.grad)          unscaled and clipped there, if asked
    the optimizer steps on the masters, its moments are FP32
    parameter = to 16 bits, nearest(master)

`MasterWeights` is a torch optimizer itself, and takes the place of the one it is given in schedulers, scalers,
trainers and checkpoints. It owns masters and nothing else: ``param_groups``, ``state`` and ``defaults`` look through
to that optimizer, which stays the user's own object. Its ``param_groups`` hold the model's parameters; only inside
`MasterWeights.exchanged` do the masters stand in their place, in the same lists, and the state is keyed by them. So
there is one learning rate, in one place, whoever writes it, and nothing to keep in step. A parameter that is FP32
already is its own master; a frozen one needs none.

Masters follow the model: where a parameter was changed from outside since the last step (a checkpoint was loaded, an
EMA swapped in, weights clamped), its master is set anew; where it was not, the master keeps its low bits. The values
are compared before each step, because version counters miss writes through ``parameter.data``; the host waits for none
of it.

A master costs 4 bytes per parameter, and its gradient 4 more during the step.

Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.autocast import LOW_PRECISION
from halfstep.optim.clipping import clip_coefficient, inverse, multiply_, total_norm
from halfstep.optim.loading import STALE, recover
from halfstep.optim.master_weights.exchange import Exchange, rounds_to
from halfstep.optim.master_weights.state_view import StateView, with_masters, without_masters
from halfstep.transaction import to_the_end


def _with_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """The hooks of this object around its ``step``; PyTorch's own decorator calls the global ones too.

    Those are the optimizer's within: it is the one that steps, and they would be called twice for one step.
    """

    @functools.wraps(step)
    def hooked(self: MasterWeights, *args: Any, **kwargs: Any) -> Any:
        everything: tuple[Any, ...] = (self, *args)
        for before in list(self._optimizer_step_pre_hooks.values()):
            changed = before(self, everything, kwargs)
            if changed is not None:
                everything, kwargs = changed
        result = step(*everything, **kwargs)
        for after in list(self._optimizer_step_post_hooks.values()):
            after(self, everything, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # PyTorch's mark: it does not decorate such a step again
    return hooked


class MasterWeights(Optimizer):
    """FP32 masters for the 16-bit parameters of an optimizer; an optimizer in its place.

    ::

        optimizer = halfstep.MasterWeights(torch.optim.AdamW(model.parameters(), lr=1e-3))
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    Loss scaling. A `torch.amp.GradScaler` or `halfstep.GradScaler` drives it as any optimizer, and FP16 gradients are
    unscaled in FP32: ``scaler.step(optimizer)``. PyTorch's ``scaler.unscale_`` refuses FP16 gradients; clip by
    ``optimizer.clip_grad_norm_(1.0, loss_scale=scaler.get_scale())`` without it, or use it on the masters::

        with optimizer.exchanged():
            scaler.unscale_(optimizer)
            ...                             # param_groups hold masters; their gradients are FP32 and unscaled
            scaler.step(optimizer)
        scaler.update()

    With FP16 gradients PyTorch's scaler calls `step` also where it is skipped, as that of fused optimizers: do not take
    the call for a step, as Accelerate does to hold its schedulers back. `halfstep.GradScaler` looks first, and does not
    call it where somebody listens.

    Hooks on this object see the parameters, hooks on the optimizer within see masters, and so do the global ones.
    Methods that torch optimizers do not have are called on ``optimizer.optimizer``: inside `exchanged`, and followed
    by `cast_back`, if they read or write weights.

    Args:
        optimizer: any torch optimizer; parameters may be added to it, or to this object, later.

    Attributes:
        optimizer: the optimizer within.

    Raises:
        TypeError: this is no torch optimizer, or has masters already.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, MasterWeights):
            raise TypeError(
                f"MasterWeights goes around a torch optimizer without masters, not {type(optimizer).__name__}: "
                "MasterWeights(torch.optim.AdamW(model.parameters()))"
            )
        # Optimizer.__init__ would make groups and state of its own.
        self._begin(optimizer, {}, has_stepped=False)

    def _begin(self, optimizer: Optimizer, masters: dict[Tensor, Tensor], *, has_stepped: bool) -> None:
        self.optimizer = optimizer
        self._exchange = Exchange(optimizer, masters)
        self._has_stepped = has_stepped
        self._loaded: list[Tensor] = []  # parameters whose masters came from a file, until the next step
        self._clip: Tensor | None = None  # the factor that clip_grad_norm_ found for the next step
        for hooks in ("step_pre", "step_post", "state_dict_pre", "state_dict_post"):
            setattr(self, f"_optimizer_{hooks}_hooks", OrderedDict())
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()

    def __len__(self) -> int:
        return len(self._exchange.masters)

    def __bool__(self) -> bool:
        return True  # an optimizer without masters is one all the same

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # As torch's: without hooks, and without a step that a scheduler or a trainer has replaced.
        return {"optimizer": self.optimizer, "masters": self._exchange.masters, "has_stepped": self._has_stepped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(**state)

    # ------------------------------------------------------------------ masters

    def of(self, parameter: Tensor) -> Tensor:
        """The master of a parameter: FP32, same shape and device; the parameter itself if it is not 16-bit."""
        return self._exchange.master_of(parameter)

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer steps this parameter."""
        return any(p is parameter for p in self._exchange.parameters())

    def adopt(self, parameter: Tensor, float32: Tensor) -> None:
        """Take ``float32``, the values a 16-bit parameter had before it was rounded, as its master."""
        self._exchange.masters[parameter] = float32

    def masters(self) -> list[Tensor]:
        """The masters made so far, FP32."""
        return list(self._exchange.masters.values())

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within, ``param_groups`` and ``state`` hold the masters, with FP32 gradients; inside another: nothing."""
        if self._exchange.is_made:
            yield
            return
        self._say_what_is_stale()
        self._exchange.follow()
        try:
            try:
                self._exchange.make()
                self._exchange.pull_gradients(self._factors())
                self._has_stepped = True
                yield
            finally:
                self._put_back()
        except BaseException:
            self._put_back()  # should that be what was interrupted
            # The optimizer may have written masters; a fused one's kernel does not count that.
            if self._exchange.is_ahead() or any(group.get("fused") for group in self.param_groups):
                self.cast_back()
            raise

    def _put_back(self) -> None:
        """Parameters into their places; also where they are."""
        self._exchange.undo()
        self._exchange.drop_gradients()

    def cast_back(self) -> None:
        """Write every master, rounded to nearest, into its parameter."""
        to_the_end(self._exchange.cast_back, "casting masters back")

    # ------------------------------------------------------------------ an optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own groups: the same object, so a learning rate written here is its learning rate."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    @property  # type: ignore[override]  # torch's is a defaultdict
    def state(self) -> MutableMapping[Any, Any]:
        """Each parameter's state, the optimizer's own with the ``"master"`` beside it; a live view.

        Empty until the first step or load, whatever masters exist. PyTorch's distributed checkpoints tell by this
        whether state has to be made before it is loaded: if it is empty they make a step with a learning rate of 0,
        and if they did so after the first step, every save would move the moments.
        """
        masters = {} if self._exchange.is_made else self._exchange.masters
        return StateView(self.optimizer.state, masters, hidden=not self._has_stepped)

    @state.setter
    def state(self, state: Mapping[Any, Any]) -> None:
        new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in state.items()}
        self.optimizer.state = defaultdict(dict)
        view = self.state
        for key, value in new.items():
            view[key] = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """PyTorch's mark of an optimizer that unscales by itself: the scaler then hands it the scale, unread.

        Only where gradients are FP16, which the scaler would refuse. Elsewhere the scaler unscales, and does not call
        `step` if gradients overflowed; some trainers conclude from the call that a step was made.
        """
        gradients = (p.grad for group in self.param_groups for p in group["params"])
        return any(gradient is not None and gradient.dtype is torch.float16 for gradient in gradients)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer; 16-bit parameters in it get masters at the next step."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the parameters' gradients."""
        self._clip = None
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, loss_scale: float | Tensor = 1.0) -> Tensor:
        """Clip the gradients of the next `step` by their norm over all parameters, computed in FP32.

        The factor is kept and applied to the FP32 gradients in the step, where it costs no rounding; the parameters'
        16-bit gradients stay as they are. Call it between the last backward pass and the step.

        Args:
            max_norm: the largest norm.
            norm_type: of which norm; ``inf`` for the largest absolute value.
            loss_scale: what the loss was multiplied by (``scaler.get_scale()``), unless `torch.amp.GradScaler.unscale_`
                has been called; the norm is that of the gradients divided by it.

        Returns:
            The norm before clipping: FP32, 0-d.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = total_norm(parameters, norm_type)
        if isinstance(loss_scale, Tensor) or loss_scale != 1.0:
            norm = norm * inverse(torch.as_tensor(loss_scale, dtype=torch.float32, device=norm.device))
        coefficient = clip_coefficient(norm, max_norm)
        if self._exchange.is_made:
            multiply_((p.grad for p in parameters if p.grad is not None), [coefficient])
        else:
            self._clip = coefficient
        return norm

    @_with_own_hooks
    def step(self, closure: Callable[[], Any] | None = None, *, call: Callable[..., Any] | None = None) -> Any:
        """Step the optimizer on the masters and cast back; returns what its ``step`` returns.

        A scaler may have left ``grad_scale`` and ``found_inf`` on this object, as PyTorch's do for fused optimizers:
        gradients are divided by the one, in FP32, and nothing is done (None is returned) if the other is above 0. The
        optimizer within sees neither, so that a fused one does not divide again.

        Args:
            closure: evaluates the model and its gradients; before each evaluation the parameters follow the masters,
                so optimizers that evaluate it several times (LBFGS) see their own moves, rounded to 16 bits.
            call: what to call for the optimizer's ``step``, with the closure if there is one.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            self._clip = None
            return None
        step = call or self.optimizer.step
        try:
            with self.exchanged():
                result = step() if closure is None else step(lambda: self._evaluated(closure))
                self.cast_back()
        except BaseException as error:
            if self._exchange.has_multiplied:
                error.add_note(
                    "halfstep: gradients of parameters that are FP32 had been unscaled or clipped in memory when this "
                    "was raised: to repeat the step call zero_grad() and backward() again"
                )
            raise
        self._clip = None
        return result

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict with each master among its parameter's state, FP32."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        # Of a model that was written to since the last step, what is there now; the masters themselves wait, because
        # what was written may be taken back before the next step (an average that is swapped in to be saved).
        masters = self._exchange.masters if self._exchange.is_made else self._exchange.current()
        state = self.optimizer.state_dict()
        everything = with_masters(state["state"], self._exchange.parameters(), masters)
        state = {**state, "state": everything}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or a plain one of the optimizer (masters then start from the parameters).

        A master counts where it rounds to its parameter at the next step, so model and optimizer may be loaded in
        either order; where it does not, because the model was trained on by other means, the parameter counts, and a
        warning says so.

        Raises:
            ValueError: shapes or groups do not match; nothing has changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameter_of = dict(zip(saved, self._exchange.parameters(), strict=False))  # torch's load refuses other lengths
        own, loaded = without_masters(state_dict["state"], parameter_of)
        # With the masters in the groups torch's load casts moments to FP32 and not to 16 bits. They do not follow the
        # parameters before: what is loaded may have been read into the masters themselves already, in place.
        try:
            self._exchange.make(needed=loaded)
            self.optimizer.load_state_dict({**state_dict, "state": own})
        finally:
            self._put_back()
        self._exchange.settle()
        with torch.no_grad():
            for parameter, master in loaded.items():
                if parameter.dtype in LOW_PRECISION:
                    self.of(parameter).copy_(master)
                else:  # its own master
                    recover(parameter, master)
        self._has_stepped = self._has_stepped or bool(loaded)
        self._loaded = list(loaded)
        self._clip = None
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    # ------------------------------------------------------------------ helpers, in the order of their first use

    def _say_what_is_stale(self) -> None:
        """Once after a load: which masters are not of the weights that are there."""
        loaded, self._loaded = self._loaded, []
        masters = self._exchange.masters
        stale = [p for p in loaded if p in masters and not rounds_to(masters[p], p)]
        if stale:
            names = {id(p): f"{index} {tuple(p.shape)}" for index, p in enumerate(self._exchange.parameters())}
            warnings.warn(STALE.format(", ".join(names.get(id(p), str(tuple(p.shape))) for p in stale)), stacklevel=3)

    def _factors(self) -> list[Tensor]:
        """What to multiply gradients by on their way to the masters: a scaler's 1 / scale, then the clipping's."""
        scale = getattr(self, "grad_scale", None)
        return [factor for factor in (None if scale is None else inverse(scale), self._clip) if factor is not None]

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        """Inside `exchanged`: the closure's value, evaluated with the parameters back in their places."""
        self._exchange.cast_back()
        self._exchange.undo()
        try:
            return closure()
        finally:
            # Looked at anew: a launcher may put parameters into 16 bits during their module's first call, in there.
            self._exchange.make()
            self._exchange.pull_gradients(self._factors())

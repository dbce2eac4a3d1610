"""FP32 master weights around any torch optimizer.

A 16-bit parameter cannot take an update smaller than half its ulp; the FP32 master beside it can. Each step::

    master.grad = float32(parameter.grad)
    the optimizer steps on the masters, its moments are FP32
    parameter = to 16 bits, nearest(master)

The optimizer stays the user's own object. Its ``param_groups`` hold the model's parameters, so schedulers, clipping,
``zero_grad`` and ``add_param_group`` need to know nothing; only inside `MasterWeights.exchanged` do the masters stand
in their place, in the same lists, and the state is keyed by them. There is one learning rate, in one place, and
nothing to keep in step. A parameter that is FP32 already is its own master.

Masters follow the model: where a parameter was changed from outside since the last step (a checkpoint was loaded, an
EMA swapped in, weights clamped), its master is set anew; where it was not, the master keeps its low bits. The values
are compared before each step, because version counters miss writes through ``parameter.data``.

A master costs 4 bytes per parameter, and its gradient 4 more during the step.

Source: Micikevicius et al. 2018, Mixed Precision Training, section 3.1.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.autocast import LOW_PRECISION

#: The key under which ``state_dict`` keeps a parameter's master, beside the optimizer's own state of it.
MASTER_KEY = "master"


class MasterWeights:
    """FP32 masters for the 16-bit parameters of an optimizer.

    Args:
        optimizer: any torch optimizer; parameters may be added to it later.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._masters: dict[Tensor, Tensor] = {}

    def __len__(self) -> int:
        return len(self._masters)

    def of(self, parameter: Tensor) -> Tensor:
        """The master of a parameter: FP32, same shape and device; the parameter itself if it is not 16-bit."""
        if parameter.dtype not in LOW_PRECISION:
            return parameter
        if parameter not in self._masters:
            self.adopt(parameter, parameter.detach().float())
        return self._masters[parameter]

    def holds(self, parameter: Tensor) -> bool:
        """Whether the optimizer steps this parameter."""
        return any(p is parameter for p in self._flat())

    def adopt(self, parameter: Tensor, float32: Tensor) -> None:
        """Take ``float32``, the values a 16-bit parameter had before it was rounded, as its master."""
        self._masters[parameter] = float32
        # Adagrad makes its state when it is constructed, in the parameter's format; others may have stepped before.
        state = self.optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype in LOW_PRECISION:
                state[key] = value.float()

    def masters(self) -> list[Tensor]:
        """The masters made so far, FP32."""
        return list(self._masters.values())

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within, the optimizer's ``param_groups`` and ``state`` hold the masters, with FP32 gradients."""
        groups = self.optimizer.param_groups
        own = [list(group["params"]) for group in groups]
        self._follow()
        try:
            self._exchange([[self.of(p) for p in parameters] for parameters in own])
            self._pull_gradients(own)
            yield
        finally:
            self._exchange(own)
            for master in self._masters.values():
                master.grad = None

    def _evaluated(self, closure: Callable[[], Any]) -> Any:
        """Inside `exchanged`: the closure's value, evaluated with the parameters back in their places."""
        masters = [list(group["params"]) for group in self.optimizer.param_groups]
        parameter_of = {id(master): parameter for parameter, master in self._masters.items()}
        own = [[parameter_of.get(id(m), m) for m in group] for group in masters]
        self._exchange(own)
        self.cast_back()
        try:
            return closure()
        finally:
            # Asked anew: a launcher may put parameters into 16 bits during their module's first call, in the closure.
            self._exchange([[self.of(p) for p in group] for group in own])
            self._pull_gradients(own)

    def _pull_gradients(self, own: list[list[Tensor]]) -> None:
        for parameters in own:
            for parameter in parameters:
                if parameter.dtype in LOW_PRECISION:
                    gradient = parameter.grad
                    self.of(parameter).grad = None if gradient is None else gradient.detach().float()

    @torch.no_grad()
    def cast_back(self) -> None:
        """Write every master, rounded to nearest, into its parameter."""
        for parameter in self._flat():
            if parameter in self._masters:
                parameter.copy_(self._masters[parameter])

    def step(self, closure: Callable[[], Any] | None = None, *, call: Callable[..., Any] | None = None) -> Any:
        """Step the optimizer on the masters and cast back; returns what its ``step`` returns.

        Args:
            closure: evaluates the model and its gradients; before each evaluation the parameters follow the masters,
                so optimizers that evaluate it several times (LBFGS) see their own moves, rounded to 16 bits.
            call: what to call for the optimizer's ``step``, with the closure if there is one.
        """
        step = call or self.optimizer.step
        with self.exchanged():
            result = step() if closure is None else step(lambda: self._evaluated(closure))
        self.cast_back()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict with each master among its parameter's state, FP32."""
        state = self.optimizer.state_dict()
        return {**state, "state": self._with_masters(state["state"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or a plain one of the optimizer (masters then start from the parameters).

        Masters win over the parameters' present values: the parameters are written from them.

        Raises:
            ValueError: shapes or groups do not match; nothing has changed then.
        """
        flat = self._flat()
        loaded: dict[Tensor, Tensor] = {}
        bare: dict[Any, Any] = {}
        for index, values in state_dict["state"].items():
            values = dict(values)
            master = values.pop(MASTER_KEY, None)
            if values:
                bare[index] = values
            if master is not None and isinstance(index, int) and index < len(flat):
                if master.shape != flat[index].shape:
                    raise ValueError(
                        f"master of parameter {index} has shape {tuple(master.shape)}, "
                        f"the parameter {tuple(flat[index].shape)}"
                    )
                loaded[flat[index]] = master
        # Inside, the masters stand in the groups, so torch's load casts moments to FP32 and not to 16 bits.
        with self.exchanged():
            self.optimizer.load_state_dict({**state_dict, "state": bare})
        with torch.no_grad():
            for parameter, master in loaded.items():
                self.of(parameter).copy_(master)  # an FP32 parameter is its own master
        if loaded:
            self.cast_back()

    def _with_masters(self, state: dict[Any, Any]) -> dict[Any, Any]:
        with_masters = {index: dict(values) for index, values in state.items()}
        for index, parameter in enumerate(self._flat()):
            if parameter in self._masters:
                with_masters.setdefault(index, {})[MASTER_KEY] = self._masters[parameter]
        return with_masters

    def _flat(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _exchange(self, replacement: list[list[Tensor]]) -> None:
        """Put ``replacement`` into the groups' lists, and move the state along."""
        state = self.optimizer.state
        for group, new in zip(self.optimizer.param_groups, replacement, strict=True):
            for old_parameter, new_parameter in zip(group["params"], new, strict=True):
                if old_parameter is not new_parameter and old_parameter in state:
                    state[new_parameter] = state.pop(old_parameter)
            group["params"][:] = new  # in place: LBFGS and others keep the list

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring masters up to date with parameters that were changed, or made FP32, from outside."""
        held = [p for p in self._flat() if p in self._masters]
        for parameter in held:
            if parameter.dtype not in LOW_PRECISION:
                del self._masters[parameter]
        pairs = [(p, self._masters[p]) for p in held if p in self._masters]
        differs = [(p != master.to(p.dtype)).any() for p, master in pairs]
        if not differs:
            return
        # One answer from the device for all of them; asking one by one would wait for it each time.
        changed = torch.stack([d.to(differs[0].device) for d in differs]).tolist()
        for parameter, master in itertools.compress(pairs, changed):
            same = parameter == master.to(parameter.dtype)
            master.copy_(torch.where(same, master, parameter.float()))

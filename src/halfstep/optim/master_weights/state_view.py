"""What an optimizer's state looks like with masters in it: ``optimizer.state``, and state dicts.

A parameter's master is shown and saved under `MASTER_KEY`, beside the optimizer's own state of that parameter. The
optimizer itself must not find it there: many make their state when the parameter's is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfstep.autocast import LOW_PRECISION

#: The key under which a parameter's state keeps its master, beside the optimizer's own state of it.
MASTER_KEY = "master"


def with_masters(
    state: Mapping[Any, Any], parameters: Sequence[Tensor], masters: Mapping[Tensor, Tensor]
) -> dict[Any, Any]:
    """The ``state`` of an optimizer's state dict with masters in it.

    Args:
        parameters: the optimizer's, in the order of its groups.
        masters: by parameter.
    """
    state = {key: dict(values) if isinstance(values, Mapping) else values for key, values in state.items()}
    result: dict[Any, Any] = {}
    for index, parameter in enumerate(parameters):
        if index in state:
            result[index] = state.pop(index)
        if parameter in masters:
            result.setdefault(index, {})[MASTER_KEY] = masters[parameter]
        elif masters and parameter.requires_grad:
            # PyTorch's distributed load wants state for every trained parameter once there is state for any.
            result.setdefault(index, {})
    result |= state  # what is no parameter's
    return result


def without_masters(
    state: Mapping[Any, Any], parameter_of: Mapping[Any, Tensor]
) -> tuple[dict[Any, Any], dict[Tensor, Tensor]]:
    """The ``state`` of a state dict taken apart: the optimizer's own, and masters by parameter.

    Args:
        parameter_of: by the keys of the state, which are indices, or names in a distributed checkpoint.

    Raises:
        ValueError: a master has not the shape of its parameter.
    """
    own: dict[Any, Any] = {}
    masters: dict[Tensor, Tensor] = {}
    for key, values in state.items():
        if not isinstance(values, Mapping) or key not in parameter_of:
            own[key] = values
            continue
        values, parameter = dict(values), parameter_of[key]
        master = values.pop(MASTER_KEY, None)
        if values:
            own[key] = values
        if master is None:
            continue
        if master.shape != parameter.shape:
            raise ValueError(
                f"master of parameter {key} has shape {tuple(master.shape)}, the parameter {tuple(parameter.shape)}"
            )
        masters[parameter] = master
    return own, masters


class StateView(MutableMapping[Any, Any]):
    """An optimizer's ``state`` with masters in it, live: writes go to the optimizer, and to the masters.

    Args:
        own: the optimizer's state, by parameter.
        masters: the masters to show, by parameter.
        hidden: masters that are held but not shown; see `halfstep.optim.MasterWeights.state`.
    """

    def __init__(self, own: MutableMapping[Any, Any], masters: dict[Tensor, Tensor], *, hidden: bool) -> None:
        self._own = own
        self._masters = masters
        self._hidden = hidden

    def __getitem__(self, parameter: Any) -> Any:
        if parameter in self._own and not isinstance(self._own[parameter], dict):
            return self._own[parameter]  # not a parameter's: some optimizers keep other things here
        return ParameterState(self._own, self._masters, parameter)

    def __setitem__(self, parameter: Any, values: Any) -> None:
        if not isinstance(values, Mapping):
            self._own[parameter] = values
            return
        values = dict(values)  # it may be a view of what is replaced now
        self._own[parameter] = {key: value for key, value in values.items() if key != MASTER_KEY}
        if MASTER_KEY in values:
            ParameterState(self._own, self._masters, parameter)[MASTER_KEY] = values[MASTER_KEY]

    def __delitem__(self, parameter: Any) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self._own.pop(parameter, None)
        self._masters.pop(parameter, None)

    def __iter__(self) -> Iterator[Any]:
        yield from list(self._own)
        if not self._hidden:
            yield from [parameter for parameter in self._masters if parameter not in self._own]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._own or (not self._hidden and parameter in self._masters)

    def get(self, parameter: Any, default: Any = None) -> Any:
        # Not Mapping.get, which asks __getitem__: a state of its own springs up there when it is written to.
        return self[parameter] if parameter in self else default  # noqa: SIM401

    def __repr__(self) -> str:
        return repr({key: dict(value) if isinstance(value, Mapping) else value for key, value in self.items()})


class ParameterState(MutableMapping[str, Any]):
    """One parameter's state, with its master under `MASTER_KEY` if it has one; live, as `StateView`."""

    def __init__(self, own: MutableMapping[Any, Any], masters: dict[Tensor, Tensor], parameter: Tensor) -> None:
        self._own = own
        self._masters = masters
        self._parameter = parameter

    def __getitem__(self, key: str) -> Any:
        if key == MASTER_KEY and self._parameter in self._masters:
            return self._masters[self._parameter]
        return self._own.get(self._parameter, {})[key]

    @torch.no_grad()
    def __setitem__(self, key: str, value: Any) -> None:
        if key == MASTER_KEY and self._parameter.dtype in LOW_PRECISION:
            self._masters[self._parameter] = value.detach().to(torch.float32)
            self._parameter.copy_(value)  # else the next step would take the parameter for changed, and follow it
        else:
            self._own.setdefault(self._parameter, {})[key] = value

    def __delitem__(self, key: str) -> None:
        if key == MASTER_KEY and self._parameter in self._masters:
            del self._masters[self._parameter]  # the next step makes one of the parameter as it is then
        else:
            del self._own.get(self._parameter, {})[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._own.get(self._parameter, {})
        if self._parameter in self._masters:
            yield MASTER_KEY

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

"""Loading an optimizer's state as it was saved, and converting the state of other storage.

``torch.optim.Optimizer.load_state_dict`` casts every floating-point state to its parameter's dtype, and integers with
them: an int16 remainder of a bf16 parameter would come back as bf16. So this is its twin without the cast. Where saved
and wanted storage differ (a run that goes on with 8-bit states; the state of ``torch.optim.AdamW``), the saved state is
decoded to FP32 and encoded anew. Entries that these optimizers do not know are somebody else's, who keeps them beside
the state (the slow weights of a Lookahead, say): they come back as they were saved, on the parameter's device.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.autocast import LOW_PRECISION
from halfstep.optim import dither, masters, moments
from halfstep.optim.layout import first_element, flat, is_dense, is_sharded, like, local
from halfstep.optim.rules import SGD, Lion, Rule

if TYPE_CHECKING:
    from halfstep.optim.base import MasterOptimizer

#: Entries of a parameter group that say how numbers are stored; PyTorch's optimizers do not know them.
STORAGE = ("master", "state", "rounding")
CODES = (torch.int8, torch.uint8)
#: What the rules of `halfstep.optim.rules` keep, whichever of them.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


@torch.no_grad()
def load_state(optimizer: MasterOptimizer, state_dict: dict[str, Any]) -> None:
    """`halfstep.optim.base.MasterOptimizer.load_state_dict`."""
    state_dict = dict(state_dict)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = hook(optimizer, state_dict) or state_dict
    if not isinstance(state_dict.get("param_groups"), list) or not isinstance(state_dict.get("state"), dict):
        raise KeyError(  # as PyTorch's
            f"not the state of an optimizer: it has {sorted(map(str, state_dict))}, not param_groups and state"
        )
    groups, saved_groups = optimizer.param_groups, copy.deepcopy(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(f"the state has {len(saved_groups)} parameter groups, this optimizer {len(groups)}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {index} of the state has {len(saved['params'])} parameters, "
                f"this optimizer's {len(group['params'])}"
            )
    merged = [
        {**group, **{k: v for k, v in saved.items() if k != "params" and k not in STORAGE}}
        for group, saved in zip(groups, saved_groups, strict=True)
    ]
    saved_ids = itertools.chain.from_iterable(saved["params"] for saved in saved_groups)
    owners = [(group, parameter) for group in merged for parameter in group["params"]]
    matched = dict(zip(saved_ids, owners, strict=True))
    known = {key: renamed(value, matched[key][1]) for key, value in state_dict["state"].items() if key in matched}
    for key, saved in known.items():
        group, parameter = matched[key]
        _check_shapes(key, parameter, saved)
        _check_complete(key, optimizer.rule(group), saved)
    others = {key: value for key, value in state_dict["state"].items() if key not in matched}
    state: defaultdict[Any, Any] = defaultdict(dict, others)
    for key, saved in known.items():
        group, parameter = matched[key]
        state[parameter] = _converted(optimizer, parameter, group, saved)
    optimizer.__setstate__({"state": state, "param_groups": merged})
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _check_complete(key: Any, rule: Rule, saved: dict[str, Any]) -> None:
    """Zeros in the place of what is missing, beside a count of many steps, would make for a huge update."""
    if isinstance(rule, SGD) or not any(moments.entry(saved, name) in saved for name in ("step", *MOMENTS)):
        return  # SGD's momentum begins with the first gradient after; others know of no step, as before the first
    wanted = ["step", *(name for name, _ in rule.states)]
    missing = [name for name in wanted if saved.get(moments.entry(saved, name)) is None]
    if missing and not (missing == ["step"] and isinstance(rule, Lion)):  # Lions elsewhere do not count
        raise ValueError(
            f"the state of parameter {key} has no {' and no '.join(missing)}: it is of another optimizer than "
            f"{type(rule).__name__} (it has {', '.join(map(str, saved))})"
        )


def _check_shapes(key: Any, parameter: Tensor, saved: dict[str, Any]) -> None:
    for name in own_entries(saved):
        value = saved[name]
        if not isinstance(value, Tensor) or name == "step":
            continue
        expected = moments.scale_shape(parameter.shape) if name.endswith("_scale") else tuple(parameter.shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{name} of parameter {key} has shape {tuple(value.shape)}, but a parameter of shape "
                f"{tuple(parameter.shape)} has {expected}: this state is of another model"
            )
        of = name.removesuffix("_codes")
        if of != name and not isinstance(saved.get(f"{of}_scale"), Tensor):
            raise ValueError(f"{of} of parameter {key} are 8-bit codes, but {of}_scale is missing in the state")


def _converted(
    optimizer: MasterOptimizer, parameter: Tensor, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """The state of one parameter in this optimizer's storage."""
    rule = optimizer.rule(group)
    names = [name for name, _ in rule.states]
    own = own_entries(saved)
    foreign = {name: _moved(value, parameter) for name, value in saved.items() if name not in own}
    if not own:
        return foreign
    state = optimizer.new_state(parameter, group, rule)
    state["step"].fill_(_step(saved, names))
    for stream, (name, square) in enumerate(rule.states):
        if isinstance(saved.get(moments.entry(saved, name)), Tensor):
            _take_moment(optimizer, parameter, state, saved, name, square, stream)
    _take_master(parameter, state, saved)
    return {**state, **foreign}


def own_entries(saved: dict[str, Any]) -> list[str]:
    """Names of the entries that an optimizer of `halfstep.optim` makes, in whatever storage."""
    names = {"step", *masters.NAMES, *itertools.chain.from_iterable(map(moments.entries, MOMENTS))}
    return [name for name in saved if name in names]


@torch.no_grad()
def renamed(saved: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """A parameter's state with its entries under their present names.

    In earlier files codes had the names of values; and the remainders of fp16 parameters were called as those of bf16.
    Those are told from those of a parameter that was bf16 and is fp16 since by its values: all of them bf16 numbers.
    """
    names = {name: f"{name}_codes" for name in MOMENTS if getattr(saved.get(name), "dtype", None) in CODES}
    if parameter.dtype is torch.float16 and isinstance(saved.get("remainder"), Tensor):
        values = local(parameter.detach())
        if bool((values.to(torch.bfloat16) != values.float()).any()):
            names["remainder"] = "fp16_remainder"
    return {names.get(name, name): value for name, value in saved.items()} if names else saved


def _moved(value: Any, parameter: Tensor) -> Any:
    """A copy of somebody else's entry with its tensors, at any depth, on the parameter's device; not cast."""
    if isinstance(value, Tensor):
        return value.detach().to(local(parameter).device, copy=True)
    if isinstance(value, dict):
        return {key: _moved(item, parameter) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, parameter) for item in value)
    return copy.deepcopy(value)


def _step(saved: dict[str, Any], names: list[str]) -> float:
    """Steps taken so far; torch's SGD does not count them, but has a momentum buffer after the first."""
    present = [isinstance(saved.get(moments.entry(saved, name)), Tensor) for name in names]
    if "step" in saved and all(present):
        return float(saved["step"])
    return 1.0 if any(present) else 0.0


def _take_moment(
    optimizer: MasterOptimizer,
    parameter: Tensor,
    state: dict[str, Any],
    saved: dict[str, Any],
    name: str,
    square: bool,
    stream: int,
) -> None:
    wanted, given = state[moments.entry(state, name)], saved[moments.entry(saved, name)]
    scale, given_scale = state.get(f"{name}_scale"), saved.get(f"{name}_scale")
    same_scale = given_scale is scale or (
        scale is not None and given_scale is not None and scale.shape == given_scale.shape
    )
    if wanted.dtype is given.dtype and same_scale and _same_order(given, wanted):
        wanted.copy_(given)
        if scale is not None:
            scale.copy_(given_scale)
        return
    row = moments.row_length(local(parameter).shape)
    part = local(given).to(local(wanted).device)
    dense = part if is_dense(part) else part.contiguous()
    their_scale = None if given_scale is None else flat(local(given_scale)).to(dense.device)
    x = moments.decode(flat(dense), their_scale, row).as_strided(dense.shape, dense.stride())
    x = flat(like(x, local(wanted))).clone()
    noise = None
    if square and wanted.dtype is not torch.float32:
        key = dither.key(optimizer.seed, optimizer._ordinal(parameter), dither.STATE[stream], first_element(parameter))
        noise = dither.dither(x.numel(), key, int(state["step"]), x.device)
    moments.encode(x, flat(local(wanted)), None if scale is None else flat(local(scale)), row, noise)


def _take_master(parameter: Tensor, state: dict[str, Any], saved: dict[str, Any]) -> None:
    names = masters.NAMES
    given_name = next((name for name in names if isinstance(saved.get(name), Tensor)), None)
    if given_name is None:
        return  # torch's own: masters start from the parameters
    given = saved[given_name]
    kept_name = next((name for name in names if name in state), None)
    kept = None if kept_name is None else state[kept_name]
    if kept is not None and kept_name == given_name and kept.dtype is given.dtype:
        kept.copy_(given)  # and belongs to the parameter that was saved with it
        return
    ours = local(parameter.detach())
    if given_name != "master":
        x = _joined(ours, given_name, given)
    elif parameter.dtype is torch.float32:
        recover(parameter, given)
        return
    else:
        x = local(given).to(ours.device)
    if parameter.dtype is torch.float32:
        ours.copy_(x)
        return
    dense = ours if is_dense(ours) else ours.contiguous()
    ours_kept = None if kept is None else flat(local(kept))
    masters.encode(flat(like(x.float(), dense)).clone(), flat(dense), ours_kept)
    if dense is not ours:
        ours.copy_(dense)


def recover(parameter: Tensor, master: Tensor) -> bool:
    """Give an FP32 parameter what it lost when it was 16-bit, where it still has that value.

    Args:
        master: float32, as it was saved, of the parameter's shape.

    Returns:
        Whether it had that value everywhere; it has not where other weights were loaded than those saved beside it.
    """
    ours = local(parameter.detach())
    master = local(master).to(ours.device)
    roundings = [master.to(low).float() for low in LOW_PRECISION]
    same = (ours == master) | (ours == roundings[0]) | (ours == roundings[1])
    ours.copy_(torch.where(same, master, ours))
    return bool(same.all())


def load_beside_masters(
    optimizer: Optimizer, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], Any]
) -> list[str]:
    """Load the state of an optimizer that held masters into one whose parameters are FP32, and are their own.

    Args:
        load: loads the state without masters.

    Returns:
        By index and shape, the parameters whose values are not those that were saved with their master: other weights
        were loaded. They keep their own there.
    """
    saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameter_of = dict(zip(saved, parameters, strict=False))  # PyTorch refuses other lengths
    state, found = {}, {}
    for key, entry in state_dict["state"].items():
        parameter = parameter_of.get(key)
        given = entry.get("master") if isinstance(entry, dict) else None
        if isinstance(given, Tensor) and isinstance(parameter, Tensor) and parameter.dtype is torch.float32:
            entry = {name: value for name, value in entry.items() if name != "master"}
            if given.shape == parameter.shape:
                found[key] = parameter, given
        if entry:
            state[key] = entry
    load({**state_dict, "state": state} if found else state_dict)
    with torch.no_grad():
        return [f"{key} {tuple(p.shape)}" for key, (p, given) in found.items() if not recover(p, given)]


STALE = (
    "the optimizer's state holds FP32 masters of other weights than this model has now (parameters {}): they are not "
    "taken there. Load the model that was saved with it, too"
)


def _joined(ours: Tensor, name: str, given: Tensor) -> Tensor:
    """The master from the parameter and a saved remainder or compensation, where it still has a value of their format.

    Elsewhere, as after other weights were loaded into another format, the parameter's own value.
    """
    low = {"remainder": torch.bfloat16, "fp16_remainder": torch.float16}.get(name, given.dtype)
    dense = ours if is_dense(ours) else ours.contiguous()
    in_low = dense.to(low)
    part = like(local(given).to(dense.device), dense)
    master = masters.decode(flat(in_low), flat(part)).as_strided(dense.shape, dense.stride())
    return torch.where(in_low.float() == dense.float(), master, dense.float())


def _same_order(given: Tensor, wanted: Tensor) -> bool:
    """Whether both lie alike in memory, so that groups of 64 are the same elements."""
    return is_sharded(given) or wanted.dtype in (torch.float32, torch.bfloat16) or given.stride() == wanted.stride()

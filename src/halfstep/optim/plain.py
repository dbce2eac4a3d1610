"""To plain FP32 and back: weights and optimizer state as FP32 training with ``torch.optim`` would have them.

For the tools that know nothing of remainders and 8-bit codes: publish FP32 weights, go on in an FP32 run, compare two
checkpoints. ::

    weights, state = halfstep.optim.export_fp32(model, optimizer)
    fp32_model.load_state_dict(weights)
    torch.optim.AdamW(fp32_model.parameters()).load_state_dict(state)

    halfstep.optim.import_fp32(model, optimizer, weights, state)        # the way back

What comes back from storage that holds the FP32 numbers (``master="exact"`` or ``"fp32"``, ``state="fp32"``) is those
numbers, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfstep.optim import moments
from halfstep.optim.base import MasterOptimizer
from halfstep.optim.layout import flat, is_dense, local
from halfstep.optim.loading import STORAGE, own_entries


@torch.no_grad()
def export_fp32(model: nn.Module, optimizer: MasterOptimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model's and the optimizer's state in FP32; new tensors.

    Returns:
        A state dict of the model: its parameters' FP32 masters, and whatever else is 16-bit as FP32. And one of
        PyTorch's optimizer of the same name, its parameters in the order of ``optimizer``.

    Raises:
        TypeError: ``optimizer`` is not one of `halfstep.optim`.
        ValueError: parameters are sharded over ranks: gather them first (``torch.distributed.checkpoint``).
    """
    if not isinstance(optimizer, MasterOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is none of halfstep.optim's optimizers: its own state is plain already, and "
            "MasterWeights gives each FP32 master by of(parameter)"
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    master_of: dict[int, Tensor] = {}
    weights: dict[str, Tensor] = {}
    entries = {**dict(model.named_parameters(remove_duplicate=False))}
    for name, value in model.state_dict().items():
        parameter = entries.get(name)
        if parameter is not None:
            _refuse_sharded(name, parameter)
        if parameter is not None and id(parameter) in stepped:
            if id(parameter) not in master_of:
                master_of[id(parameter)] = optimizer.master(parameter)
            weights[name] = master_of[id(parameter)]
        elif isinstance(value, Tensor):
            weights[name] = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value.clone()
    return weights, _plain_state(optimizer)


@torch.no_grad()
def import_fp32(
    model: nn.Module,
    optimizer: MasterOptimizer,
    weights: Mapping[str, Tensor],
    state: dict[str, Any] | None = None,
) -> None:
    """Take FP32 weights as the masters of the model's parameters, and a state dict of PyTorch's optimizer.

    Args:
        weights: names and shapes as in ``model.state_dict()``.
        state: of PyTorch's optimizer of the same name; None: the optimizer starts afresh on these weights.

    Raises:
        ValueError: names or shapes do not match the model's; nothing has changed then. Or the state does not match
            the optimizer's groups; the weights are loaded then.
    """
    _check_names_and_shapes(model, weights)
    model.load_state_dict(dict(weights))
    if state is None:
        optimizer.state.clear()
    else:
        optimizer.load_state_dict(state)
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in stepped and name in weights:
            optimizer.adopt(parameter, weights[name].to(parameter.device, torch.float32))


def _plain_state(optimizer: MasterOptimizer) -> dict[str, Any]:
    """A state dict with FP32 moments and without masters."""
    packed = optimizer.state_dict()
    states: dict[int, dict[str, Any]] = {}
    for group, numbered in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        rule = optimizer.rule(group)
        for index, parameter in zip(numbered["params"], group["params"], strict=True):
            if index not in packed["state"]:
                continue
            held = packed["state"][index]
            own = own_entries(held)
            plain = {name: copy.deepcopy(value) for name, value in held.items() if name not in own}
            if "step" in held:
                plain["step"] = held["step"].cpu().clone()
                for name, _ in rule.states:
                    plain[name] = _decoded(held[moments.entry(held, name)], held.get(f"{name}_scale"), parameter)
            states[index] = plain
    groups = [{k: v for k, v in group.items() if k not in STORAGE} for group in packed["param_groups"]]
    return {"state": states, "param_groups": groups}


def _decoded(codes: Tensor, scale: Tensor | None, parameter: Tensor) -> Tensor:
    dense = codes if is_dense(codes) else codes.contiguous()
    row = moments.row_length(local(parameter).shape)
    x = moments.decode(flat(dense), None if scale is None else flat(scale), row)
    return x.as_strided(dense.shape, dense.stride()).clone()


def _check_names_and_shapes(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Before anything is written: ``load_state_dict`` finds what is missing after it has loaded the rest."""
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not the model's" for name in weights if name not in own]
    for name in own.keys() & weights.keys():
        ours, theirs = own[name], weights[name]
        if isinstance(ours, Tensor) and ours.shape != theirs.shape:
            wrong.append(f"{name} has shape {tuple(theirs.shape)}, the model's {tuple(ours.shape)}")
    if wrong:
        raise ValueError(f"these weights are of another model: {'; '.join(sorted(wrong)[:5])} ({len(wrong)} in all)")


def _refuse_sharded(name: str, parameter: Tensor) -> None:
    if hasattr(parameter, "to_local"):
        raise ValueError(
            f"parameter {name!r} is sharded over ranks, and a plain state is of one process: save with "
            "torch.distributed.checkpoint, or gather with get_model_state_dict(full_state_dict=True) first"
        )

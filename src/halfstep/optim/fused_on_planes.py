"""PyTorch's fused optimizers on parameters that are stored in planes: both planes in one pass of the kernels here.

``torch.optim.AdamW(fused=True)`` calls one op for all its parameters. Where that meets a `SplitTensor`, the kernel for
``exact`` masters steps it: the upper plane is its parameter, the lower its remainder. Plain parameters of the same
call go to PyTorch's own kernel. Where no fast kernel is at hand, or PyTorch wants a loss scale divided out of the
gradients in memory, the op goes the way of any other: tensor by tensor, joined.

PyTorch's other forms (one tensor at a time, ``foreach``) are sequences of ordinary ops, each of which joins and splits
a parameter. `in_one_pass` gives them the fused form for a step, and its bits: some elements in a thousand are rounded
otherwise than in theirs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from halfstep.optim import backends, moments
from halfstep.optim.layout import flat, is_dense, is_sharded, like
from halfstep.optim.rules import SGD, Adam, Rule
from halfstep.optim.update import Job
from halfstep.split import SplitTensor, register

aten = torch.ops.aten


#: PyTorch's optimizers that have a fused form, which is one op.
ONE_OP = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


@contextlib.contextmanager
def in_one_pass(optimizer: Optimizer) -> Iterator[None]:
    """Within, ``optimizer.step()`` of PyTorch's AdamW, Adam or SGD is its fused form where it meets planes.

    Groups that are fused already, that hold no parameter in planes, or that the kernels cannot step, stay as they are;
    so does any other optimizer, subclasses of these included.
    """
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if type(optimizer) in ONE_OP:
        for group in optimizer.param_groups:
            if not group.get("fused") and _can_be_one_op(group):
                changed.append((group, {name: group[name] for name in ("fused", "foreach")}))
    try:
        for group, _ in changed:
            group.update(fused=True, foreach=False)
            for parameter in group["params"]:
                step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
                if isinstance(step, Tensor) and step.device != parameter.device:
                    optimizer.state[parameter]["step"] = step.to(parameter.device)
        yield
    finally:
        for group, own in changed:
            group.update(own)


def _can_be_one_op(group: dict[str, Any]) -> bool:
    stepped = [p for p in group["params"] if p.grad is not None]
    if group.get("differentiable") or not any(isinstance(p, SplitTensor) for p in stepped):
        return False
    return all(
        p.dtype is p.grad.dtype is torch.float32
        and p.grad.layout is torch.strided
        and not is_sharded(p)
        and not backends.lacking(p.device.type)
        for p in stepped
    )


def _fused_adam(op: Any, args: Any, kwargs: Any) -> Any:
    given = _named(op, args, kwargs)
    rule = Adam(
        given["lr"],
        given["beta1"],
        given["beta2"],
        given["eps"],
        given["weight_decay"],
        decoupled=op._schema.name == "aten::_fused_adamw_",
        amsgrad=given["amsgrad"],
        maximize=given["maximize"],
    )
    lists = ["exp_avgs", "exp_avg_sqs", *(["max_exp_avg_sqs"] if given["amsgrad"] else [])]
    states = list(zip(*(given[name] for name in lists), strict=True))
    return _update(op, given, rule, states, given["state_steps"], -1.0)  # PyTorch has counted it; the kernels will


def _fused_sgd(op: Any, args: Any, kwargs: Any) -> Any:
    given = _named(op, args, kwargs)
    momentum, count = given["momentum"], len(given["self"])
    rule = SGD(
        given["lr"], momentum, given["dampening"], given["nesterov"], given["weight_decay"], maximize=given["maximize"]
    )
    states = [(buffer,) for buffer in given["momentum_buffer_list"]] if momentum else [()] * count
    return _update(op, given, rule, states, None, 0.0 if given["is_first_step"] else 1.0)


def _update(
    op: Any,
    given: dict[str, Any],
    rule: Rule,
    states: Sequence[Sequence[Tensor]],
    counted: Sequence[Tensor] | None,
    more: float,
) -> Any:
    """Step those in planes by the kernels, the others by PyTorch.

    Args:
        counted: steps taken, float32, by parameter; None: 0.
        more: added to that, for what the kernels are told.
    """
    parameters, gradients = given["self"], given["grads"]
    device = parameters[0].device
    if given.get("grad_scale") is not None or backends.lacking(device.type):
        return NotImplemented
    in_planes: list[int] = []
    rest: list[int] = []
    for index, parameter in enumerate(parameters):
        stored = isinstance(parameter, SplitTensor) and is_dense(parameter.hi)
        (in_planes if stored else rest).append(index)
    jobs = [_job(parameters[i], gradients[i], states[i]) for i in in_planes]
    steps = [job.step for job in jobs]
    if counted is None:
        torch._foreach_zero_(steps)
    else:
        torch._foreach_copy_(steps, [counted[i] for i in in_planes])
    torch._foreach_add_(steps, more)
    found_inf = given.get("found_inf")
    flag = None if found_inf is None else found_inf.reshape(())
    backend, _ = backends.choose("auto", device)
    backend.update(jobs, rule, stochastic=False, coefficient=None, found_inf=flag)
    for i, job in zip(in_planes, jobs, strict=True):
        for state, stepped in zip(states[i], job.states, strict=True):
            if state.stride() != parameters[i].stride():  # a copy was stepped
                state.copy_(stepped.as_strided(parameters[i].size(), parameters[i].stride()))
    torch.autograd.graph.increment_version([parameters[i] for i in in_planes])
    torch.autograd.graph.increment_version([parameters[i].hi for i in in_planes])
    if rest:
        part = {n: [v[i] for i in rest] if isinstance(v, list | tuple) and len(v) else v for n, v in given.items()}
        op(**part)  # below autograd, which would count
        torch.autograd.graph.increment_version([parameters[i] for i in rest])
    return None


def _job(parameter: SplitTensor, gradient: Tensor, states: Sequence[Tensor]) -> Job:
    """The parameter's update; all but the gradient is kept at the parameter, because steps wait for this."""
    upper = parameter.hi
    made_from = (upper, parameter.lo, *states)
    known = parameter.notes.get(_KNOWN)
    if (
        known is None
        or len(known[0]) != len(made_from)
        or any(a is not b for a, b in zip(known[0], made_from, strict=True))
    ):
        alike = all(state.stride() == upper.stride() for state in states)
        job = Job(
            parameter=flat(upper),
            gradient=upper,
            kept=flat(parameter.lo),
            states=tuple(flat(like(state, upper)) for state in states),
            scales=(None,) * len(states),
            step=torch.zeros((), dtype=torch.float32, device=upper.device),
            row=moments.row_length(parameter.shape),
            seed=0,
            ordinal=0,
            notes={},
        )
        known = made_from, job
        if alike:  # else the copies are of this step
            parameter.notes[_KNOWN] = known
    job = known[1]
    return job._replace(gradient=flat(like(gradient, upper)))


_KNOWN = "update"


def _named(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = [argument.name for argument in op._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def teach() -> None:
    """Let split parameters know these ops."""
    for op in (aten._fused_adamw_, aten._fused_adam_):
        register(op.default, _fused_adam)
        register(op.tensor_lr, _fused_adam)
    register(aten._fused_sgd_.default, _fused_sgd)
    register(aten._fused_sgd_.tensor_lr, _fused_sgd)

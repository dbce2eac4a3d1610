"""What a scaler learns from a model it was shown: statistics to put back, names for errors, a diagnosis."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.optim import MasterWeights
from halfstep.scale import Cause, GradScaler, HalfGradientError, LossScaleError, Skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        y = self.norm(self.first(x))
        result: Tensor = self.last(y if mask is None else y + mask.exp())
        return result


def make(fused: bool = False) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    return net, torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(net.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_a_watched_model_as_it_was(fused: bool) -> None:
    net, optimizer = make(fused)
    scaler = GradScaler("cpu")
    scaler.watch(net)
    for bad in (False, True, False, True):
        before = state_of(net)
        for part in range(2):
            scaler.scale(net(torch.randn(3, 4) * (math.inf if bad and part else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert same(before, state_of(net)) == bad
    assert net.norm.num_batches_tracked is not None and net.norm.num_batches_tracked.item() == 4


def test_pytorchs_scaler_leaves_nan_in_running_statistics() -> None:
    net, optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.full((3, 4), math.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert net.norm.running_mean is not None and net.norm.running_mean.isnan().all()
    assert net.eval()(torch.randn(3, 4)).isnan().all()


def test_evaluation_and_recomputation_are_not_looked_at() -> None:
    net, optimizer = make()
    scaler = GradScaler("cpu")
    scaler.watch(net)
    with torch.no_grad():
        net(torch.randn(3, 4))  # moves the statistics; it is not part of a step that could be skipped
    before = state_of(net)
    x = torch.randn(3, 4)
    y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    scaler.scale(y.sum() * math.inf).backward()
    assert len(scaler._watched._inputs) == 1  # recomputation's are the same data again
    scaler.step(optimizer)
    scaler.update()
    assert same(before, state_of(net))


def test_a_watched_model_is_copied_and_pickled_without_the_scaler_and_outlives_it() -> None:
    net, _ = make()
    scaler = GradScaler("cpu")
    scaler.watch(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other(torch.randn(3, 4))
        assert not scaler._watched.saw_inputs()
    x = torch.randn(3, 4)
    net(x)
    assert scaler._watched.saw_inputs()
    copied = copy.deepcopy(scaler)
    assert not copied._watched.saw_inputs()
    assert len(net._forward_pre_hooks) == 1
    del scaler, copied
    gc.collect()
    assert len(net._forward_pre_hooks) == 0
    net(x)


def test_inputs_are_not_kept_alive() -> None:
    net, _ = make()
    scaler = GradScaler("cpu")
    scaler.watch(net)
    x = torch.randn(3, 4)
    mask = torch.zeros(3, 6)
    net(x, mask=mask)
    assert scaler._watched.saw_inputs()
    del mask
    gc.collect()
    assert not scaler._watched.saw_inputs()


def bad_step(cause: str, net: Net, scaler: Any) -> tuple[Tensor, Tensor]:
    """One iteration with non-finite gradients; returns its data, which training loops hold on to until the next."""
    x, mask = torch.randn(3, 4), torch.full((3, 6), -math.inf)  # masks hold -inf, and are no bad data
    if cause == "data":
        x[1, 2] = math.nan
    loss = net(x, mask=mask).sum()
    if cause == "forward":
        loss = loss * math.inf
    scaler.scale(loss).backward()
    if cause == "gradients":
        assert net.first.weight.grad is not None
        net.first.weight.grad[0, 0] = math.inf
    return x, mask


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("data", "The data hold inf or NaN: inputs of the model are not finite, so no loss scale .* can help"),
        ("forward", r"The loss itself is not finite, so no loss scale can help: the forward pass overflows\. Use bf16"),
        ("gradients", "The loss is finite, its gradients are not, at this scale too: .* at its floor"),
    ],
)
def test_the_three_causes_are_told_apart(cause: str, said: str, fused: bool) -> None:
    net, optimizer = make(fused)
    told: list[Skip] = []
    scaler = GradScaler("cpu", 4.0, max_skipped=3, on_skip=told.append)
    scaler.watch(net)
    with pytest.raises(LossScaleError, match=said):
        for _ in range(3):
            data = bad_step(cause, net, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            del data
    assert [skip.cause for skip in told] == [Cause(cause)] * 3


@pytest.mark.parametrize("cause", ["data", "forward"])
def test_without_a_model_to_look_at_data_and_forward_pass_are_both_named(cause: str) -> None:
    net, optimizer = make()
    scaler = GradScaler("cpu", max_skipped=1)
    bad_step(cause, net, scaler)
    scaler.step(optimizer)
    with pytest.raises(LossScaleError, match=r"the forward pass overflows or the data hold inf or NaN.*watch\(model\)"):
        scaler.update()


def test_of_microbatches_that_are_gone_nothing_is_claimed() -> None:
    net, optimizer = make()
    scaler = GradScaler("cpu", max_skipped=1)
    scaler.watch(net)
    for poison in (math.nan, 0.0):
        x = torch.randn(3, 4) + poison
        scaler.scale(net(x).sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(LossScaleError, match="the forward pass overflows or the data hold inf or NaN"):
        scaler.update()


def test_data_can_be_handed_in_and_are_judged_when_the_skip_is_learnt_of() -> None:
    net, optimizer = make(fused=True)
    told: list[Skip] = []
    scaler = GradScaler("cpu", on_skip=told.append)
    x = torch.full((3, 4), math.nan)
    scaler.note_inputs([x, "not a tensor", torch.arange(3)])
    scaler.scale(net(x).sum()).backward()
    scaler.step(optimizer)
    assert not scaler.step_was_applied
    del x
    gc.collect()
    scaler.update()
    assert told[0].cause is Cause.DATA


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dynamic": False}, r"the scale is static\. A lower one can help: GradScaler\(init_scale=256\)"),
        ({"hysteresis": 9}, r"A lower scale may help, and it may fall to 1 yet"),
    ],
)
def test_a_scale_that_could_still_help_is_named(options: dict[str, Any], said: str) -> None:
    net, optimizer = make()
    scaler = GradScaler("cpu", max_skipped=2, **options)
    with pytest.raises(LossScaleError, match=said):
        for _ in range(2):
            bad_step("gradients", net, scaler)
            scaler.step(optimizer)
            scaler.update()


def test_fp16_gradients_are_refused_by_name_with_three_remedies() -> None:
    net = Net().half()
    scaler = GradScaler("cpu")
    bare = torch.optim.SGD(net.parameters(), lr=0.1)
    named = torch.optim.SGD(net.named_parameters(), lr=0.1)
    scaler.scale(torch.ones(()))
    for p in net.parameters():
        p.grad = torch.ones_like(p)

    def refusal(optimizer: torch.optim.Optimizer) -> str:
        with pytest.raises(HalfGradientError) as error:
            scaler.unscale_(optimizer)
        return str(error.value)

    assert refusal(bare).startswith("the gradient of parameter 0 of parameter group 0 (shape (6, 4)) is float16")
    assert refusal(named).startswith("the gradient of parameter 'first.weight' (shape (6, 4)) is float16")
    scaler.watch(net)
    said = refusal(bare)
    assert said.startswith("the gradient of parameter 'first.weight'")
    assert all(remedy in said for remedy in ("load the model in float32", "MasterWeights", "bfloat16"))
    assert "Attempting" not in said and isinstance(HalfGradientError(), ValueError)


def test_fp16_gradients_are_unscaled_in_fp32_where_masters_exist() -> None:
    """2^-10 * 2^16 / 2^16 in FP16 is fine, but 2^-30 * 2^16 / 2^16 is 0 in FP16: only FP32 keeps it."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    masters = MasterWeights(optimizer)
    scaler = GradScaler("cpu")
    scaler.scale((weight.float() * torch.tensor([2.0**-10, 2.0**-30])).sum()).backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float16
    with masters.exchanged():
        scaler.unscale_(optimizer)
        (master,) = optimizer.param_groups[0]["params"]
        assert master.grad.tolist() == [2.0**-10, 2.0**-30]
        scaler.step(optimizer)
    scaler.update()
    assert masters.masters()[0].tolist() == [1 - 2.0**-10, 1.0]
    assert (torch.tensor(2.0**-30).half() == 0).all()


@pytest.mark.parametrize("gradients", [[2.0**-10, 2.0**-14], [2.0**-10, math.inf]])
def test_a_fused_optimizer_divides_fp16_gradients_itself(gradients: list[float]) -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    scaler = GradScaler("cpu", 2.0**4)
    scaler.scale(torch.ones(()))
    weight.grad = torch.tensor(gradients).half() * 2.0**4
    scaler.step(optimizer)
    scaler.update()
    expected = torch.tensor(gradients) if math.isfinite(sum(gradients)) else torch.zeros(2)
    assert torch.equal(weight, (1 - expected).half())


def test_compiling_a_watched_model_costs_no_graph_break() -> None:
    net, _ = make()
    scaler = GradScaler("cpu")
    scaler.watch(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert compiled(torch.randn(3, 4)).shape == (3, 1)
    wrapped = torch.compile(make()[0], backend="eager", fullgraph=True)
    scaler.watch(wrapped)
    x = torch.randn(3, 4)
    wrapped(x)
    assert scaler._watched.saw_inputs()

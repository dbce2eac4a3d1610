"""Things that real scripts do and that are easy to get wrong from outside."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

POLICIES = ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master"]
HEAD = """
    import torch
    from torch import nn
    torch.manual_seed(0)
    x = torch.randn(16, 8)
"""


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_compiled_code_goes_on_running_through_the_whole_run(launch, policy):
    ran = launch(
        HEAD
        + """
    runs = [0]
    def backend(graph, inputs):
        def call(*arguments):
            runs[0] += 1
            return graph.forward(*arguments)
        return call
    net = nn.Linear(8, 1)
    model = torch.compile(net, backend=backend)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    counts = []
    for _ in range(6):
        before = runs[0]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(runs[0] - before)
    torch.save({"counts": counts}, "out.pt")
    """,
        policy,
    )
    assert ran.out["counts"] == [1] * 6
    assert ran.codes == {"memory-not-measured"} and ran.record.memory is None


@pytest.mark.parametrize("policy", POLICIES)
def test_future_imports_are_the_scripts_own(launch, policy):
    ran = launch(
        """
        import dataclasses, torch
        @dataclasses.dataclass
        class Config:
            lr: float = 0.1
        torch.save({"real": dataclasses.fields(Config)[0].type is float}, "out.pt")
        """,
        policy,
    )
    assert ran.out["real"]


def test_script_that_guards_its_own_step_still_brings_the_scale_down(launch):
    ran = launch(
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    stepped = []
    for _ in range(12):
        optimizer.zero_grad()
        (net(x).square().mean() * 100).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        stepped.append(bool(torch.isfinite(norm)))
    torch.save({"stepped": stepped}, "out.pt")
    """,
        "fp16-mixed",
    )
    stepped = ran.out["stepped"]
    assert not stepped[0] and all(stepped[-4:])
    first = stepped.index(True)
    assert stepped == [False] * first + [True] * (12 - first)
    assert {s.scale for s in ran.record.steps} == {2.0 ** (16 - first)}


def test_overflow_in_one_of_several_backwards_backs_off_once(launch):
    ran = launch(
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for step in range(4):
        for micro in range(3):
            bad = step == 1 and micro == 0
            (net(x).square().mean() * (float("inf") if bad else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    """,
        "fp16-mixed",
    )
    assert [s.applied for s in ran.record.steps] == [True, False, True, True]
    assert [s.scale for s in ran.record.steps][2:] == [32768.0, 32768.0]


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed"])
def test_compile_with_checkpointing_records_plain_numbers(launch, policy):
    ran = launch(
        HEAD
        + """
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False))
    net = Net()
    model = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(5):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    """,
        policy,
    )
    assert ran.run.exit_code == 0 and len(ran.record.steps) == 5


def test_optimizer_in_backward(launch):
    source = (
        HEAD
        + """
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizers = {p: torch.optim.SGD([p], 0.05) for p in net.parameters()}
    def hook(p):
        optimizers[p].step()
        optimizers[p].zero_grad()
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(hook)
    losses = []
    for _ in range(5):
        loss = net(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    torch.save({"losses": losses}, "out.pt")
    """
    )
    runs = {policy: launch(source, policy) for policy in POLICIES}
    reference = runs["fp32"].out["losses"]
    for policy, ran in runs.items():
        assert ran.run.exit_code == 0, policy
        assert ran.out["losses"] == pytest.approx(reference, rel=3e-2), policy
        assert len(ran.record.steps) == 20


def test_hooks_and_leaves_of_the_script_see_unscaled_gradients(launch):
    source = (
        HEAD
        + """
    net = nn.Linear(8, 1)
    seen = {}
    net.weight.register_hook(lambda g: seen.setdefault("hook", g.detach().clone()).clamp(-0.01, 0.01))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    delta = torch.zeros(16, 8, requires_grad=True)     # neither a parameter nor an argument of the module
    (net(x + delta).square().mean() / 8).backward()
    seen["delta"], seen["clamped"] = delta.grad, net.weight.grad
    torch.save(seen, "out.pt")
    """
    )
    plain, scaled = launch(source, "fp32").out, launch(source, "fp16-mixed").out
    for name, value in plain.items():
        assert torch.allclose(scaled[name], value, rtol=0, atol=3e-3 * value.abs().max().item()), name
    assert plain["clamped"].abs().max() <= 0.01


def test_gradients_by_autograd_grad_get_a_notice(launch):
    source = (
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for p, g in zip(net.parameters(), torch.autograd.grad(net(x).square().mean(), list(net.parameters()))):
        p.grad = g
    optimizer.step()
    """
    )
    ran = launch(source, "fp16-mixed")
    (notice,) = [n for n in ran.record.notices if n.code == "unscaled-gradients"]
    assert notice.where is not None and notice.where.endswith(".py:9")
    assert "unscaled-gradients" not in launch(source, "bf16-mixed").codes


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_checkpointing_outside_any_module_call(launch, policy, reentrant):
    source = (
        HEAD
        + f"""
    from torch.utils.checkpoint import checkpoint
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            self.head = nn.Linear(8, 1)
        def training_step(self, x):
            h = checkpoint(self.block, x.requires_grad_(), use_reentrant={reentrant}) if CHECKPOINT else self.block(x)
            return self.head(h).square().mean()
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        net.training_step(x.clone()).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(net.state_dict(), "out.pt")
    """
    )
    plain = launch(source.replace("CHECKPOINT", "False"), policy)
    checkpointed = launch(source.replace("CHECKPOINT", "True"), policy)
    assert plain.run.exit_code == checkpointed.run.exit_code == 0
    for name, value in plain.out.items():
        assert torch.equal(checkpointed.out[name], value), name


@pytest.mark.parametrize("dtype", ["float64", "complex64"])
@pytest.mark.parametrize("policy", POLICIES)
def test_given_gradients_double_precision_and_complex_parameters(launch, policy, dtype):
    source = (
        HEAD
        + f"""
    w = nn.Parameter(torch.randn(8, 4, dtype=torch.{dtype}))
    optimizer = torch.optim.SGD([w], 0.01)
    for _ in range(4):
        y = x.to(torch.{dtype}) @ w
        y.backward(y.detach().conj() / 16)
        optimizer.step()
        optimizer.zero_grad()
    torch.save({{"w": w.detach()}}, "out.pt")
    """
    )
    under, plain = launch(source, policy), launch(source, "fp32")
    assert under.run.exit_code == 0
    assert torch.equal(under.out["w"], plain.out["w"])
    assert all(s.loss is not None and math.isfinite(s.loss) for s in under.record.steps)


@pytest.mark.parametrize("policy", POLICIES)
def test_sharpness_aware_minimisation_evaluates_its_closure_again(launch, policy):
    ran = launch(
        HEAD
        + """
    class SAM(torch.optim.Optimizer):
        def __init__(self, parameters, lr, rho=0.05):
            super().__init__(parameters, dict(lr=lr, rho=rho))
        @torch.no_grad()
        def step(self, closure=None):
            assert closure is not None, "sharpness-aware minimisation requires a closure"
            with torch.enable_grad():
                loss = closure()
            moved = []
            for group in self.param_groups:
                for p in group["params"]:
                    e = p.grad * group["rho"] / (p.grad.norm() + 1e-12)
                    p.add_(e)
                    moved.append((p, e))
            with torch.enable_grad():
                closure()
            for group in self.param_groups:
                for p, e in moved:
                    p.sub_(e)
                    p.add_(p.grad, alpha=-group["lr"])
            return loss
    net = nn.Linear(8, 1)
    optimizer = SAM(net.parameters(), lr=0.05)
    evaluations = [0]
    def closure():
        evaluations[0] += 1
        optimizer.zero_grad()
        loss = net(x).square().mean() * (float("inf") if evaluations[0] == 4 else 1)
        loss.backward()
        return loss
    losses = []
    for step in range(5):
        before = net.weight.detach().clone()
        losses.append(optimizer.step(closure).item())
        if step == 1:
            same = torch.equal(before, net.weight)
    torch.save({"losses": losses, "same": same}, "out.pt")
    """,
        policy,
    )
    assert ran.run.exit_code == 0
    if policy == "fp16-mixed":  # the second evaluation of step 2 overflowed: the step is undone as a whole
        assert ran.out["same"] and [s.applied for s in ran.record.steps] == [True, False, True, True, True]
        losses = ran.out["losses"]
        assert losses[-1] < losses[0] and [math.isfinite(x) for x in losses] == [True, False, True, True, True]


def test_lbfgs_under_masters_follows_its_own_line_search(launch):
    source = (
        HEAD
        + """
    net = nn.Linear(8, 1)
    target = x @ torch.ones(8, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5)
    def closure():
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        return loss
    losses = [optimizer.step(closure).item() for _ in range(4)]
    torch.save({"losses": losses}, "out.pt")
    """
    )
    for policy in ("fp32", "bf16-mixed", "bf16-master"):
        losses = launch(source, policy).out["losses"]
        assert losses[-1] < 1e-2 * losses[0], policy
    assert "LBFGS" in launch(source, "fp16-mixed").record.end.error


@pytest.mark.parametrize("policy", POLICIES)
def test_spectral_norm_and_transformer_encoder_in_evaluation(launch, policy):
    ran = launch(
        HEAD
        + """
    from torch.nn.utils import parametrizations, spectral_norm, weight_norm
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 16)),
        spectral_norm(nn.Linear(16, 16)),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1),
        parametrizations.weight_norm(nn.Linear(16, 1)),
    )
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    for _ in range(3):
        net.train()
        net(x[None]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            value = net(x[None]).square().mean().item()
    torch.save({"value": value}, "out.pt")
    """,
        policy,
    )
    assert ran.run.exit_code == 0 and math.isfinite(ran.out["value"])
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("policy", POLICIES)
def test_wrapped_step_of_an_instance_runs_once(launch, policy):
    ran = launch(
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    calls, inner = [0], optimizer.step
    def step(*arguments, **keywords):
        calls[0] += 1
        return inner(*arguments, **keywords)
    optimizer.step = step
    for _ in range(5):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"calls": calls[0]}, "out.pt")
    """,
        policy,
    )
    assert ran.out["calls"] == 5


def test_recorded_loss_of_a_script_with_its_own_scaler_is_the_unscaled_one(launch):
    ran = launch(
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    loss = net(x).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.save({"loss": loss.item()}, "out.pt")
    """,
        "fp32",
    )
    assert ran.record.steps[0].loss == ran.out["loss"]


def test_model_inside_a_compiled_function_is_told_apart(launch):
    source = (
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    @torch.compile(backend="eager")
    def loss_of(x):
        return net(x).square().mean()
    loss_of(x).backward()
    optimizer.step()
    """
    )
    assert "compiled-function" in launch(source, "bf16-mixed").codes
    assert "compiled-function" not in launch(source, "fp32").codes


def test_seeds_given_by_name(launch):
    source = """
        import random, numpy, torch
        torch.manual_seed(seed=3)
        random.seed(a=3)
        torch.save({"draws": (torch.rand(1).item(), random.random(),
                              float(numpy.random.default_rng(seed=3).random()))}, "out.pt")
    """
    zero, one = (launch(source, "fp32", seed=seed) for seed in (0, 1))
    assert one.run.exit_code == 0
    assert not set(zero.out["draws"]) & set(one.out["draws"])


def test_every_line_of_a_nan_run_is_strict_json(launch):
    ran = launch(
        HEAD
        + """
    net = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        (net(x).sum() * float("nan")).backward()
        optimizer.step()
    """,
        "fp32",
    )

    def refuse(text: str) -> None:
        raise AssertionError(text)

    for line in Path(ran.record.path).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert all(math.isnan(loss) for loss in ran.record.losses)

"""Hooks before and after steps, and what scripts do to gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, loss_of, made, norm, weights


@scenario("distance", library=True)
def clipping_in_a_pre_hook() -> Numbers:
    """Gradients clipped to a norm of 1e-3 by a hook before each step."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    training.train(model, optimizer, 10)
    return {"moved": distance(model, start)}


@scenario("largest weight", library=True)
def clamping_in_a_post_hook() -> Numbers:
    """Weights clamped to 0.2 by a hook after each step."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.register_step_post_hook(lambda *_: [p.data.clamp_(-0.2, 0.2) for p in model.parameters()] and None)
    training.train(model, optimizer, 10)
    return {"largest": max(p.detach().abs().max().item() for p in model.parameters())}


@scenario("distance; the number of calls", library=True)
def hooks_on_all_optimizers() -> Numbers:
    """Hooks for every optimizer: one adds to gradients, one counts."""
    model, calls = made(), []
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)

    def decay(optimizer, *_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.add_(p.detach(), alpha=0.1)

    handles = [register_optimizer_step_pre_hook(decay), register_optimizer_step_post_hook(lambda *_: calls.append(1))]
    training.train(model, optimizer)
    for handle in handles:
        handle.remove()
    return {"moved": distance(model, start), "calls": len(calls)}


@scenario("distance, norms", library=True)
def clipping_by_norm_and_by_value() -> Numbers:
    """`clip_grad_norm_`, with the norm it returns, and `clip_grad_value_`."""
    model = made()
    start, optimizer, norms = weights(model), torch.optim.SGD(model.parameters(), lr=0.01), []
    by_norm = optimizer.register_step_pre_hook(
        lambda *_: norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01).item())
    )
    training.train(model, optimizer, 10)
    by_norm.remove()
    middle = weights(model)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(model.parameters(), 1e-3))
    training.train(model, optimizer, 10)
    return {"by norm": distance(middle, start), "by value": distance(model, middle), "norm": norms[-1]}


@scenario("distance; calls of the hook", library=True)
def gradient_hooks_set_before_training() -> Numbers:
    """`register_hook` on weights before the first step: gradients halved, rows masked."""
    model, calls = made(), []
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    mask = torch.zeros(32, 1)
    mask[::2] = 1.0
    model[0].weight.register_hook(lambda g: g * mask)
    model[2].weight.register_hook(lambda g: calls.append(1) or g * 0.5)
    training.train(model, optimizer)
    now = weights(model)
    still = float((now[0][1::2] - start[0][1::2]).abs().max())
    return {
        "moved": distance(now, start),
        "halved": distance(now[2:3], start[2:3]),
        "still": still,
        "calls": len(calls),
    }


@scenario("distance; calls of the hook", library=True)
def gradient_hooks_on_a_model_that_is_moved() -> Numbers:
    """Hooks on weights of a model that then passes through `.float()`, `.to("cpu")` and `.double().float()`."""
    model, calls = made(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 3)
    start = weights(model)
    model[0].weight.register_hook(lambda g: g * 0.1)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    for change in (lambda: model.float(), lambda: model.to("cpu"), lambda: model.double().float()):
        change()
        training.train(model, optimizer, 4, 3)
    now = weights(model)
    return {"scaled": distance(now[:1], start[:1]), "moved": distance(now, start), "calls": len(calls)}


@scenario(
    "distance; calls of the hook",
    differs={
        "lib fp16-master:emulate": "gradients are those of the scaled loss until `step`, so hooks see them scaled"
    },
    library=True,
)
def gradient_hooks_set_during_training() -> Numbers:
    """Hooks set on weights, and on accumulated gradients, after some steps."""
    model, calls = made(), []
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)
    handle = model[0].weight.register_hook(lambda g: g * 0.1)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.norm().item()))
    training.train(model, optimizer, 10, 5)
    handle.remove()
    training.train(model, optimizer, 5, 15)
    return {"moved": distance(model, start), "calls": len(calls), "norm": calls[-1]}


@scenario("what the hooks saw", library=True)
def module_hooks() -> Numbers:
    """Forward, pre-forward and full backward hooks on layers."""
    model, seen = made(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    model[0].register_forward_pre_hook(lambda m, args: seen.update(inputs=args[0].float().norm().item()))
    model[0].register_forward_hook(lambda m, args, out: seen.update(outputs=out.detach().float().norm().item()))
    model[2].register_full_backward_hook(lambda m, gi, go: seen.update(rows=len(go[0])))
    model.register_forward_hook(lambda m, args, out: seen.update(size=out.element_size(), width=out.shape[1]))
    training.train(model, optimizer, 5)
    return {name: float(value) for name, value in seen.items() if name != "size"}


@scenario("the sum is 128; norm and distance")
def accumulating_1024_gradients() -> Numbers:
    """Gradients of 1/8 accumulated over 1,024 backward passes; a step from 64 micro-batches."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    optimizer.step()
    for _ in range(1024):
        (layer(torch.ones(1, 4)).sum() / 8).backward()
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    optimizer.step()
    for i in range(64):
        (loss_of(model, i) / 64).backward()
    accumulated = norm(p.grad for p in model.parameters())
    optimizer.step()
    off = float((layer.weight.grad - 128).abs().max() + (layer.bias.grad - 128).abs().max())
    return {"off": off, "norm": accumulated, "moved": distance(model, start)}


@scenario("distance")
def accumulating_with_a_script_of_its_own() -> Numbers:
    """Gradients moved to a list after each micro-batch, averaged, and put back."""
    model = made()
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    for turn in range(5):
        kept = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(4):
            loss_of(model, 4 * turn + i).backward()
            for k, p in zip(kept, model.parameters(), strict=True):
                k += p.grad / 4
                p.grad = None
        for k, p in zip(kept, model.parameters(), strict=True):
            p.grad = k
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {"moved": distance(model, start)}


@scenario("norm of the gradients, distance", library=True)
def reading_gradients() -> Numbers:
    """Norms of gradients by layer, logged before each step."""
    model, seen = made(), {}
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.norm().item() for name, p in model.named_parameters()})
    )
    training.train(model, optimizer, 5)
    return {**seen, "moved": distance(model, start)}


@scenario("distance", library=True)
def gradient_noise_and_centralization() -> Numbers:
    """Gradients centred and disturbed with seeded noise before the step."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    noise = torch.Generator().manual_seed(0)

    def change(*_):
        for p in model.parameters():
            if p.dim() > 1:
                p.grad.sub_(p.grad.mean(1, keepdim=True))
            p.grad.add_(torch.randn(p.shape, generator=noise), alpha=1e-3)

    optimizer.register_step_pre_hook(change)
    training.train(model, optimizer)
    return {"moved": distance(model, start)}


@scenario("distance of each half")
def parameters_without_gradients_some_of_the_time() -> Numbers:
    """A branch that takes part in every other step only."""
    model = nn.ModuleDict({"a": made(), "b": made(1)})
    starts = {name: weights(branch) for name, branch in model.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL)
    for i in range(20):
        optimizer.zero_grad()
        loss = loss_of(model["a"], i)
        if i % 2:
            loss = loss + loss_of(model["b"], i)
        loss.backward()
        optimizer.step()
    return {name: distance(branch, starts[name]) for name, branch in model.items()}


@scenario("distance; the loss of the step")
def a_bad_batch_is_passed_over() -> Numbers:
    """A step is left out by the script where its loss is not finite."""
    model, left_out = made(), 0
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    for i in range(10):
        optimizer.zero_grad()
        x, y = batch(i)
        if i == 4:
            x = x * float("inf")
        loss = nn.functional.cross_entropy(model(x), y)
        if not loss.isfinite():
            left_out += 1
            continue
        loss.backward()
        optimizer.step()
    return {"moved": distance(model, start), "left out": left_out, "loss": held_out(model)}


@scenario("distance", 0.03)
def gradients_of_two_losses_projected() -> Numbers:
    """Two backward passes, their gradients compared and projected (PCGrad)."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(10):
        both = []
        for loss in (loss_of(model, i), loss_of(model, 100 + i)):
            optimizer.zero_grad()
            loss.backward()
            both.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        dot = both[0] @ both[1]
        if dot < 0:
            both[0] -= dot / both[1].square().sum() * both[1]
        nn.utils.vector_to_parameters(both[0] + both[1], [p.grad for p in model.parameters()])
        optimizer.step()
    return {"moved": distance(model, start)}

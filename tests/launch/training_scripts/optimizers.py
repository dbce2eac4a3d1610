"""Optimizers of all kinds, wrappers around them, averages of weights, and steps without an optimizer."""

from __future__ import annotations

import copy
import io
import pickle

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, largest_difference, loss_of, made, weights


@scenario("distance and loss", library=True)
def adamw() -> Numbers:
    """AdamW at a small learning rate."""
    model = made()
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    training.train(model, optimizer)
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance", library=True)
def sgd_in_tiny_steps() -> Numbers:
    """SGD whose single updates are far below half a 16-bit spacing."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-5)
    training.train(model, optimizer)
    return {"moved": distance(model, start)}


@scenario("distance of each", 0.06, library=True)
def every_optimizer_of_torch() -> Numbers:
    """A few steps of each optimizer of `torch.optim`."""
    moved = {}
    kinds = ("Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "ASGD", "RMSprop", "Rprop", "Adafactor")
    for kind in kinds:
        model = made()
        start, optimizer = weights(model), getattr(torch.optim, kind)(model.parameters(), lr=SMALL)
        training.train(model, optimizer, 4)
        moved[kind] = distance(model, start)
    return moved


@scenario("distance of each", library=True)
def foreach_fused_and_single_tensor() -> Numbers:
    """AdamW and SGD with momentum, by each of PyTorch's implementations."""
    moved = {}
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        for kind in (torch.optim.AdamW, torch.optim.SGD):
            more = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
            model = made()
            start = weights(model)
            training.train(model, kind(model.parameters(), lr=SMALL, **more, **options), 4)
            moved[f"{kind.__name__} {options}"] = distance(model, start)
    return moved


@scenario("distance of both halves")
def one_optimizer_for_each_half() -> Numbers:
    """Two optimizers, one for each half of the model, both stepped."""
    model = made()
    start = weights(model)
    first = torch.optim.AdamW(model[0].parameters(), lr=SMALL)
    second = torch.optim.SGD(model[2].parameters(), lr=SMALL)
    for i in range(20):
        first.zero_grad()
        second.zero_grad()
        loss_of(model, i).backward()
        first.step()
        second.step()
    now = weights(model)
    return {"first": distance(now[:2], start[:2]), "second": distance(now[2:], start[2:])}


@scenario("distance", library=True)
def a_new_optimizer_each_step() -> Numbers:
    """A new SGD for every step over the same model."""
    model = made()
    start = weights(model)
    for i in range(30):
        training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 1, i)
    return {"moved": distance(model, start)}


@scenario("distance", 0.03, library=True)
def a_new_optimizer_each_round() -> Numbers:
    """A new AdamW for each round of five steps."""
    model = made()
    start = weights(model)
    for i in range(0, 30, 5):
        training.train(model, torch.optim.AdamW(model.parameters(), lr=SMALL), 5, i)
    return {"moved": distance(model, start)}


@scenario("distance and loss", library=True)
def switched_optimizer() -> Numbers:
    """Adam first, SGD to finish."""
    model = made()
    training.train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 10)
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 10, 10)
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance of each group", library=True)
def groups_and_a_later_group() -> Numbers:
    """Groups with their own learning rates, one of them added during the run."""
    model = made()
    start = weights(model)
    optimizer = torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 1e-3}], lr=SMALL)
    training.train(model, optimizer, 10)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-5})
    training.train(model, optimizer, 10, 10)
    return {str(i): distance([p], [s]) for i, (p, s) in enumerate(zip(model.parameters(), start, strict=True))}


@scenario("distance and last learning rate", library=True)
def schedulers() -> Numbers:
    """Warm-up, cosine and OneCycle."""
    numbers = {}
    for name in ("warm-up", "cosine", "cycle"):
        model = made()
        start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
        of = torch.optim.lr_scheduler
        scheduler = {
            "warm-up": lambda o: of.LambdaLR(o, lambda i: min(1.0, i / 5)),
            "cosine": lambda o: of.CosineAnnealingLR(o, 12),
            "cycle": lambda o: of.OneCycleLR(o, 1e-3, total_steps=20),
        }[name](optimizer)
        for i in range(10):
            training.train(model, optimizer, 1, i)
            scheduler.step()
        numbers |= {name: distance(model, start), f"{name} rate": optimizer.param_groups[0]["lr"]}
    return numbers


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, and keeps lists of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], {})

    def step(self, closure=None):
        return self.inner.step(closure)


@scenario("distance and loss", library=True)
def wrapper_with_lists_of_its_own() -> Numbers:
    """An optimizer around another, each with its own parameter lists."""
    model = made()
    start = weights(model)
    training.train(model, Wrapper(torch.optim.AdamW(model.parameters(), lr=SMALL)))
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance and loss", library=True)
def zero_redundancy_in_one_process() -> Numbers:
    """ZeroRedundancyOptimizer in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = made()
        start = weights(model)
        training.train(model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=SMALL))
    finally:
        dist.destroy_process_group()
    return {"moved": distance(model, start), "loss": held_out(model)}


class SignDescent(torch.optim.Optimizer):
    """As in papers' code: through .data."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data.sign(), alpha=-group["lr"])


@scenario("distance", library=True)
def an_optimizer_of_ones_own() -> Numbers:
    """An own optimizer class that writes to `.data`."""
    model = made()
    start = weights(model)
    training.train(model, SignDescent(model.parameters(), 1e-5))
    return {"moved": distance(model, start)}


@scenario("distance of the average", library=True)
def swa() -> Numbers:
    """SWA with its learning rate and batch statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    average, rate = AveragedModel(model), SWALR(optimizer, swa_lr=SMALL)
    for i in range(20):
        training.train(model, optimizer, 1, i)
        average.update_parameters(model)
        rate.step()
    update_bn([batch(i)[0] for i in range(3)], average)
    return {"moved": distance(average.module, start), "loss": held_out(average)}


@scenario("distance of the average, and what it is against float64", library=True)
def ema_by_averaged_model() -> Numbers:
    """An average made after the first step, with a decay of 0.999."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    training.train(model, optimizer, 1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)
    start, exact = weights(model), weights(model)
    for i in range(1, 60):
        training.train(model, optimizer, 1, i)
        average.update_parameters(model)
        exact = [e.lerp(p, 1e-3) for e, p in zip(exact, weights(model), strict=True)]
    far = largest_difference(average.module, exact)
    return {"moved": distance(average.module, start), "far from float64": float(far > 1e-6)}


@scenario("distance of the average", library=True)
def ema_by_deepcopy() -> Numbers:
    """An average by deepcopy and `mul_().add_()` through `.data`."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    training.train(model, optimizer, 1)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    start = weights(average)
    for i in range(1, 40):
        training.train(model, optimizer, 1, i)
        for a, p in zip(average.parameters(), model.parameters(), strict=True):
            a.data.mul_(0.999).add_(p.data, alpha=0.001)
    return {"moved": distance(average, start), "loss": held_out(average)}


@scenario("distance of the average; the weights are back, bit for bit", library=True)
def ema_by_lists_swapped_in_and_out() -> Numbers:
    """A list of averages, swapped in to evaluate and save, and out again."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    shadow = [p.detach().clone() for p in model.parameters()]
    changed = 0.0
    for i in range(20):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            for s, p in zip(shadow, model.parameters(), strict=True):
                s.lerp_(p, 0.01)
            own = [p.clone() for p in model.parameters()]
            for p, s in zip(model.parameters(), shadow, strict=True):
                p.copy_(s)
            torch.save([model.state_dict(), optimizer.state_dict()], io.BytesIO())
            average_loss = held_out(model)
            for p, o in zip(model.parameters(), own, strict=True):
                p.copy_(o)
        changed += largest_difference(model, own)
    moved = distance(model, start)
    return {"moved": moved, "average moved": distance(shadow, start), "loss": average_loss, "changed": changed}


@scenario("distance", library=True)
def lookahead() -> Numbers:
    """Lookahead: slow weights, pulled along every five steps."""
    model = made()
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    slow = [p.detach().clone() for p in model.parameters()]
    for i in range(20):
        training.train(model, optimizer, 1, i)
        if i % 5 == 4:
            for s, p in zip(slow, model.parameters(), strict=True):
                s.add_(p.data - s, alpha=0.5)
                p.data.copy_(s)
    return {"moved": distance(model, start)}


@scenario(
    "loss",
    0.1,
    refuses=dict.fromkeys(("fp16-mixed:emulate", "fp16-master:emulate"), "an overflow inside LBFGS's line search"),
)
def lbfgs() -> Numbers:
    """LBFGS with its closure."""
    model = made()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    return {"loss": loss_of(model, 0).item()}


@scenario("distance and loss")
def a_closure() -> Numbers:
    """SGD that evaluates the loss itself."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    return {"moved": distance(model, start), "loss": losses[-1]}


@scenario("distance", 0.03)
def sharpness_aware() -> Numbers:
    """SAM by hand: up along the gradient, a second gradient there, back, and a step."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(10):
        loss_of(model, i).backward()
        with torch.no_grad():
            length = training.norm(p.grad for p in model.parameters())
            up = [p.grad * (0.05 / length) for p in model.parameters()]
            for p, e in zip(model.parameters(), up, strict=True):
                p.add_(e)
        optimizer.zero_grad()
        loss_of(model, i).backward()
        with torch.no_grad():
            for p, e in zip(model.parameters(), up, strict=True):
                p.sub_(e)
        optimizer.step()
        optimizer.zero_grad()
    return {"moved": distance(model, start)}


@scenario("distance")
def steps_without_an_optimizer() -> Numbers:
    """`w -= lr * w.grad` under `no_grad`."""
    model = made()
    start = weights(model)
    for i in range(20):
        model.zero_grad()
        loss_of(model, i).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= SMALL * p.grad
    return {"moved": distance(model, start)}


@scenario("distance")
def steps_by_hand_after_an_optimizer() -> Numbers:
    """An optimizer first, then steps by hand through `.data`."""
    model = made()
    training.train(model, torch.optim.AdamW(model.parameters(), lr=SMALL), 5)
    start = weights(model)
    for i in range(20):
        model.zero_grad()
        loss_of(model, i).backward()
        for p in model.parameters():
            p.data = p.data - SMALL * p.grad.data
    return {"moved": distance(model, start)}


@scenario("distance")
def steps_from_autograd_grad() -> Numbers:
    """Gradients by `torch.autograd.grad`, given to an optimizer."""
    model = made()
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    for i in range(20):
        gradients = torch.autograd.grad(loss_of(model, i), list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
        optimizer.step()
    return {"moved": distance(model, start)}


@scenario("distance")
def optimizer_in_backward() -> Numbers:
    """One optimizer for each parameter, stepped by a hook as its gradient arrives."""
    model = made()
    start = weights(model)
    optimizers = {p: torch.optim.SGD([p], lr=SMALL) for p in model.parameters()}

    def stepped(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(stepped)
    for i in range(20):
        loss_of(model, i).backward()
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance of the copy and of the original", library=True)
def deepcopied_with_its_optimizer() -> Numbers:
    """Model and optimizer deep-copied during training; both go on."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)
    start = weights(model)
    other, its = copy.deepcopy((model, optimizer))
    training.train(other, its, 15, 5)
    training.train(model, optimizer, 15, 5)
    apart = largest_difference(model, other)
    return {"moved": distance(model, start), "the copy": distance(other, start), "apart": apart}


@scenario("distance of the copy and of the original", library=True)
def deepcopied_before_training() -> Numbers:
    """Model and optimizer deep-copied before the first step; both train."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    start = weights(model)
    other, its = copy.deepcopy((model, optimizer))
    training.train(other, its)
    training.train(model, optimizer)
    return {"copy": distance(other, start), "original": distance(model, start)}


@scenario("distance of each copy; they equal the original, bit for bit", library=True)
def pickled_with_its_optimizer() -> Numbers:
    """Model and optimizer through pickle and through `torch.save`, whole."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    pairs = [pickle.loads(pickle.dumps((model, optimizer))), torch.load(file, weights_only=False)]
    start = weights(model)
    training.train(model, optimizer, 10, 5)
    numbers = {"original": distance(model, start)}
    for i, (other, its) in enumerate(pairs):
        training.train(other, its, 10, 5)
        numbers |= {f"copy {i}": distance(other, start), f"apart {i}": largest_difference(model, other)}
    return numbers


@scenario("distance and loss", 0.03, library=True)
def federated_averaging() -> Numbers:
    """Rounds of clients: a copy of the model and a new optimizer each, their state dicts averaged."""
    model = made()
    start = weights(model)
    for turn in range(4):
        states = []
        for client in range(3):
            mine = copy.deepcopy(model)
            training.train(mine, torch.optim.SGD(mine.parameters(), lr=SMALL), 3, 10 * turn + 3 * client)
            states.append(mine.state_dict())
        model.load_state_dict({name: torch.stack([s[name] for s in states]).mean(0) for name in states[0]})
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance", 0.03, library=True)
def reptile() -> Numbers:
    """Reptile: a few inner steps, then the weights are pulled towards where these led."""
    model = made()
    start = weights(model)
    for task in range(5):
        before = copy.deepcopy(model.state_dict())
        training.train(model, torch.optim.SGD(model.parameters(), lr=1e-3), 4, 10 * task)
        after = model.state_dict()
        model.load_state_dict({name: before[name] + 0.1 * (after[name] - before[name]) for name in before})
    return {"moved": distance(model, start)}


@scenario("distance", library=True)
def a_search_over_seeds() -> Numbers:
    """The same training for each of several seeds, one after the other, as in a search."""
    moved = {}
    for seed in range(4):
        model = made(seed)
        start = weights(model)
        training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5)
        moved[str(seed)] = distance(model, start)
    return moved

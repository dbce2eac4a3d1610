"""Losses that weights take part in, and derivatives beyond the first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, loss_of, made, weights


@scenario("distance", library=True)
def l1_and_l2_penalties() -> Numbers:
    """Norms of the weights in the loss."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(20):

        def loss(i=i):
            value = loss_of(model, i)
            return value + 0.01 * sum(p.square().sum() + 0.1 * p.abs().sum() for p in model.parameters())

        training.step(model, optimizer, loss)
    return {"moved": distance(model, start)}


@scenario("distance")
def penalty_alone() -> Numbers:
    """Only the L2 term, no forward pass: w falls by lr * w a step."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 2)
    start = weights(model)
    for _ in range(20):
        optimizer.zero_grad()
        sum(0.5 * p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    return {"moved": distance(model, start)}


@scenario("distance", 0.03)
def anchored_to_an_earlier_task() -> Numbers:
    """EWC: squared gradients and anchor of one task, a penalty in the next."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)
    anchor, importance = [p.detach().clone() for p in model.parameters()], []
    model.zero_grad()
    loss_of(model, 0).backward()
    importance = [p.grad.detach().square() for p in model.parameters()]
    start = weights(model)
    for i in range(10):
        optimizer.zero_grad()
        pairs = zip(importance, model.parameters(), anchor, strict=True)
        pull = sum((f * (p - a).square()).sum() for f, p, a in pairs)
        (loss_of(model, 100 + i) + 1e3 * pull).backward()
        optimizer.step()
    return {"moved": distance(model, start)}


@scenario("distance; penalty", 0.03)
def orthogonality_penalty() -> Numbers:
    """(W'W - 1)² of each matrix in the loss."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(10):
        optimizer.zero_grad()
        loss = loss_of(model, i)
        penalty = sum((w.t() @ w - torch.eye(w.shape[1])).square().sum() for w in model.parameters() if w.dim() > 1)
        (loss + 0.1 * penalty).backward()
        optimizer.step()
    return {"moved": distance(model, start), "penalty": penalty.item()}


@scenario("distance; penalty", 0.05)
def gradient_penalty() -> Numbers:
    """WGAN-GP: the gradient for the input in the loss, and a second backward through it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(12):
        if i == 4:  # the loss scale has settled
            start = weights(model)
        optimizer.zero_grad()
        x = batch(i)[0].requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        penalty = (gradient.norm(dim=1) - 1).square().mean()
        (out.mean() + penalty).backward()
        optimizer.step()
    return {"moved": distance(model, start), "penalty": penalty.item()}


@scenario("distance", 0.05)
def penalty_on_the_norm_of_weight_gradients() -> Numbers:
    """The norm of the weights' own gradient in the loss: double backward through weights."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(10):
        if i == 4:  # the loss scale has settled
            start = weights(model)
        optimizer.zero_grad()
        loss = loss_of(model, i)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (0.1 * (loss + sum(g.square().sum() for g in gradients))).backward()
        optimizer.step()
    return {"moved": distance(model, start)}


@scenario("distance", 0.05)
def maml() -> Numbers:
    """An inner step that is differentiated through, by `functional_call`."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    for i in range(6):
        optimizer.zero_grad()
        named = dict(model.named_parameters())
        x, y = batch(i)
        gradients = torch.autograd.grad(
            F.cross_entropy(functional_call(model, named, (x,)), y), list(named.values()), create_graph=True
        )
        inner = {name: p - 0.1 * g for (name, p), g in zip(named.items(), gradients, strict=True)}
        x, y = batch(100 + i)
        F.cross_entropy(functional_call(model, inner, (x,)), y).backward()
        optimizer.step()
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("the product's norm", 0.05, library=True)
def hessian_vector_product() -> Numbers:
    """A Hessian times a vector, for weights."""
    model = made()
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 3)
    gradients = torch.autograd.grad(loss_of(model, 0), list(model.parameters()), create_graph=True)
    vector = [torch.ones_like(p) for p in model.parameters()]
    dot = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True))
    return {"norm": training.norm(torch.autograd.grad(dot, list(model.parameters())))}


@scenario("norms of gradients by sample", 0.03, library=True)
def gradients_of_single_samples() -> Numbers:
    """`vmap(grad(...))` over samples, as for differential privacy."""
    model = made()
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 3)
    named = {name: p.detach() for name, p in model.named_parameters()}

    def loss(named, x, y):
        return F.cross_entropy(functional_call(model, named, (x[None],)), y[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(named, *batch(0, 8))
    return {f"sample {i}": training.norm(g[i] for g in gradients.values()) for i in range(3)}


@scenario("distance and the losses")
def two_losses_of_one_forward_pass() -> Numbers:
    """`retain_graph`: two backward passes through one graph, and two losses by `torch.autograd.backward`."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(10):
        optimizer.zero_grad()
        x, y = batch(i)
        out = model(x)
        one, two = F.cross_entropy(out, y), out.square().mean()
        if i % 2:
            one.backward(retain_graph=True)
            two.backward()
        else:
            torch.autograd.backward([one, two])
        optimizer.step()
    return {"moved": distance(model, start), "one": one.item(), "two": two.item()}


@scenario("distance; loss")
def a_gradient_given_to_backward() -> Numbers:
    """`out.backward(gradient=...)` of an output that is no scalar."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(10):
        optimizer.zero_grad()
        x, y = batch(i)
        out = model(x)
        out.backward(gradient=(out.detach().softmax(1) - F.one_hot(y, 4)) / len(y))
        optimizer.step()
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance; gradient of the input")
def gradients_of_inputs() -> Numbers:
    """FGSM: a step on the input along its gradient, the model trained on what comes out."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(8):
        x, y = batch(i)
        x.requires_grad_()
        F.cross_entropy(model(x), y).backward()
        near = (x + 0.1 * x.grad / x.grad.abs().max()).detach()
        size = x.grad.norm().item()
        optimizer.zero_grad()
        F.cross_entropy(model(near), y).backward()
        optimizer.step()
    return {"moved": distance(model, start), "gradient": size}


@scenario("distance and loss", library=True)
def losses_of_many_kinds() -> Numbers:
    """Losses outside of the model: MSE, KL, BCE with logits, smooth L1, label smoothing, cosine."""
    numbers = {}
    for name, of in (
        ("mse", lambda out, y: F.mse_loss(out, F.one_hot(y, 4).float())),
        ("kl", lambda out, y: F.kl_div(out.log_softmax(1), F.one_hot(y, 4).float(), reduction="batchmean")),
        ("bce", lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 4).float())),
        ("smooth", lambda out, y: F.smooth_l1_loss(out, F.one_hot(y, 4).float())),
        ("smoothing", lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)),
        ("cosine", lambda out, y: 1 - F.cosine_similarity(out, F.one_hot(y, 4).float()).mean()),
    ):
        model = made()
        start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
        for i in range(3):
            x, y = batch(i)
            last = training.step(model, optimizer, lambda x=x, y=y, of=of, m=model: of(m(x), y))
        numbers |= {name: distance(model, start), f"{name} loss": last}
    return numbers

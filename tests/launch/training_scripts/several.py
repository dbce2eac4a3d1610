"""Several models in one script."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, largest_difference, loss_of, made, weights


@scenario("loss of each fold", library=True)
def k_fold() -> Numbers:
    """Cross-validation: the same start, put back by `load_state_dict` for each fold."""
    model = made()
    start, losses = copy.deepcopy(model.state_dict()), {}
    for fold in range(4):
        model.load_state_dict(start)
        before = weights(model)
        training.train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 6, 10 * fold)
        losses |= {f"fold {fold}": held_out(model), f"moved {fold}": distance(model, before)}
    return losses


@scenario("distance of both", 0.03)
def gan() -> Numbers:
    """Generator and discriminator in turn, with an optimizer each."""
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    starts = weights(generator), weights(critic)
    of_generator = torch.optim.SGD(generator.parameters(), lr=1e-3)
    of_critic = torch.optim.SGD(critic.parameters(), lr=1e-3)
    for i in range(10):
        real, z = batch(i)[0], batch(100 + i)[0][:, :4]
        of_critic.zero_grad()
        F.softplus(-critic(real)).mean().backward()
        F.softplus(critic(generator(z).detach())).mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        F.softplus(-critic(generator(z))).mean().backward()
        of_generator.step()
    return {"generator": distance(generator, starts[0]), "critic": distance(critic, starts[1])}


@scenario("distance of the student; the teacher is as it was, bit for bit", 0.03)
def teacher_and_student() -> Numbers:
    """A frozen teacher that was trained before, and a student."""
    teacher, student = made(0), made(1)
    training.train(teacher, torch.optim.AdamW(teacher.parameters(), lr=1e-2), 10)
    teacher.eval().requires_grad_(False)
    before, start = weights(teacher), weights(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for i in range(15):
        x, _ = batch(i)
        with torch.no_grad():
            target = teacher(x).softmax(1)
        optimizer.zero_grad()
        F.kl_div(student(x).log_softmax(1), target, reduction="batchmean").backward()
        optimizer.step()
    return {"student": distance(student, start), "teacher": largest_difference(teacher, before)}


@scenario("distance of both", 0.03)
def online_and_target_network() -> Numbers:
    """BYOL, TD3: a target that follows by small steps, made before training."""
    online, target = made(), made()
    target.requires_grad_(False)
    start, optimizer = weights(online), torch.optim.SGD(online.parameters(), lr=1e-3)
    for i in range(20):
        x, y = batch(i)
        with torch.no_grad():
            goal = target(x)
        optimizer.zero_grad()
        (F.cross_entropy(online(x), y) + 0.1 * (online(x) - goal).square().mean()).backward()
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(target.parameters(), online.parameters(), strict=True):
                t.mul_(0.995).add_(p, alpha=0.005)
    return {"online": distance(online, start), "target": distance(target, start)}


@scenario("distance; the target equals the network at each copy, bit for bit", 0.06)
def target_copied_every_few_steps() -> Numbers:
    """DQN: the target loads the network's state dict every five steps."""
    online = made()
    target = copy.deepcopy(online)
    start, optimizer, apart = weights(online), torch.optim.AdamW(online.parameters(), lr=SMALL), 0.0
    for i in range(20):
        x, _ = batch(i)
        with torch.no_grad():
            goal = target(x).max(1).values
        optimizer.zero_grad()
        F.smooth_l1_loss(online(x)[:, 0], 1 + 0.9 * goal).backward()
        optimizer.step()
        if i % 5 == 4:
            target.load_state_dict(online.state_dict())
            apart += largest_difference(target, online)
    return {"moved": distance(online, start), "apart": apart}


@scenario("distance of each model", 0.03)
def one_optimizer_for_several_models() -> Numbers:
    """An encoder and two heads, called one after the other, in one optimizer."""
    torch.manual_seed(0)
    encoder, heads = nn.Sequential(nn.Linear(8, 32), nn.GELU()), [nn.Linear(32, 4), nn.Linear(32, 2)]
    models = [encoder, *heads]
    starts = [weights(model) for model in models]
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=SMALL)
    for i in range(15):
        x, y = batch(i)
        optimizer.zero_grad()
        features = encoder(x)
        (F.cross_entropy(heads[0](features), y) + F.cross_entropy(heads[1](features), y % 2)).backward()
        optimizer.step()
    return {str(i): distance(model, start) for i, (model, start) in enumerate(zip(models, starts, strict=True))}


@scenario("distance", 0.03)
def siamese_network() -> Numbers:
    """One model called twice before one backward pass."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(15):
        (a, y), (b, z) = batch(i), batch(100 + i)
        optimizer.zero_grad()
        F.cosine_embedding_loss(model(a), model(b), torch.where(y == z, 1.0, -1.0)).backward()
        optimizer.step()
    return {"moved": distance(model, start)}


@scenario("losses, and the mean of what they say", 0.03, library=True)
def an_ensemble_in_a_list() -> Numbers:
    """Models with an optimizer each, trained in turn, averaged when asked."""
    models = [made(seed) for seed in range(3)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for i in range(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            training.train(model, optimizer, 1, i)
    x, y = batch(99, 256)
    with torch.no_grad():
        mean = torch.stack([model(x).softmax(1) for model in models]).mean(0)
    return {"loss": F.nll_loss(mean.log(), y).item(), **{str(i): held_out(m) for i, m in enumerate(models)}}


@scenario("distance; what it computes equals the average of the parts, bit for bit", library=True)
def weights_of_several_runs_averaged() -> Numbers:
    """A soup: the weights of three trained models averaged into a fourth, which is trained on."""
    models = [made() for _ in range(3)]
    for i, model in enumerate(models):
        training.train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 5, 10 * i)
    soup = made(1)
    average = [torch.stack(list(ps)).mean(0).detach() for ps in zip(*(m.parameters() for m in models), strict=True)]
    with torch.no_grad():
        for p, a in zip(soup.parameters(), average, strict=True):
            p.copy_(a)
    off, start = largest_difference(soup, average), weights(soup)
    training.train(soup, torch.optim.SGD(soup.parameters(), lr=SMALL), 10)
    return {"off": off, "moved": distance(soup, start), "loss": held_out(soup)}


@scenario("distance; the loss of each model")
def an_actor_and_a_critic() -> Numbers:
    """Two models, losses through both, gradients of one of them thrown away."""
    actor, critic = made(0), nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 1))
    starts = weights(actor), weights(critic)
    of_actor, of_critic = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (actor, critic))
    for i in range(10):
        x, _ = batch(i)
        critic_loss = (critic(torch.cat([x, actor(x).detach()], 1))[:, 0] - x.mean(1)).square().mean()
        of_critic.zero_grad()
        critic_loss.backward()
        of_critic.step()
        actor_loss = -critic(torch.cat([x, actor(x)], 1)).mean()
        of_actor.zero_grad()
        actor_loss.backward()
        of_actor.step()
    return {"actor": distance(actor, starts[0]), "critic": distance(critic, starts[1])}


@scenario("loss of each size", library=True)
def a_search_that_drops_its_models() -> Numbers:
    """Models of several sizes, made in a function and dropped."""

    def trial(width):
        torch.manual_seed(width)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        training.train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 4)
        return held_out(model)

    return {str(width): trial(width) for width in (4, 8, 16, 32)}


@scenario("values; what is written is read, bit for bit; distance", library=True)
def weights_used_under_inference_mode() -> Numbers:
    """Weights read, reshaped, cast, multiplied and written under `inference_mode`."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    training.train(model, optimizer, 3)
    w = model[0].weight
    exact, x = w.detach().double().clone(), batch(0)[0]
    numbers = {}
    with torch.inference_mode():
        read = {
            "reshape": w.reshape(8, 32).reshape(32, 8), "contiguous": w.t().contiguous().t(),
            "double": w.to(torch.double),
            "float": w.float(), "flatten": w.flatten().view(32, 8), "to": w.to("cpu"), "chunk": torch.cat(w.chunk(4)),
            "type_as": w.type_as(x), "expand": w.expand_as(w), "squeeze": w[None].squeeze(0),
            "matmul": w @ torch.eye(8),
        }  # fmt: skip
        numbers = {name: float((value.double() - exact).abs().max()) for name, value in read.items()}
        far = F.linear(x, w).double() - x.double() @ exact.t()
        numbers["linear is far"] = float(far.abs().max() > 1e-5)
        numbers["16 bits"] = float((w.bfloat16().double() - exact).abs().max() > 2e-3)
        w.mul_(0.5)
        w.data[0] = 0.25
        w.view(-1)[9] += 1e-6
    exact *= 0.5
    exact[0] = 0.25
    exact[1, 1] += 1e-6
    numbers["written"] = float((w.detach().double() - exact).abs().max() > 1e-8)
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5)
    return {**numbers, "moved": distance(model, start)}


@scenario("loss before, between and after", library=True)
def evaluated_in_between() -> Numbers:
    """`eval`, `no_grad` and `inference_mode` between steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.0), nn.Linear(32, 4))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), {}
    for epoch in range(4):
        training.train(model.train(), optimizer, 3, 3 * epoch)
        model.eval()
        with torch.inference_mode():
            losses[str(epoch)] = loss_of(model, 1000, 128).item()
        with torch.no_grad():
            losses[f"{epoch} without gradients"] = loss_of(model, 1000, 128).item()
    return losses


@scenario("distance of the second part", 0.03, library=True)
def pretrained_then_finetuned() -> Numbers:
    """A model trained, its body put under a new head, the body at a lower rate."""
    body = made()
    training.train(body, torch.optim.AdamW(body.parameters(), lr=1e-3), 6)
    torch.manual_seed(2)
    model = nn.Sequential(body[0], body[1], nn.Linear(32, 4))
    start = weights(model)
    groups = [{"params": model[0].parameters(), "lr": 1e-5}, {"params": model[2].parameters()}]
    training.train(model, torch.optim.SGD(groups, lr=1e-3), 10)
    now = weights(model)
    return {"body": distance(now[:2], start[:2]), "head": distance(now[2:], start[2:])}

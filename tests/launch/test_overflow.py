"""FP16 under an unmodified script when gradients overflow: the step is skipped and nothing else moves."""

from __future__ import annotations

import math

import torch

SCRIPT = """
    import sys, torch
    from torch import nn
    torch.manual_seed(0)
    fused = {"fused": True} if "fused" in sys.argv else {}
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    x = torch.randn(16, 4)
    seen = []
    for step in range(6):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        moments = {i: s["exp_avg"].clone() for i, s in optimizer.state_dict()["state"].items()}
        data = x * (1e30 if step == 3 else 1)
        loss = net(data).square().mean() * (float("inf") if step == 3 else 1)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        same = all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        same_moments = all(torch.equal(moments[i], s["exp_avg"])
                           for i, s in optimizer.state_dict()["state"].items() if i in moments)
        seen.append((same, same_moments, scheduler.get_last_lr()[0]))
    torch.save({"seen": seen}, "out.pt")
"""


def check(ran) -> None:
    same, moments, rates = zip(*ran.out["seen"], strict=True)
    assert same == (False, False, False, True, False, False)  # BatchNorm's statistics included
    assert moments[3]
    assert rates == tuple(1e-3 / (1 + step) for step in (1, 2, 3, 3, 4, 5))  # held once
    assert [s.applied for s in ran.record.steps] == [True, True, True, False, True, True]
    assert [s.scale for s in ran.record.steps] == [65536.0] * 4 + [32768.0] * 2
    assert math.isinf(ran.record.steps[3].loss) or math.isnan(ran.record.steps[3].loss)
    assert ran.run.skipped == 1


def test_overflowed_step_leaves_everything_as_it_was(launch):
    check(launch(SCRIPT, "fp16-mixed"))


def test_the_same_with_a_fused_optimizer(launch):
    check(launch(SCRIPT, "fp16-mixed", "fused"))


def test_epoch_scheduler_advances_although_the_last_batch_was_skipped(launch):
    ran = launch(
        """
        import torch
        from torch import nn
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for batch in range(3):
            optimizer.zero_grad()
            (net(torch.ones(1, 2)).sum() * (float("inf") if batch == 2 else 1e-3)).backward()
            optimizer.step()
        scheduler.step()
        torch.save({"lr": scheduler.get_last_lr()}, "out.pt")
        """,
        "fp16-mixed",
    )
    assert ran.out["lr"] == [0.5]


def test_script_sees_unscaled_gradients_everywhere(launch):
    source = """
        import torch
        from torch import nn
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        net.bias.requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        seen = {}
        x = torch.randn(8, 4, requires_grad=True)
        (net(x).mean() / 4).backward()
        seen["weight"], seen["input"] = net.weight.grad.clone(), x.grad.clone()
        net.bias.requires_grad_(True)          # unfrozen after everything was set up
        (net(x).mean() / 4).backward()
        seen["unfrozen"] = net.bias.grad.clone()
        net.zero_grad()
        net(x).backward(torch.full((8, 1), 0.03125))   # a gradient given
        seen["given"] = net.weight.grad.clone()
        net.weight.grad = torch.ones_like(net.weight)   # set by hand
        optimizer.step()
        seen["stepped"] = net.weight.detach().clone()
        torch.save(seen, "out.pt")
    """
    plain, scaled = launch(source, "fp32").out, launch(source, "fp16-mixed").out
    assert scaled["unfrozen"].item() == plain["unfrozen"].item() == 0.25
    assert torch.equal(scaled["stepped"], plain["stepped"])
    for name, value in plain.items():
        assert torch.allclose(scaled[name], value, rtol=0, atol=2e-3 * value.abs().max().item()), name


def test_closure_is_followed(launch):
    source = """
        import torch
        from torch import nn
        torch.manual_seed(0)
        net = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x = torch.randn(8, 4)
        def closure():
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss
        losses = [optimizer.step(closure).item() for _ in range(4)]
        torch.save({"losses": losses}, "out.pt")
    """
    for policy in ("fp16-mixed", "bf16-master", "bf16-mixed"):
        ran = launch(source, policy)
        assert ran.run.exit_code == 0, policy
        losses = ran.out["losses"]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 2
        assert [round(s.loss, 6) for s in ran.record.steps] == [round(x, 6) for x in losses]


def test_a_generators_graph_outlives_the_discriminators_skipped_step(launch):
    """DCGAN: one forward pass of the generator serves both updates, and the discriminator's first ones are skipped."""
    ran = launch(
        """
        import torch
        from torch import nn
        torch.manual_seed(0)
        G = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        D = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        oD, oG = torch.optim.Adam(D.parameters(), lr=1e-3), torch.optim.Adam(G.parameters(), lr=1e-3)
        seen = []
        for i in range(6):
            real, z = torch.randn(32, 4), torch.randn(32, 8)
            states = [[b.clone() for m in (D, G) for b in m.buffers()]]
            oD.zero_grad()
            (D(real) - 1).square().sum().backward()
            fake = G(z)
            D(fake.detach()).square().sum().backward()
            oD.step()
            states.append([b.clone() for m in (D, G) for b in m.buffers()])
            oG.zero_grad()
            (D(fake) - 1).square().sum().backward()
            oG.step()
            states.append([b.clone() for m in (D, G) for b in m.buffers()])
            seen.append([[torch.equal(a, b) for a, b in zip(one, other)] for one, other in zip(states, states[1:])])
        torch.save({"seen": seen}, "out.pt")
        """,
        "fp16-mixed",
    )
    applied = [step.applied for step in ran.record.steps]
    assert not applied[0] and applied[-2:] == [True, True]
    for step, (judged, generated) in enumerate(ran.out["seen"]):
        by_judge, by_generator = applied[2 * step : 2 * step + 2]
        # The generator's forward pass is not the discriminator's step; all of it goes if its own is skipped.
        assert judged == [not by_judge] * 3 + [False] * 3
        if by_generator:
            assert generated == [False] * 3 + [True] * 3
        else:
            assert generated[:3] == [True] * 3 and generated[3:] == [False] * 3

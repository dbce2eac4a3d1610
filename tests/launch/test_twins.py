"""An unmodified FP32 script under a policy equals, bit for bit, the same script with the policy written by hand."""

from __future__ import annotations

import pytest
import torch

from halfstep.optim import backends

#: A script with what real ones have: BatchNorm and LayerNorm, accumulation, clipping, a scheduler, a loss outside.
PLAIN = """
    import torch
    from torch import nn
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 5)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randn(6, 16, 12), torch.randint(5, (6, 16))
    norms, losses = [], []
    for step in range(10):
        for micro in range(2):
            loss = criterion(model(x[(2 * step + micro) % 6]), y[(2 * step + micro) % 6]) / 2
            loss.backward()
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "norms": norms, "losses": losses,
                "lr": scheduler.get_last_lr()}, "out.pt")
"""

AUTOCAST = (
    "loss = criterion(model(x[(2 * step + micro) % 6]), y",
    "with torch.autocast('cpu', torch.{dtype}):\n                o = model(x[(2 * step + micro) % 6])\n"
    "            loss = criterion(o.float(), y",
)


def by_hand(policy: str) -> str:
    """PLAIN with the policy in it, as one would write it with torch.amp; how weights are stored changes no number."""
    if policy == "fp32":
        return PLAIN
    dtype = "bfloat16" if policy.startswith("bf16") else "float16"
    source = PLAIN.replace(AUTOCAST[0], AUTOCAST[1].format(dtype=dtype))
    if policy.startswith("fp16"):
        source = source.replace("norms, losses", "scaler = torch.amp.GradScaler('cpu')\n    norms, losses")
        source = source.replace("loss.backward()", "scaler.scale(loss).backward()")
        source = source.replace("norms.append(", "scaler.unscale_(optimizer)\n        norms.append(")
        source = source.replace("optimizer.step()", "scaler.step(optimizer)\n        scaler.update()")
    if policy == "bf16-master" or "split" in policy:  # parameters in planes are stepped in one pass, as fused ones
        source = source.replace("lr=1e-2)", f"lr=1e-2, fused={not backends.lacking('cpu')})")
    assert source != PLAIN
    return source


@pytest.mark.parametrize("policy", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-master", "fp16-mixed:storage=split"])
def test_script_under_policy_equals_the_policy_by_hand(launch, policy):
    by_policy = launch(PLAIN, policy)
    twin = launch(by_hand(policy), "fp32")
    assert by_policy.run.exit_code == twin.run.exit_code == 0
    assert by_policy.out["norms"] == twin.out["norms"]
    assert by_policy.out["losses"] == twin.out["losses"]
    assert by_policy.out["lr"] == twin.out["lr"]
    for name, value in twin.out["model"].items():
        assert value.dtype is by_policy.out["model"][name].dtype
        assert torch.equal(by_policy.out["model"][name], value), name


def test_policies_really_differ(launch):
    results = {policy: launch(PLAIN, policy).out["losses"] for policy in ("fp32", "bf16-mixed", "fp16-mixed")}
    assert len({tuple(losses) for losses in results.values()}) == 3


def test_two_optimizers_under_fp16_equal_a_gan_written_with_one_scaler_each(launch):
    plain = """
        import torch
        from torch import nn
        torch.manual_seed(3)
        g = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        d = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        og = torch.optim.Adam(g.parameters(), 1e-3)
        od = torch.optim.Adam(d.parameters(), 1e-3)
        bce = nn.BCEWithLogitsLoss()
        real, one, zero = torch.randn(32, 8), torch.ones(32, 1), torch.zeros(32, 1)
        losses = []
        for step in range(8):
            od.zero_grad()
            fake = g(torch.randn(32, 4))
            loss_real = bce(d(real), one)
            loss_real.backward()
            loss_fake = bce(d(fake.detach()), zero)
            loss_fake.backward()
            od.step()
            og.zero_grad()
            loss_g = bce(d(fake), one)
            loss_g.backward()
            og.step()
            losses.append((loss_real.item(), loss_fake.item(), loss_g.item()))
        torch.save({"losses": losses}, "out.pt")
    """
    hand = plain
    for name in ("loss_real", "loss_fake"):
        hand = hand.replace(f"{name}.backward()", f"sd.scale({name}).backward()")
    hand = hand.replace("loss_g.backward()", "sg.scale(loss_g).backward()")
    hand = hand.replace("od.step()", "sd.step(od); sd.update()").replace("og.step()", "sg.step(og); sg.update()")
    hand = hand.replace(
        "losses = []",
        "sd, sg = torch.amp.GradScaler('cpu'), torch.amp.GradScaler('cpu')\n        "
        "losses = []\n        F16 = torch.autocast('cpu', torch.float16)",
    )
    hand = hand.replace(
        "fake = g(torch.randn(32, 4))",
        "z = torch.randn(32, 4)\n            with F16: fake = g(z)\n            fake = fake.float()",
    )
    for argument in ("real", "fake.detach()", "fake"):
        hand = hand.replace(f"bce(d({argument}),", f"bce(run(d, {argument}),")
    hand = hand.replace(
        "real, one",
        "def run(m, x):\n            with torch.autocast('cpu', torch.float16): o = m(x)\n"
        "            return o.float()\n        real, one",
        1,
    )
    ours, twin = launch(plain, "fp16-mixed"), launch(hand, "fp32")
    assert ours.out["losses"] == twin.out["losses"]
    assert [s.optimizer for s in ours.record.steps[:4]] == [0, 1, 0, 1]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["bf16-mixed", "fp16-mixed"])
def test_activation_checkpointing_changes_nothing(launch, policy, reentrant):
    source = """
        import sys, torch
        from torch import nn
        from torch.utils.checkpoint import checkpoint
        torch.manual_seed(0)
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(8, 16)
                self.blocks = nn.ModuleList(
                    nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2))
                self.head = nn.Linear(16, 1)
            def segment(self, x):
                return self.blocks[1](self.blocks[0](x))
            def forward(self, x):
                x = self.first(x)
                x = MODE(self.segment, x)
                return self.head(x)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        x = torch.randn(16, 8)
        for _ in range(3):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save(net.state_dict(), "out.pt")
    """
    plain = launch(source.replace("MODE(self.segment, x)", "self.segment(x)"), policy)
    checkpointed = launch(
        source.replace("MODE(", f"checkpoint(use_reentrant={reentrant}, function=")
        .replace("self.segment, x)", "self.segment, *[x])")
        .replace("function=self.segment, *[x]", "*(self.segment, x)"),
        policy,
    )
    assert checkpointed.run.exit_code == 0
    for name, value in plain.out.items():
        assert torch.equal(checkpointed.out[name], value), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_equals_the_eager_one(launch, backend):
    source = """
        import torch
        from torch import nn
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 1)))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        model = COMPILE
        x = torch.randn(16, 8)
        for _ in range(2):
            y = model(x)
            assert y.dtype is torch.float32
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save(net.state_dict(), "out.pt")
    """
    eager = launch(source.replace("COMPILE", "net"), "bf16-mixed")
    compiled = launch(source.replace("COMPILE", f"torch.compile(net, backend={backend!r})"), "bf16-mixed")
    assert compiled.run.exit_code == 0
    for name, value in eager.out.items():
        assert torch.equal(compiled.out[name], value), name

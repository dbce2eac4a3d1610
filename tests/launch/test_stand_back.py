"""A script that brings its own mixed precision keeps it: detected, named with its line, not doubled."""

from __future__ import annotations

import torch

OWN_AUTOCAST = """
    import torch
    from torch import nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(4, 8)
    dtypes = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
            dtypes.append(str(y.dtype))
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"net": net.state_dict(), "dtypes": dtypes}, "out.pt")
"""


def test_own_autocast_is_named_and_left_alone(launch):
    plain = launch(OWN_AUTOCAST, "fp32")
    under = launch(OWN_AUTOCAST, "fp16-mixed")
    assert plain.out["dtypes"] == under.out["dtypes"] == ["torch.bfloat16"] * 2
    for name, value in plain.out["net"].items():
        assert torch.allclose(under.out["net"][name], value, atol=1e-6), name
    for ran in (plain, under):
        (notice,) = ran.record.notices
        assert notice.code == "own-autocast"
        assert "bfloat16" in notice.message
        assert notice.where is not None and notice.where.endswith(".py:10")


def test_own_scaler_is_named_and_not_doubled_and_its_skips_are_recorded(launch):
    source = """
        import sys, torch
        from torch import nn
        torch.manual_seed(0)
        net = nn.Linear(8, 1)
        optimizer = torch.optim.AdamW(net.parameters(), 0.1, fused="fused" in sys.argv)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x = torch.randn(4, 8)
        for step in range(4):
            optimizer.zero_grad()
            loss = net(x).square().mean() * (float("inf") if step == 1 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        torch.save({"net": net.state_dict(), "scale": scaler.get_scale()}, "out.pt")
    """
    for arguments in ((), ("fused",)):
        plain = launch(source, "fp32", *arguments)
        under = launch(source, "fp16-mixed", *arguments)
        assert plain.out["scale"] == under.out["scale"] == 512.0
        for ran in (plain, under):
            assert "own-scaler" in ran.codes
            assert [s.applied for s in ran.record.steps] == [True, False, True, True]
            assert [s.scale for s in ran.record.steps] == [1024.0, 1024.0, 512.0, 512.0]


def test_own_16_bit_parameters_are_named(launch):
    ran = launch(
        """
        import torch
        from torch import nn
        net = nn.Linear(8, 1).bfloat16()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        y = net(torch.ones(2, 8, dtype=torch.bfloat16))
        torch.save({"dtype": str(y.dtype)}, "out.pt")
        y.float().mean().backward()
        optimizer.step()
        """,
        "bf16-mixed",
    )
    assert ran.out["dtype"] == "torch.bfloat16"
    (notice,) = ran.record.notices
    assert notice.code == "own-16-bit-parameters"
    assert notice.where == "weight" and "2 of 2 parameters of Linear are bfloat16" in notice.message


def test_master_policy_gives_own_bf16_parameters_their_masters(launch):
    source = """
        import torch
        from torch import nn
        net = nn.Linear(8, 1, bias=False).bfloat16()
        nn.init.ones_(net.weight)
        optimizer = torch.optim.SGD(net.parameters(), 1e-4)
        for _ in range(50):
            net(torch.ones(2, 8, dtype=torch.bfloat16)).float().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.save({"weight": net.weight.detach().float()}, "out.pt")
    """
    alone, with_masters = launch(source, "bf16-mixed"), launch(source, "bf16-master")
    assert torch.equal(alone.out["weight"], torch.ones(1, 8))  # 1 - 1e-4 rounds to 1 in bf16, every time
    assert torch.equal(with_masters.out["weight"], torch.full((1, 8), 0.995).bfloat16().float())


def test_frozen_and_averaged_copies_stay_as_they_are_under_a_master_policy(launch):
    ran = launch(
        """
        import copy, torch
        from torch import nn
        net = nn.Linear(8, 4)
        average, teacher = copy.deepcopy(net).requires_grad_(False), nn.Linear(8, 4).requires_grad_(False)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            x = torch.randn(2, 8)
            (net(x) - teacher(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for a, p in zip(average.parameters(), net.parameters()):
                a.mul_(0.9).add_(p, alpha=0.1)
            average(x)
        torch.save({n: type(m.weight).__name__ for n, m in
                    (("net", net), ("average", average), ("teacher", teacher))}, "out.pt")
        """,
        "bf16-master",
    )
    assert ran.out == {"net": "SplitTensor", "average": "Parameter", "teacher": "Parameter"}


def test_losses_and_containers_reach_the_script_in_fp32(launch):
    ran = launch(
        """
        import dataclasses, torch
        from torch import nn
        @dataclasses.dataclass
        class Output:
            logits: torch.Tensor
            hidden: tuple
            name: str = "x"
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(8, 4)
            def forward(self, x, y=None):
                out = self.layer(x)
                self.inside = str(out.dtype)
                return Output(out, (out, {"again": out, "index": torch.arange(3)}))
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        o = net(torch.randn(2, 8))
        probabilities = o.logits.sigmoid()
        loss = nn.BCELoss()(probabilities, torch.rand(2, 4))     # banned inside CUDA's autocast
        loss.backward()
        optimizer.step()
        torch.save({"inside": net.inside, "logits": str(o.logits.dtype), "deep": str(o.hidden[1]["again"].dtype),
                    "index": str(o.hidden[1]["index"].dtype)}, "out.pt")
        """,
        "bf16-mixed",
    )
    assert ran.out == {
        "inside": "torch.bfloat16",
        "logits": "torch.float32",
        "deep": "torch.float32",
        "index": "torch.int64",
    }
    assert not ran.record.notices


def test_scripts_without_training_or_without_a_module_are_told_so(launch):
    assert launch("print('hello')", "bf16-mixed").codes == {"no-training"}
    functional = """
        import torch
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([w], 0.1)
        w.square().sum().backward()
        optimizer.step()
    """
    assert launch(functional, "bf16-mixed").codes == {"no-module-call"}
    assert launch(functional, "fp32").codes == set()


def test_checkpoint_of_a_master_run_resumes_bit_for_bit(launch):
    source = """
        import sys, torch
        from torch import nn
        torch.manual_seed(0)
        net = nn.Linear(8, 4)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        batches = torch.randn(6, 16, 8)
        start = 0
        if "resume" in sys.argv:
            saved = torch.load("middle.pt", weights_only=True)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            start = 3
        for step in range(start, 6):
            net(batches[step]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 2:
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, "middle.pt")
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, "out.pt")
    """
    whole, resumed = launch(source, "bf16-master"), launch(source, "bf16-master", "resume")
    for index, state in whole.out["optimizer"]["state"].items():
        for name, value in state.items():
            assert value.dtype is torch.float32
            assert torch.equal(resumed.out["optimizer"]["state"][index][name], value), (index, name)


def test_model_on_the_meta_device_is_let_through(launch):
    ran = launch(
        """
        import torch
        from torch import nn
        with torch.device("meta"):
            shape = nn.Linear(8, 4)(torch.empty(2, 8)).shape
        torch.save({"shape": list(shape)}, "out.pt")
        """,
        "bf16-mixed",
    )
    assert ran.run.exit_code == 0 and ran.out["shape"] == [2, 4]

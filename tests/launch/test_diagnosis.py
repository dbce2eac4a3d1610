"""FP16 under an unmodified script whose every step overflows: the run ends, and says whose fault it was."""

from __future__ import annotations

import pytest

SCRIPT = """
    import torch
    from torch import nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(60):
        x = torch.randn(16, 4)
        {data}
        loss = net(x).square().mean() {loss}
        optimizer.zero_grad()
        loss.backward()
        {gradients}
        optimizer.step()
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({"data": "x[0, 0] = float('nan')"}, "The data hold inf or NaN: inputs of the model are not finite"),
        (
            {"loss": "* float('inf')"},
            "The loss itself is not finite, so no loss scale can help: the forward pass overf",
        ),
        ({"gradients": "net[0].weight.grad[0] = float('inf')"}, "The loss is finite, its gradients are not"),
    ],
    ids=["data", "forward", "gradients"],
)
def test_the_cause_is_named(launch, capfd, case: dict[str, str], said: str) -> None:
    ran = launch(SCRIPT.format(**{"data": "", "loss": "", "gradients": "", **case}), "fp16-mixed")
    assert ran.run.exit_code != 0
    assert "50 steps in a row were skipped" in (message := capfd.readouterr().err) and said in message

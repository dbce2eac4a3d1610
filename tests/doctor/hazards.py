"""Twenty failures that people met, as small programs: each with the findings that have to name it.

They are examples of mechanisms. Nothing in the doctor knows them: what is asserted is that its general detectors name
the right op of each. Where they were met is said in the pages of the codes (``halfstep explain``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32  # a test sets them all to FP32


@dataclass(frozen=True)
class Hazard:
    """A program, and (code, op) of the findings that it must have."""

    program: Callable[[], object]
    named: tuple[tuple[str, str], ...]


def low(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not FP32)


class GatedFeedForward(nn.Module):
    """One output channel of `wo` is far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.gate, self.up, self.wo = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64, bias=False)
        with torch.no_grad():
            for layer in (self.gate, self.up, self.wo):
                layer.weight.normal_(0, 0.6, generator=generator)
            self.wo.weight[7] = 30.0

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.gate(x)) * self.up(x))


def outlier_channel() -> object:
    x = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(2)) * 6
    with low(FP16):
        y = GatedFeedForward()(x)
    return F.rms_norm(y.float(), (64,))


def attention_masks() -> object:
    scores = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 40
    kept = torch.ones(4, 4, dtype=torch.bool).tril(-1)[None]
    try:
        scores.to(FP16).masked_fill(~kept, -1e9)
    except RuntimeError as error:
        assert "without overflow" in str(error)
    added = torch.zeros(1, 4, 4, dtype=FP16).masked_fill(~kept, torch.finfo(FP16).min)
    return (scores.to(FP16) + added).softmax(-1), scores.to(FP16).masked_fill(~kept, -math.inf).softmax(-1)


def rotary_positions() -> object:
    inverse = 1 / 10000 ** (torch.arange(0, 64, 2).float() / 64)
    positions = torch.arange(4096).float()
    return torch.outer(positions.to(BF16), inverse.to(BF16)).float().cos()


def timesteps() -> object:
    steps = torch.tensor([999.3986, 988.4937, 987.1741, 937.0, 833.0, 750.0])
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    return (steps.to(BF16).float()[:, None] * frequencies).cos()


def squares() -> object:
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 300.0
    x = x.to(FP16)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def adam_eps(foreach: bool = False) -> object:
    parameter = nn.Parameter(torch.ones(4, dtype=FP16))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, foreach=foreach)
    parameter.grad = torch.tensor([0.0, 1e-4, 1e-2, 1.0], dtype=FP16)
    optimizer.step()
    return parameter


def adam_eps_foreach() -> object:
    return adam_eps(foreach=True)


def small_updates() -> object:
    weight = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(BF16))
    optimizer = torch.optim.AdamW([weight], lr=3e-5, weight_decay=0.0)
    for _ in range(5):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight


def moving_average() -> object:
    target, by_lerp = torch.tensor([2.0], dtype=BF16), torch.ones(1, dtype=BF16)
    average = torch.ones(1, dtype=BF16)
    for _ in range(300):
        average.mul_(0.9995).add_(target, alpha=1 - 0.9995)
        by_lerp.lerp_(target, 1 - 0.9995)
    return average, by_lerp


def norm_of_gradients() -> object:
    gradient = torch.full((1,), 300.0, dtype=FP16)
    clipped = gradient * (1 / (gradient.pow(2).sum().sqrt() + 1e-6))
    parameter = nn.Parameter(torch.zeros(1000, dtype=FP16))
    parameter.grad = torch.full((1000,), 3000.0, dtype=FP16)
    nn.utils.clip_grad_norm_([parameter], 1.0)
    return clipped, parameter.grad


def accumulated_gradients() -> object:
    layer, x = nn.Linear(32, 1).to(BF16), torch.ones(1, 32, dtype=BF16)
    for _ in range(300):
        layer(x).sum().backward()
    return layer.weight.grad


def sum_over_ranks() -> object:
    large, small = torch.full((4,), 1500.0, dtype=FP16), torch.full((4,), 2e-7, dtype=FP16)
    total = large.clone()
    for _ in range(63):
        total += large
    return total / 64, sum((small / 64 for _ in range(63)), small / 64)


def probabilities() -> object:
    return -(1 - torch.sigmoid(torch.tensor([12.0], dtype=FP16))).log()


def clamp_bound() -> object:
    p = torch.tensor([0.99999]).to(FP16).requires_grad_()
    loss = -(1 - p.clamp(1e-4, 1 - 1e-4)).log()
    loss.sum().backward()
    return p.grad, (torch.zeros(1, dtype=FP16) + 1e-8).log()


def zero_vector() -> object:
    z = torch.zeros(2, 4, dtype=FP16, requires_grad=True)
    return torch.autograd.grad(F.normalize(z, dim=-1).sum(), z)


def residual_growth() -> object:
    generator = torch.Generator().manual_seed(0)
    stream = (torch.randn(1, 8, 64, generator=generator) * 8).to(FP16)
    for depth in range(24):
        weight = (torch.randn(64, 64, generator=generator) / 8).to(FP16)
        gain = torch.ones(64)
        gain[5] = 900.0 * (depth + 1)
        update = F.rms_norm(stream.float(), (64,)).to(FP16) @ weight
        stream = stream + (F.rms_norm(update.float(), (64,)) * gain).to(FP16)
    return stream


def router() -> object:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8192, 256, generator=generator), torch.randn(64, 256, generator=generator) * 0.02
    scores = (x.to(BF16) @ weight.to(BF16).T).softmax(-1)
    values, chosen = scores.topk(2)
    return values, F.one_hot(chosen, 64).float().mean((0, 1))


def counters() -> object:
    total, count = torch.zeros((), dtype=BF16), torch.zeros((), dtype=BF16)
    for _ in range(600):
        total += torch.tensor(2.5, dtype=BF16)
        count += 1
    return (total / count).item()


def distances() -> object:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 4096, generator=generator)
    b = a + torch.randn(32, 4096, generator=generator) * 1e-3
    return torch.cdist(a.to(FP16), b.to(FP16), compute_mode="use_mm_for_euclid_dist")


def small_gradients() -> object:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    x, y = torch.randn(64, 256), torch.randn(64, 1)
    with low(FP16):
        loss = ((model(x).float() - y) ** 2).mean() * 1e-5
    loss.backward()
    return model[0].weight.grad


def scaler_collapse() -> object:
    weight = nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=1e-9), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(40):
        optimizer.zero_grad()
        hidden = (weight * 300).to(FP16)
        scaler.scale((hidden * hidden).float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


HAZARDS: dict[str, Hazard] = {
    hazard.program.__name__: hazard
    for hazard in (
        Hazard(outlier_channel, (("HS101", "mm"),)),
        Hazard(attention_masks, (("HS403", "masked_fill"), ("HS101", "add"), ("HS104", "_softmax"))),
        Hazard(rotary_positions, (("HS404", "_to_copy"),)),
        Hazard(timesteps, (("HS405", "_to_copy"),)),
        Hazard(squares, (("HS101", "pow"), ("HS103", "rsqrt"))),
        Hazard(adam_eps, (("HS401", "add_"), ("HS105", "addcdiv_"))),
        Hazard(adam_eps_foreach, (("HS401", "_foreach_add_"), ("HS105", "_foreach_addcdiv_"))),
        Hazard(small_updates, (("HS301", "addcdiv_"),)),
        Hazard(moving_average, (("HS402", "mul_"), ("HS303", "add_"), ("HS303", "lerp_"))),
        Hazard(norm_of_gradients, (("HS101", "pow"), ("HS101", "_foreach_norm"), ("HS103", "reciprocal"))),
        Hazard(accumulated_gradients, (("HS302", "add_"),)),
        Hazard(sum_over_ranks, (("HS101", "add_"), ("HS106", "div"))),
        Hazard(probabilities, (("HS406", "rsub"), ("HS105", "log"))),
        Hazard(clamp_bound, (("HS402", "clamp"), ("HS401", "add"), ("HS105", "log"))),
        Hazard(zero_vector, (("HS401", "clamp_min"), ("HS105", "div"))),
        Hazard(residual_growth, (("HS101", "add"),)),
        Hazard(router, (("HS408", "topk"),)),
        Hazard(counters, (("HS303", "add_"),)),
        Hazard(distances, (("HS407", "_euclidean_dist"),)),
        Hazard(small_gradients, (("HS201", "mm"),)),
        Hazard(scaler_collapse, (("HS101", "mul"), ("HS203", "mul"))),
    )
}

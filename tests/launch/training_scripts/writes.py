"""What scripts write into weights themselves, in all the ways there are, and what they read."""

from __future__ import annotations

import copy

import numpy
import torch
from torch import nn

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, distance, held_out, largest_difference, loss_of, made, weights


def trained(steps: int = 5, lr: float = SMALL):
    """A model that has been through a policy's hands."""
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    training.train(model, optimizer, steps)
    return model, optimizer


@scenario("norm of the weights", 1e-3, library=True)
def many_small_factors() -> Numbers:
    """200 times `w.mul_(1 - 1e-4)` between steps."""
    model, optimizer = trained(lr=1e-6)
    before = model[0].weight.detach().double().norm()
    for i in range(20):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            for p in model.parameters():
                for _ in range(10):
                    p.mul_(1 - 1e-4)
    return {"ratio": (model[0].weight.detach().double().norm() / before).item()}


@scenario("distance", library=True)
def weight_decay_by_hand() -> Numbers:
    """Decoupled decay towards an anchor, between steps, through `.data`."""
    model, optimizer = trained()
    anchor, start = [p.data.clone() + 0.1 for p in model.parameters()], weights(model)
    for i in range(20):
        training.train(model, optimizer, 1, i)
        for p, a in zip(model.parameters(), anchor, strict=True):
            p.data.add_(a - p.data, alpha=1e-3)
    return {"moved": distance(model, start)}


@scenario("distance", library=True)
def noise_on_weights() -> Numbers:
    """Seeded noise of 1e-4 added after each step (Langevin)."""
    model, optimizer = trained(lr=1e-6)
    start, generator = weights(model), torch.Generator().manual_seed(0)
    for i in range(10):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            for p in model.parameters():
                p += 1e-4 * torch.randn(p.shape, generator=generator)
    return {"moved": distance(model, start)}


@scenario("what was written is read, bit for bit", 0.0, library=True)
def assigning_in_every_way() -> Numbers:
    """`copy_`, `fill_`, `w[...] =`, masks, `.data =`, `where`, `scatter_`, `set` by index."""
    model, _ = trained()
    w, new = model[0].weight, torch.randn(32, 8, generator=torch.Generator().manual_seed(7))
    numbers = {}

    def compare(name, expected):
        numbers[name] = float((w.detach() - expected).abs().max())
        numbers[f"{name} sum"] = w.detach().double().sum().item()

    with torch.no_grad():
        w.copy_(new)
        compare("copy_", new)
        w[3] = 0.1234567
        w[:, 2] += 1e-5
        expected = new.clone()
        expected[3] = 0.1234567
        expected[:, 2] += 1e-5
        compare("index", expected)
        w[w > 0.5] = 1 / 3
        expected[expected > 0.5] = 1 / 3
        compare("mask", expected)
        w.view(-1)[5:9] = new.view(-1)[:4] * 1.001
        expected.view(-1)[5:9] = new.view(-1)[:4] * 1.001
        compare("view", expected)
        w.t().mul_(1.0001)
        expected.t().mul_(1.0001)
        compare("transposed", expected)
        w.index_fill_(0, torch.tensor([1, 4]), 0.7)
        expected.index_fill_(0, torch.tensor([1, 4]), 0.7)
        compare("index_fill_", expected)
        for row, value in zip(w, new, strict=True):
            row.lerp_(value, 1e-3)
        expected = torch.stack([row.lerp(value, 1e-3) for row, value in zip(expected, new, strict=True)])
        compare("rows", expected)
    w.data = new * 1.0001
    compare("data", new * 1.0001)
    w.data[2] -= 1e-6
    expected = new * 1.0001
    expected[2] -= 1e-6
    compare("data by row", expected)
    torch.where(new > 0, new, -0.5 * new, out=w.data)
    compare("out", torch.where(new > 0, new, -0.5 * new))
    return numbers


@scenario(
    "what was written is read, bit for bit",
    differs=dict.fromkeys(
        ("fp16-master:emulate", "lib fp16-master:emulate"),
        "each within 2⁻⁴⁰: so small a number is not exact in two 16-bit ones",
    ),
    library=True,
)
def tiny_values() -> Numbers:
    """Weights below 2⁻¹⁶, denormal numbers among them."""
    model, _ = trained()
    w, numbers = model[0].weight, {}
    for exponent in (-18, -24, -60, -140):
        new = torch.randn(32, 8, generator=torch.Generator().manual_seed(7)) * 2.0**exponent
        with torch.no_grad():
            w.copy_(new)
        numbers[f"off at 2^{exponent}"] = float((w.detach() - new).abs().max())
        numbers[f"far at 2^{exponent}"] = float((w.detach() - new).abs().max() > 2.0**-40)
    return numbers


@scenario("what was written is read, bit for bit; distance after it", library=True)
def vector_to_parameters_and_back() -> Numbers:
    """All weights to one vector, changed a little, and back; then training goes on."""
    model, optimizer = trained()
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(model.parameters()) + 1e-5
        nn.utils.vector_to_parameters(vector, model.parameters())
        off = (nn.utils.parameters_to_vector(model.parameters()) - vector).abs().max().item()
    start = weights(model)
    training.train(model, optimizer, 10)
    return {"off": off, "moved": distance(model, start)}


@scenario("largest weight; distance", library=True)
def clamping_after_each_step() -> Numbers:
    """Weights clamped after each step (WGAN, non-negative layers)."""
    model, optimizer = trained(lr=1e-2)
    start = weights(model)
    for i in range(10):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.05, 0.05)
    return {"largest": max(p.abs().max().item() for p in model.parameters()), "moved": distance(model, start)}


@scenario("norms of rows; loss", library=True)
def max_norm_constraint() -> Numbers:
    """Rows renormalized after each step, `torch.renorm`."""
    model, optimizer = trained(lr=1e-2)
    for i in range(10):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            model[0].weight.copy_(torch.renorm(model[0].weight, 2, 0, 0.3))
    return {"norm": model[0].weight.detach().norm(dim=1).max().item(), "loss": held_out(model)}


@scenario("sums after it; distance", library=True)
def initializing_again() -> Numbers:
    """`nn.init` functions and `reset_parameters` during training."""
    model, optimizer = trained()
    numbers = {}
    for name in ("xavier_uniform_", "kaiming_normal_", "orthogonal_", "trunc_normal_", "eye_", "zeros_", "sparse_"):
        torch.manual_seed(1)
        getattr(nn.init, name)(model[0].weight, *([0.5] if name == "sparse_" else []))
        numbers[name] = model[0].weight.detach().double().norm().item()
    torch.manual_seed(2)
    model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
    start = weights(model)
    training.train(model, optimizer, 10)
    return {**numbers, "moved": distance(model, start)}


@scenario("the constants hold; distance", library=True)
def dead_units_are_revived() -> Numbers:
    """Single rows set to new values, their optimizer state cleared, training goes on."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)
    with torch.no_grad():
        model[0].weight[4:8] = torch.randn(4, 8, generator=torch.Generator().manual_seed(3)) * 0.3
        for state in optimizer.state[model[0].weight].values():
            if state.dim():
                state[4:8] = 0.0
    start = weights(model)
    training.train(model, optimizer, 10, 5)
    return {"moved": distance(model, start)}


@scenario("zeros stay zeros; distance", library=True)
def masked_after_each_step() -> Numbers:
    """A sparsity mask multiplied in after each step."""
    model, optimizer = trained()
    mask, start = (torch.rand(32, 8, generator=torch.Generator().manual_seed(5)) > 0.5).float(), weights(model)
    for i in range(10):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            model[0].weight *= mask
    return {"zeros": int((model[0].weight == 0).sum()), "moved": distance(model, start)}


@scenario("values after it; distance", library=True)
def foreach_writes() -> Numbers:
    """MoCo's `torch._foreach_lerp_`, and its kin, on lists of weights."""
    model, optimizer = trained()
    target = copy.deepcopy(model)
    start = weights(target)
    for i in range(10):
        training.train(model, optimizer, 1, i)
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), 0.01)
            torch._foreach_mul_(list(model.parameters()), 1 - 1e-5)
    apart = weights(target)
    with torch.no_grad():
        torch._foreach_copy_(list(target.parameters()), list(model.parameters()))
    return {"moved": distance(apart, start), "apart": largest_difference(target, model)}


@scenario("distance; the copy is what was copied, bit for bit", library=True)
def swapping_weights_between_models() -> Numbers:
    """Weights of two models exchanged through `.data` and `copy_`, both train on."""
    (a, of_a), b = trained(), made(1)
    of_b = torch.optim.SGD(b.parameters(), lr=SMALL)
    training.train(b, of_b, 5)
    before = weights(a), weights(b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        p.data, q.data = q.data.clone(), p.data.clone()
    off = largest_difference(a, before[1]) + largest_difference(b, before[0])
    training.train(a, of_a, 10)
    training.train(b, of_b, 10)
    return {"off": off, "a": distance(a, before[1]), "b": distance(b, before[0])}


@scenario("values are FP32, and the same in each way of reading", 1e-3, library=True)
def reading_in_every_way() -> Numbers:
    """`numpy`, `tolist`, `item`, iteration, comparison, sums, `float`, `double`, an SVD."""
    model, _ = trained(lr=1e-6)
    w = model[0].weight
    exact = w.detach().double()
    read = {
        "numpy": torch.from_numpy(numpy.array(w.detach().numpy())),
        "tolist": torch.tensor(w.tolist()),
        "items": torch.tensor([[w[i, j].item() for j in range(8)] for i in range(32)]),
        "rows": torch.stack(list(w.detach())),
        "float": w.detach().float(),
        "cpu": w.detach().cpu(),
        "clone": w.clone().detach(),
        "new": torch.empty(32, 8).copy_(w.detach()),
        "stack": torch.stack([w.detach(), w.detach()])[1],
        "flat": nn.utils.parameters_to_vector([w]).detach().view(32, 8),
        "chunks": torch.cat(w.detach().chunk(4)),
    }
    numbers = {name: float((value.double() - exact).abs().max()) for name, value in read.items()}
    sizes = (w.element_size(), w.dtype.itemsize, w.nbytes, w.numel(), len(w), w.stride(0))
    return {
        **numbers,
        **{f"size {i}": size for i, size in enumerate(sizes)},
        "svd": torch.linalg.svdvals(w.detach())[0].item(),
        "mean": w.mean().item(),
        "equal": float(torch.equal(w, w.detach().clone())),
        "close": float(bool((w == w.detach()).all())),
    }


@scenario("products outside of the model's call are FP32's, bit for bit", 1e-3, library=True)
def computing_with_weights_outside_the_model() -> Numbers:
    """`w @ w.T`, norms and `F.linear` with weights, outside of any module call."""
    model, _ = trained(lr=1e-6)
    w, x = model[0].weight, training.batch(0)[0]
    exact = x.double() @ w.detach().double().t()
    with torch.no_grad():
        far = (nn.functional.linear(x, w).double() - exact).abs().max().item()
        gram = (w @ w.t()).double() - w.double() @ w.double().t()
    return {"far": float(far > 1e-5), "gram": float(gram.abs().max() > 1e-5), "norm": w.norm().item()}


@scenario("distance of each; dtype and identity", library=True)
def float_double_and_to() -> Numbers:
    """`model.float()`, `.to("cpu")`, `.double().float()`, `.train()`, `requires_grad_` during training."""
    model, optimizer = trained()
    start, same = weights(model), [id(p) for p in model.parameters()]
    numbers = {}
    for name, change in (
        ("float", lambda: model.float()),
        ("to", lambda: model.to("cpu")),
        ("to float", lambda: model.to(torch.float32)),
        ("there and back", lambda: model.double().float()),
        ("channels", lambda: model.to(memory_format=torch.contiguous_format)),
    ):
        before = weights(model)
        change()
        numbers[f"{name} changed"] = largest_difference(model, before)
        training.train(model, optimizer, 4)
        numbers[name] = distance(model, start)
    numbers["others"] = sum(id(p) != i for p, i in zip(model.parameters(), same, strict=True))
    return numbers


@scenario("values and attributes after training", library=True)
def attributes_on_weights() -> Numbers:
    """Attributes that a script hangs on its weights, and the order of `parameters()`."""
    model = made()
    for i, p in enumerate(model.parameters()):
        p.tag = i
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    same = [id(p) for p in model.parameters()]
    training.train(model, optimizer, 5)
    others = sum(id(p) != i for p, i in zip(model.parameters(), same, strict=True))
    is_parameter = sum(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in model.parameters())
    tags = sum(p.tag * 10**i for i, p in enumerate(model.parameters()))
    in_state = sum(p in optimizer.state or True for p in model.parameters())
    return {"tags": tags, "others": others, "parameters": is_parameter, "in state": in_state}


@scenario(
    "PyTorch's error",
    differs=dict.fromkeys(
        ("bf16-mixed", "fp16-mixed:emulate", "fp16-master:emulate"),
        "no error: backward has the 16-bit copy that the forward pass used, as under `torch.autocast`",
    ),
)
def writing_between_forward_and_backward() -> Numbers:
    """A weight that backward needs is written in place before it."""
    model, _ = trained()
    loss = loss_of(model, 0)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    try:
        loss.backward()
    except RuntimeError as error:
        return {"raised": float("modified by an inplace operation" in str(error))}
    return {"raised": 0.0}


@scenario("an error for each", library=True)
def writes_that_pytorch_refuses() -> Numbers:
    """In-place writes to a leaf that requires grad, and of a wrong shape, without `no_grad`."""
    model, _ = trained()
    w, raised = model[0].weight, {}

    def assign():
        w[0] = 1.0

    for name, write in (
        ("mul_", lambda: w.mul_(2)),
        ("index", assign),
        ("copy_", lambda: w.data.copy_(torch.ones(3, 3))),
        ("numpy", lambda: w.numpy()),
        ("view", lambda: w.view(5, 5)),
    ):
        try:
            write()
            raised[name] = 0.0
        except RuntimeError:
            raised[name] = 1.0
    return raised

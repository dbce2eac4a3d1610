"""Models that change during training, share weights, compute them, or are made of unusual parts."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from training_scripts import Numbers, scenario, training
from training_scripts.training import SMALL, batch, distance, held_out, largest_difference, made, weights


@scenario("distance of each part", library=True)
def freezing_and_unfreezing() -> Numbers:
    """The first layer frozen, then trained, then frozen again, in one optimizer."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    moved = []
    for phase, trains in enumerate((False, True, False)):
        model[0].requires_grad_(trains)
        training.train(model, optimizer, 5, 5 * phase)
        moved.append(distance(model[0], start[:2]))
    return {f"after phase {i}": m for i, m in enumerate(moved)} | {"all": distance(model, start)}


@scenario("distance of each part", library=True)
def unfreezing_with_an_optimizer_of_the_trained_part() -> Numbers:
    """A head trained alone, then all with a second optimizer."""
    model = made()
    start = weights(model)
    model[0].requires_grad_(False)
    training.train(model, torch.optim.AdamW(model[2].parameters(), lr=SMALL), 8)
    model[0].requires_grad_(True)
    training.train(model, torch.optim.AdamW(model.parameters(), lr=SMALL), 8, 8)
    now = weights(model)
    return {"first": distance(now[:2], start[:2]), "head": distance(now[2:], start[2:])}


@scenario("distance of each part", library=True)
def new_layers_during_training() -> Numbers:
    """A layer inserted into the model, its parameters added to the optimizer."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 8)
    torch.manual_seed(1)
    inserted = nn.Linear(32, 32)
    its = weights(inserted)
    model.insert(2, inserted)
    optimizer.add_param_group({"params": inserted.parameters()})
    training.train(model, optimizer, 8, 8)
    return {"inserted": distance(inserted, its), "first": distance(model[0], start[:2])}


@scenario("distance of each part", library=True)
def replaced_head() -> Numbers:
    """The last layer replaced by a new one, and a new optimizer."""
    model = made()
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 8)
    torch.manual_seed(1)
    model[2] = nn.Linear(32, 4)
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 8, 8)
    return {"body": distance(model[0], start[:2]), "head": distance(model[2], start[2:])}


@scenario("distance of each part; the old rows are as they were, bit for bit", library=True)
def grown_embedding() -> Numbers:
    """A vocabulary that grows: a larger embedding that takes over the old rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Flatten(), nn.Linear(32, 4))

    def train(optimizer, first):
        for i in range(first, first + 8):
            ids = torch.randint(16, (16, 4), generator=torch.Generator().manual_seed(i))
            training.step(model, optimizer, lambda ids=ids: F.cross_entropy(model(ids), ids[:, 0] % 4))

    train(torch.optim.SGD(model.parameters(), lr=SMALL), 0)
    larger = nn.Embedding(20, 8)
    with torch.no_grad():
        larger.weight[:16] = model[0].weight
    off = float((larger.weight[:16] - model[0].weight).abs().max())
    model[0] = larger
    start = weights(model)
    train(torch.optim.SGD(model.parameters(), lr=SMALL), 8)
    return {"off": off, "moved": distance(model, start)}


@scenario("distance; still tied", library=True)
def tied_weights() -> Numbers:
    """An embedding and an output layer that share one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
    nn.init.normal_(model[0].weight, std=0.1)
    model[2].weight = model[0].weight
    start, optimizer = weights(model), torch.optim.AdamW(model.parameters(), lr=SMALL)
    for i in range(10):
        ids = torch.randint(16, (32,), generator=torch.Generator().manual_seed(i))
        training.step(model, optimizer, lambda ids=ids: F.cross_entropy(model(ids), (ids + 1) % 16))
    other = copy.deepcopy(model)
    tied = model[0].weight is model[2].weight, other[0].weight is other[2].weight
    return {"moved": distance(model, start), "tied": float(tied[0]), "copy tied": float(tied[1])}


@scenario("distance; ties and unties", library=True)
def tied_and_untied_during_training() -> Numbers:
    """Two layers tied after some steps, and untied again by a copy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4))
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5)
    model[2].weight = model[0].weight
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5, 5)
    tied = distance(model, start)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5, 10)
    return {"tied": tied, "untied": distance(model, start)}


@scenario("distance and loss", library=True)
def lazy_layers() -> Numbers:
    """Lazy layers, given to the optimizer before they have shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(32), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    training.train(model, optimizer, 1)
    start = weights(model)
    training.train(model, optimizer, 10, 1)
    return {"moved": distance(model, start), "loss": held_out(model)}


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 8) * 0.3), nn.Parameter(torch.randn(32, 4) * 0.3)

    def forward(self, weight):
        return weight + self.b @ self.a


@scenario("distance; what is baked is W + BA in FP32", library=True)
def parametrization_baked() -> Numbers:
    """W + BA as a parametrization, trained, then removed with its value left."""
    model = made()
    parametrize.register_parametrization(model[0], "weight", LowRank())
    optimizer, start = torch.optim.SGD(model.parameters(), lr=SMALL), weights(model)
    training.train(model, optimizer, 8)
    moved = distance(model, start)
    parts = model[0].parametrizations.weight
    exact = parts.original.detach().double() + parts[0].b.detach().double() @ parts[0].a.detach().double()
    parametrize.remove_parametrizations(model[0], "weight")
    baked = float((model[0].weight.detach().double() - exact).abs().max())
    return {"moved": moved, "off": float(baked > 1e-5), "loss": held_out(model)}


@scenario("distance of both phases", 0.03, library=True)
def parametrization_registered_during_training() -> Numbers:
    """A parametrization, and spectral norm, registered between two phases."""
    numbers = {}
    for name in ("own", "spectral"):
        model = made()
        training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5)
        if name == "own":
            parametrize.register_parametrization(model[0], "weight", Half())
        else:
            parametrizations.spectral_norm(model[0])
        start = weights(model)
        training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5, 5)
        numbers |= {name: distance(model, start), f"{name} norm": model[0].weight.detach().norm().item()}
    return numbers


@scenario("distance; Q'Q is 1 in FP32", 0.03, library=True)
def orthogonal_weights() -> Numbers:
    """`parametrizations.orthogonal`, trained and removed."""
    model = made()
    parametrizations.orthogonal(model[0])
    optimizer, start = torch.optim.SGD(model.parameters(), lr=1e-3), weights(model)
    training.train(model, optimizer, 5)
    moved = distance(model, start)
    parametrize.remove_parametrizations(model[0], "weight")
    q = model[0].weight.detach().double()
    return {"moved": moved, "off": float((q.T @ q - torch.eye(8)).abs().max() > 1e-5)}


@scenario("distance and loss", 0.03, library=True)
def weight_norm_and_spectral_norm() -> Numbers:
    """Weight norm and spectral norm, PyTorch's older and newer kinds."""
    numbers = {}
    for name, wrap in (
        ("weight", parametrizations.weight_norm),
        ("spectral", parametrizations.spectral_norm),
        ("older spectral", nn.utils.spectral_norm),
    ):
        model = made()
        wrap(model[0])
        optimizer, start = torch.optim.SGD(model.parameters(), lr=1e-3), weights(model)
        training.train(model, optimizer, 5)
        numbers |= {name: distance(model, start), f"{name} loss": held_out(model)}
    return numbers


@scenario("zeros; distance", library=True)
def pruning() -> Numbers:
    """`nn.utils.prune` during training, trained on, then made permanent."""
    model = made()
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 5)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 0.25, n=2, dim=1)
    start = weights(model)
    training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 10, 5)
    moved = distance(model, start)
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    last = training.train(model, torch.optim.SGD(model.parameters(), lr=SMALL), 2, 15)
    return {"zeros": zeros, "moved": moved, "loss": last}


@scenario("distance; what it says")
def functional_calls() -> Numbers:
    """`functional_call` with other weights, and with the model's own in training."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    for i in range(10):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(functional_call(model, dict(model.named_parameters()), (x,)), y).backward()
        optimizer.step()
    x, y = batch(0)
    others = {name: 0.9 * p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        loss = F.cross_entropy(functional_call(model, others, (x,)), y).item()
    return {"moved": distance(model, start), "loss": loss}


@scenario("loss of each model of the ensemble; the stack is what was stacked", library=True)
def ensemble_by_vmap() -> Numbers:
    """`stack_module_state` of trained models, called under `vmap`."""
    models = [made(seed) for seed in range(3)]
    for seed, model in enumerate(models):
        training.train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 5, 10 * seed)
    parameters, buffers = stack_module_state(models)
    off = max(float((parameters["0.weight"][i] - m[0].weight).abs().max()) for i, m in enumerate(models))
    base, (x, y) = copy.deepcopy(models[0]), batch(0)
    out = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    return {"off": off, **{f"loss {i}": F.cross_entropy(o.float(), y).item() for i, o in enumerate(out)}}


class Raw(nn.Module):
    """Parameters of its own, used in every product there is."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 16) * 0.2), nn.Parameter(torch.randn(2, 16, 8) * 0.2)
        self.c = nn.ParameterList([nn.Parameter(torch.randn(8, 8) * 0.2) for _ in range(3)])
        self.d = nn.ParameterDict({"out": nn.Parameter(torch.randn(4, 8) * 0.2)})
        self.scale = nn.Parameter(torch.ones(1, 8))

    def forward(self, x):
        x = torch.einsum("bh,nhd->bd", torch.tanh(x @ self.a), self.b)
        for c in self.c:
            x = x + torch.addmm(x, x, c.t() * 0.5) * self.scale
        return torch.matmul(x, self.d["out"].T)


@scenario("distance and loss", library=True)
def raw_parameters() -> Numbers:
    """Own parameters, lists and dicts of them, in `@`, `einsum`, `addmm`, `matmul`."""
    torch.manual_seed(0)
    model = Raw()
    optimizer = torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 5)  # until the loss scale has settled
    start = weights(model)
    training.train(model, optimizer, 10, 5)
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance and loss", 0.04, library=True)
def convolutions() -> Numbers:
    """Convolutions, transposed and grouped, BatchNorm and pooling."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose1d(8, 4, 3), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 10)
    return {"moved": distance(model, start), "loss": held_out(model)}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(2, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.cell(x.view(-1, 4, 2))[0][:, -1])


@scenario("distance and loss", library=True)
def recurrent_layers() -> Numbers:
    """RNN, LSTM and GRU."""
    numbers = {}
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        torch.manual_seed(0)
        model = Recurrent(kind)
        start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
        training.train(model, optimizer, 4)
        numbers |= {kind.__name__: distance(model, start), f"{kind.__name__} loss": held_out(model)}
    return numbers


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.position = nn.Linear(1, 16), nn.Parameter(torch.randn(1, 8, 16) * 0.1)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block(self.inputs(x[..., None]) + self.position).mean(1))


@scenario("distance and loss, also without gradients", 0.03, library=True)
def attention() -> Numbers:
    """A transformer layer; trained, and evaluated on PyTorch's fast path."""
    torch.manual_seed(0)
    model = Attending()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
    training.train(model, optimizer, 6)
    trained, model = held_out(model), model.eval()
    with torch.no_grad():
        return {"moved": distance(model, start), "loss": trained, "evaluated": held_out(model)}


@scenario("distance; the norms of rows", 0.03, library=True)
def embeddings() -> Numbers:
    """Embedding with `max_norm` and a padding row, EmbeddingBag, and sparse gradients."""
    numbers = {}
    for name, layer in (
        ("max_norm", lambda: nn.Embedding(16, 8, max_norm=1.0)),
        ("padding", lambda: nn.Embedding(16, 8, padding_idx=0)),
        ("sparse", lambda: nn.Embedding(16, 8, sparse=True)),
        ("bag", lambda: nn.EmbeddingBag(16, 8)),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(layer(), nn.Flatten(), nn.Linear(8 if name == "bag" else 32, 4))
        start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-3)
        for i in range(5):
            ids = torch.randint(16, (16, 4), generator=torch.Generator().manual_seed(i))
            training.step(model, optimizer, lambda ids=ids, m=model: F.cross_entropy(m(ids), ids[:, 0] % 4))
        numbers |= {name: distance(model, start), f"{name} norm": model[0].weight.detach().norm().item()}
    return numbers


@scenario("distance and loss", library=True)
def activation_checkpointing() -> Numbers:
    """A block recomputed in backward, inside the model."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(checkpoint(lambda x: F.gelu(self.a(x)), x, use_reentrant=False))

    torch.manual_seed(0)
    model = Checkpointed()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 10)
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance and loss", library=True)
def compiled_model() -> Numbers:
    """`torch.compile`, with the eager backend."""
    model = made()
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    compiled = torch.compile(model, backend="eager")
    training.train(compiled, optimizer, 6)
    torch._dynamo.reset()
    return {"moved": distance(model, start), "loss": held_out(model)}


@scenario("distance of the adapters; the base is as it was, bit for bit; what is merged is FP32's sum", library=True)
def lora_by_hand() -> Numbers:
    """A frozen base with trained low-rank adapters, merged at the end."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
            self.b = nn.Parameter(torch.zeros(base.out_features, 4))

        def forward(self, x):
            return self.base(x) + x @ self.a.t() @ self.b.t()

    model = made()
    training.train(model, torch.optim.AdamW(model.parameters(), lr=SMALL), 4)
    model[0], model[2] = Adapted(model[0]), Adapted(model[2])
    base, start = weights([model[0].base.weight]), weights(model)
    training.train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2), 8, 4)
    changed = largest_difference([model[0].base.weight], base)
    moved = distance(model, start)
    adapted = model[0]
    with torch.no_grad():
        adapted.base.weight += adapted.b @ adapted.a
    exact = base[0] + adapted.b.detach().double() @ adapted.a.detach().double()
    off = largest_difference([adapted.base.weight], [exact])
    return {"moved": moved, "changed": changed, "off": float(off > 1e-6)}


@scenario("distance; loss", 0.04, library=True)
def fake_quantization() -> Numbers:
    """Quantization-aware training: weights rounded in forward, gradients straight through."""

    class Rounded(nn.Linear):
        def forward(self, x):
            scale = self.weight.detach().abs().max() / 127
            rounded = self.weight + ((self.weight / scale).round() * scale - self.weight).detach()
            return F.linear(x, rounded, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Rounded(8, 32), nn.GELU(), Rounded(32, 4))
    start, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=SMALL)
    training.train(model, optimizer, 10)
    return {"moved": distance(model, start), "loss": held_out(model)}

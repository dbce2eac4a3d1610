"""HS508: gradients summed over ranks in 16 bits. A process group that only pretends to have 64 ranks is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from halfstep.doctor.finding import Finding, Severity
from halfstep.doctor.lint import lint

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no distributed package")


@pytest.fixture(params=[64])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    try:
        yield request.param
    finally:
        dist.destroy_process_group()


def reduced(module: nn.Module) -> list[Finding]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return [finding for finding in lint(module, optimizer, policy=None) if finding.code == "HS508"]


def mean(gradients: list[Tensor], before: float) -> Tensor:
    """The mean over ranks as it is computed: divided by ``before``, summed one by one, divided by the rest."""
    total = gradients[0] / before
    for gradient in gradients[1:]:
        total = total + gradient / before
    return total / (len(gradients) / before)


@pytest.mark.parametrize(
    ("dtype", "severity"), [(torch.float16, Severity.WARNING), (torch.bfloat16, Severity.NOTE), (torch.float32, None)]
)
def test_parameters_in_16_bits(ranks: int, dtype: torch.dtype, severity: Severity | None) -> None:
    found = reduced(DistributedDataParallel(nn.Linear(4, 4).to(dtype)))
    assert [f.severity for f in found] == ([] if severity is None else [severity])
    if found:
        assert found[0].numbers["world"] == ranks


@pytest.mark.parametrize("ranks", [512], indirect=True)
def test_many_ranks_are_too_many_for_bf16(ranks: int) -> None:
    (found,) = reduced(DistributedDataParallel(nn.Linear(4, 4).bfloat16()))
    assert found.severity == Severity.WARNING
    ones = [torch.ones((), dtype=torch.bfloat16)] * ranks
    assert float(sum(ones[1:], ones[0])) == 256  # where the sum stops


@pytest.mark.parametrize("ranks", [1], indirect=True)
def test_one_rank_sums_nothing(ranks: int) -> None:
    assert reduced(DistributedDataParallel(nn.Linear(4, 4).half())) == []


def own_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


# PyTorch compares them with the classes, and strings are what the import from __future__ makes of them.
own_hook.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]})


def test_communication_hooks(ranks: int) -> None:
    wrapped = default_hooks.fp16_compress_wrapper(own_hook)
    for hook, count in (
        (default_hooks.fp16_compress_hook, 1),
        (wrapped, 1),
        (default_hooks.allreduce_hook, 0),
        (own_hook, 0),
    ):
        module = DistributedDataParallel(nn.Linear(4, 4))
        module.register_comm_hook(None, hook)
        found = reduced(module)
        assert len(found) == count, hook
    module = DistributedDataParallel(nn.Linear(4, 4))
    module.register_comm_hook(None, default_hooks.fp16_compress_hook)
    (found_one,) = reduced(module)
    zero_below = float(found_one.numbers["underflows_below"])
    small = [torch.tensor(zero_below * 0.99).half()] * ranks
    assert small[0] > 0 and mean(small, ranks) == 0
    assert mean([torch.tensor(zero_below * 1.1).half()] * ranks, ranks) > 0
    assert float(found_one.numbers["overflows_above"]) == 65504  # what is divided first does not overflow


@pytest.mark.parametrize(
    ("policy", "severity"),
    [
        ({"param_dtype": torch.bfloat16}, Severity.NOTE),  # no reduce_dtype: the gradients' own
        ({"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}, None),
        ({"param_dtype": torch.float16, "reduce_dtype": torch.float16}, Severity.WARNING),
        ({}, None),
    ],
)
def test_fsdp2(ranks: int, policy: dict[str, torch.dtype], severity: Severity | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for part in (*module, module):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**policy))
    found = reduced(module)
    assert [f.severity for f in found] == ([] if severity is None else [severity])
    if severity is Severity.WARNING:
        limit = float(found[0].numbers["overflows_above"])
        factor = limit * ranks / 65504
        assert mean([torch.tensor(limit * 0.98).half()] * ranks, factor).isfinite()
        assert mean([torch.tensor(limit * 1.02).half()] * ranks, factor).isinf()


@pytest.mark.parametrize(("reduce", "count"), [(None, 1), (torch.float16, 1), (torch.float32, 0)])
def test_fsdp1(ranks: int, reduce: torch.dtype | None, count: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    precision = MixedPrecision(param_dtype=torch.float16, reduce_dtype=reduce)
    module = FullyShardedDataParallel(nn.Linear(64, 64), mixed_precision=precision, device_id=torch.device("cpu"))
    found = reduced(module)
    assert [f.numbers["overflows_above"] for f in found] == [65504 * 8 / ranks] * count

"""`ExponentHistogram`: how many numbers a tensor has in every octave. The record of an op's numbers.

Whether numbers fit a format is a question of their exponents: what is too large becomes inf, what is too small becomes
zero, and a loss scale, being a power of two, moves all of them alike. So one count per float32 exponent, 256 of them,
answers for every format and every loss scale at once, from one FP32 run; and counts add up, over ops, steps and ranks.
(Micikevicius et al. 2018, "Mixed Precision Training", figure 3, is such a histogram.)

Bin b counts magnitudes in [2**(b - 127), 2**(b - 126)), as float32 stores them::

    zeros          counted beside the bins: they lie in every format
    bin 0          float32's subnormal numbers, [2**-149, 2**-126)
    bins 1 … 254   the exponents -126 … 127
    bin 255        inf and NaN; how many of them are NaN is counted too

Within a bin nothing is known, so where a format's limit lies inside one (fp16 overflows from 65520 on, in the bin of
32768 … 65536) what is given is the lower bound: the bins that lie beyond the limit as a whole.

16-bit and 8-bit numbers are float32 numbers. float64 has more exponents: what lies beyond float32's range is counted in
its last bin on either side, so that finite stays finite and non-zero stays non-zero.

Counting reads the exponent where it lies: view as int32, shift the mantissa away, keep eight bits (a cast to uint8
drops the sign), bincount. That took 0.6 to 1.3 ns per element on one thread of an x86 server. Tried and slower: masking
the sign in int32 (1.1 to 1.6), a strided view of the high halves alone (1.0 to 1.6), more bins to spread the increments
(1.2 to 1.9). Zeros and NaN are told apart from their neighbours only where their bins are not empty, which is another
0.8 ns; `count_nonzero` of the numbers themselves would be 4.5.

On a device the host must not ask: `bincount` waits for the largest value, and so would a look at a bin. There zeros and
NaN have bins of their own, `histc` counts them all, and the counts stay until somebody wants them (`count`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfstep.formats import Format

BINS = 256
BIAS = 127  #: of float32: bin = exponent + BIAS
SMALLEST_EXPONENT = -149  #: of float32's smallest subnormal number
_CHUNK = 1 << 20  #: elements counted at a time: what is made on the way stays small
_ROW = BINS + 2  #: of `count`: the bins, zeros, NaN


def _no_counts() -> Tensor:
    return torch.zeros(BINS, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, eq=False)
class ExponentHistogram:
    """Counts by float32 exponent; see the module. Nothing changes it: all operations make new ones."""

    counts: Tensor = field(default_factory=_no_counts)  #: int64 (256,), on the CPU; not to be written to
    zeros: int = 0  #: in no bin
    nans: int = 0  #: among those of bin 255

    @classmethod
    def of(cls, tensor: Tensor, sample: int | None = None) -> ExponentHistogram:
        """The histogram of a tensor of any shape and floating or complex dtype; waits for its device, once.

        Args, and what it raises, as those of `count`.
        """
        return cls.from_counts(count(tensor, sample))

    @classmethod
    def from_counts(cls, row: Tensor) -> ExponentHistogram:
        """What `count` returned, or a sum of such."""
        row = row.cpu()
        return cls(row[:BINS].clone(), int(row[BINS]), int(row[BINS + 1]))

    @classmethod
    def merge(cls, many: Iterable[ExponentHistogram]) -> ExponentHistogram:
        """All of them together; of none, the empty histogram."""
        counts, zeros, nans = _no_counts(), 0, 0
        for one in many:
            counts += one.counts
            zeros += one.zeros
            nans += one.nans
        return cls(counts, zeros, nans)

    def __add__(self, other: ExponentHistogram) -> ExponentHistogram:
        return self.merge((self, other))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExponentHistogram):
            return NotImplemented
        return (self.zeros, self.nans) == (other.zeros, other.nans) and torch.equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.zeros, self.nans, *self.counts.tolist()))

    def __repr__(self) -> str:
        ends = [i - BIAS for i in self.counts[:-1].nonzero().flatten().tolist()]
        span = f", exponents {ends[0]} to {ends[-1]}" if ends else ""
        return (
            f"ExponentHistogram({self.total} numbers{span}, {self.zeros} zeros, {self.infinities} inf, {self.nans} NaN)"
        )

    @property
    def infinities(self) -> int:
        """How many are inf, of either sign."""
        return int(self.counts[-1]) - self.nans

    @property
    def total(self) -> int:
        """All numbers counted."""
        return self.zeros + int(self.counts.sum())

    @property
    def finite(self) -> int:
        """All but inf and NaN; zeros too."""
        return self.zeros + self.nonzero

    @property
    def nonzero(self) -> int:
        """The finite numbers that are not zero: what all shares are shares of."""
        return int(self.counts[:-1].sum())

    def amax_exponent(self) -> int | None:
        """The exponent of the largest finite magnitude: 3 for 8 … 15.99. None without non-zero finite numbers.

        -127 stands for all of float32's subnormal numbers.
        """
        filled = self.counts[:-1].nonzero()
        return int(filled[-1]) - BIAS if len(filled) else None

    def share_below(self, exponent: float) -> float:
        """Share of the non-zero finite numbers with magnitude below ``2**exponent``; 0 of none.

        Exact for whole exponents from -126 on; else a lower bound.
        """
        return self._share(0, math.floor(max(min(exponent, 200), -200)) + BIAS)

    def share_at_least(self, exponent: float) -> float:
        """Share of the non-zero finite numbers with magnitude ``2**exponent`` or more; 0 of none.

        Exact for whole exponents from -126 on, and up to -149; else a lower bound.
        """
        first = math.ceil(max(min(exponent, 200), -200)) + BIAS
        return self._share(0 if exponent <= SMALLEST_EXPONENT else max(first, 1), BINS)

    def scaled(self, power: int) -> ExponentHistogram:
        """The histogram of the numbers times ``2**power``, in float32.

        Exact wherever the product is: only below 2**-126 octaves are no longer told apart. float32's subnormal numbers
        move as if they had exponent -127, and products below 2**-150 become zero. Products beyond float32 become inf.
        """
        shifted, zeros = _no_counts(), self.zeros
        for index in self.counts[:-1].nonzero().flatten().tolist():
            count, target = int(self.counts[index]), index + power
            if target + 1 < SMALLEST_EXPONENT + BIAS:
                zeros += count
            else:
                shifted[min(max(target, 0), BINS - 1)] += count
        shifted[-1] += self.counts[-1]
        return ExponentHistogram(shifted, zeros, self.nans)

    def flushed_share(self, format: Format) -> float:
        """Share of the non-zero finite numbers that a cast to the format turns into zero: at least this much.

        Exact but for numbers of exactly half the smallest subnormal one, which would be flushed too, and for formats
        that flush only some of float32's subnormal numbers (bf16: the bound is 0).
        """
        return self.share_below(format.emin - format.mantissa_bits - 1)

    def overflow_share(self, format: Format) -> float:
        """Share of the non-zero finite numbers beyond the format's range: at least this much.

        The octave of the format's largest number is not counted, of which a part rounds beyond it (fp16: 65520 …
        65536). For bf16 and wider the bound is 0.
        """
        return self.share_at_least(format.emax + 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the empty bins at either end."""
        filled = self.counts.nonzero().flatten().tolist()
        first, last = (filled[0], filled[-1] + 1) if filled else (0, 0)
        return {"first": first, "counts": self.counts[first:last].tolist(), "zeros": self.zeros, "nans": self.nans}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ExponentHistogram:
        """The histogram that `to_json` wrote.

        Raises:
            ValueError: these are not such values.
        """
        try:
            first, zeros, nans = (int(values[name]) for name in ("first", "zeros", "nans"))
            given = torch.tensor(values["counts"], dtype=torch.int64, device="cpu")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"not an exponent histogram: {error!r}") from error
        counts = _no_counts()
        if given.dim() != 1 or first < 0 or first + len(given) > BINS:
            raise ValueError(f"not an exponent histogram: {len(given)} bins from {first} on do not fit into {BINS}")
        counts[first : first + len(given)] = given
        if zeros < 0 or int(counts.min()) < 0 or not 0 <= nans <= int(counts[-1]):
            raise ValueError(f"not an exponent histogram: counts below zero, or {nans} NaN of {int(counts[-1])}")
        return cls(counts, zeros, nans)

    def _share(self, start: int, stop: int) -> float:
        nonzero = self.nonzero
        if not nonzero:
            return 0.0
        return int(self.counts[max(start, 0) : max(min(stop, BINS - 1), 0)].sum()) / nonzero


def count(tensor: Tensor, sample: int | None = None) -> Tensor:
    """The counts of a tensor, of any shape and floating or complex dtype, on its device; waits for nothing there.

    Args:
        tensor: dense. Of complex numbers, real and imaginary parts are counted.
        sample: count no more than about this many elements, spread evenly over the tensor. Shares are then estimates,
            and the largest exponent may be missed.

    Returns:
        int64 (258,): the 256 bins, how many are zero, how many NaN. Such rows add up.

    Raises:
        TypeError: integers, or a tensor that is not dense memory.
    """
    x = tensor.detach()
    if x.layout is not torch.strided or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"exponents are those of dense floating-point tensors, not of a {x.layout} tensor of {x.dtype}. "
            "Of a sparse tensor, count .coalesce().values()"
        )
    x = _flat(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.resolve_neg())
    if sample is not None and x.numel() > sample:
        x = x[:: _stride(x.numel(), sample)].contiguous()
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        x = x.float()
    return _counted(x) if x.device.type == "cpu" else _counted_on_device(x)


def _counted(x: Tensor) -> Tensor:
    row = torch.zeros(_ROW, dtype=torch.int64, device="cpu")
    counts = row[:BINS]
    for start in range(0, x.numel(), _CHUNK):
        counts += torch.bincount(_bins(x[start : start + _CHUNK]), minlength=BINS)
    if counts[0]:
        row[BINS] = torch.count_nonzero(x == 0)  # of booleans: branches on numbers are mispredicted
        counts[0] -= row[BINS]
    if counts[-1]:
        row[BINS + 1] = torch.count_nonzero(x.isnan())
    return row


def _counted_on_device(x: Tensor) -> Tensor:
    row = torch.zeros(_ROW, dtype=torch.int64, device=x.device)
    for start in range(0, x.numel(), 4 * _CHUNK):
        part = x[start : start + 4 * _CHUNK]
        bins = _bins(part).float()
        bins = torch.where(part == 0, float(BINS), torch.where(part.isnan(), BINS + 1.0, bins))
        if torch.are_deterministic_algorithms_enabled():  # then `histc` refuses; this one waits
            row += torch.bincount(bins.to(torch.int32), minlength=_ROW)
        else:  # counts up to 2**24 are exact in float32; by the middles of bins, whatever a kernel rounds
            row += torch.histc(bins + 0.5, _ROW, 0, _ROW).to(torch.int64)
    row[BINS - 1] += row[BINS + 1]  # NaN are counted there too
    return row


def _flat(x: Tensor) -> Tensor:
    """All elements in one dimension, in the order of memory where that saves a copy."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.reshape(-1).contiguous()


def _stride(elements: int, sample: int) -> int:
    """Every how many-th element to take, for ``sample`` of them at most.

    Odd, and without a divisor in common with the number of elements, so none with the length of a row either: the
    sample of a matrix comes from all of its columns.
    """
    stride = -(-elements // max(sample, 1))
    while math.gcd(stride, 2 * elements) > 1:
        stride += 1
    return stride


def _bins(x: Tensor) -> Tensor:
    """The bin of each element, zeros in bin 0; uint8, or int64 of float64."""
    if x.dtype is torch.bfloat16:
        return (x.view(torch.int16) >> 7).to(torch.uint8)
    if x.dtype is torch.float32:
        return (x.view(torch.int32) >> 23).to(torch.uint8)
    stored = (x.view(torch.int64) >> 52) & 0x7FF
    bins = (stored - (1023 - BIAS)).clamp(0, BINS - 2)
    return torch.where(stored == 0x7FF, BINS - 1, bins)

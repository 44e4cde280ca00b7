"""How fast a device can be at best: memory bandwidth and arithmetic peaks, and floors from them."""

from __future__ import annotations

from dataclasses import dataclass

from quota_jax.bench.work import Work
from quota_jax.errors import QuotaError


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Of one device, by its maker: bytes per second, and operations per second (a multiply and an
    add are two) of dense matrix products in bfloat16 and in int8."""

    bandwidth: float
    float_ops: float
    integer_ops: float

    def seconds(self, work: Work) -> float:
        """The least time for ``work``: its bytes or its operations, whichever takes longer."""
        return max(work.bytes / self.bandwidth, self.arithmetic_seconds(work))

    def arithmetic_seconds(self, work: Work) -> float:
        return work.float_ops / self.float_ops + work.integer_ops / self.integer_ops


def _peaks(terabytes: float, float_tera: float, integer_tera: float) -> Peaks:
    return Peaks(
        bandwidth=terabytes * 1e12, float_ops=float_tera * 1e12, integer_ops=integer_tera * 1e12
    )


PEAKS = {
    "NVIDIA H100 80GB HBM3": _peaks(3.35, 989, 1979),
    "NVIDIA H200": _peaks(4.8, 989, 1979),
    "NVIDIA A100-SXM4-80GB": _peaks(2.04, 312, 624),
    "NVIDIA A100-SXM4-40GB": _peaks(1.555, 312, 624),
    "NVIDIA L4": _peaks(0.3, 121, 242),
    "NVIDIA GeForce RTX 4090": _peaks(1.008, 165.2, 660.6),
}
"""By the name that JAX gives a device, from the makers' data sheets, without sparsity."""


def peaks_of(
    kind: str, *, bandwidth: float | None = None, peak: tuple[float, float] | None = None
) -> Peaks | None:
    """Peaks of a device by its name; None where it is unknown and not both are given.

    Args:
      bandwidth: TB/s instead of the table's.
      peak: 10^12 operations per second in bfloat16 and in int8 instead of the table's.

    Raises:
      QuotaError: a value is not positive.
    """
    for name, values in (("bandwidth", (bandwidth,)), ("peak", peak or ())):
        for value in values:
            if value is not None and not 0 < value < float("inf"):
                raise QuotaError(f"--{name} must be positive, got {value:g}")
    known = PEAKS.get(kind)
    if known is None and (bandwidth is None or peak is None):
        return None
    if bandwidth is None:
        assert known is not None
        bandwidth = known.bandwidth / 1e12
    if peak is None:
        assert known is not None
        peak = known.float_ops / 1e12, known.integer_ops / 1e12
    return _peaks(bandwidth, *peak)

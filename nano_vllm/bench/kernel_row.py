"""One row of the kernels benchmark: as data, and as a line for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from nano_vllm.bench.attention_peers import AttentionPeer


@dataclass(frozen=True)
class Setup:
    """What all rows of one run share."""

    device: torch.device
    dtype: torch.dtype
    block_size: int
    copy: float  # bytes per second, the device's own large copy
    matmul: float  # floating-point operations per second, torch's own large product
    peers: tuple[AttentionPeer, ...]
    float8_cache: bool = False  # whether attention over one is timed beside the peers

    @property
    def compared(self) -> tuple[str, ...]:
        """What has columns beside ours."""
        return (*(peer.name for peer in self.peers), *(("fp8 cache",) if self.float8_cache else ()))

    def row(
        self,
        kernel: str,
        heads: object,
        shape: str,
        seconds: float,
        *,
        moved: int | None = None,
        flops: int | None = None,
        is_paged: bool = True,
        peers: dict[str, float | None] | None = None,
    ) -> dict[str, Any]:
        """A row of a kernel that is held against the copy or the matmul ceiling, or one after the
        other.

        Args:
            seconds: of one call of ours.
            moved: bytes read and written, as far as they bind it.
            flops: floating-point operations, likewise; their rate is shown where there are any.
            is_paged: whether the time depends on the block size.
            peers: seconds of one call by the name of what is compared; None where it has no time.
        """
        floor = (moved or 0) / self.copy + (flops or 0) / self.matmul
        amount = flops or moved
        assert amount
        row: dict[str, Any] = {
            "kernel": kernel,
            "heads": str(heads),
            "shape": shape,
            "block_size": self.block_size if is_paged else None,
            "us": seconds * 1e6,
            "rate": amount / seconds / (1e12 if flops else 1e9),
            "unit": "TFLOP/s" if flops else "GB/s",
            "of ceiling": floor / seconds,
        }
        for name in self.compared:
            time = (peers or {}).get(name)
            row[f"{name} us"] = None if time is None else time * 1e6
            row[f"{name} / ours"] = None if time is None else time / seconds
        return row


def table_line(row: dict[str, Any], peers: tuple[str, ...]) -> dict[str, str]:
    """The row in fewer columns: the rate with its unit, a peer's us with (x), how many times
    ours it is."""
    line = {
        "kernel": row["kernel"],
        "heads": row["heads"],
        "shape": row["shape"],
        "block": "-" if row["block_size"] is None else str(row["block_size"]),
        "us": _microseconds(row["us"]),
        "rate": f"{row['rate']:.4g} {row['unit']}",
        "of ceiling": f"{row['of ceiling']:.0%}",
    }
    for peer in peers:
        time, ratio = row[f"{peer} us"], row[f"{peer} / ours"]
        line[f"{peer} (x)"] = "-" if time is None else f"{_microseconds(time)} ({ratio:.2f})"
    return line


def _microseconds(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"

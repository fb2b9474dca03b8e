"""What ranks compare before they load a model together."""

from __future__ import annotations

import json
import socket
from typing import Any

import torch

from nano_vllm.distributed.collectives import Collectives


def check_device(ranks: Collectives, device: torch.device) -> None:
    """A first sum over the ranks; RuntimeError where it is wrong."""
    total = ranks.all_reduce(torch.full((1024,), ranks.rank + 1.0, device=device))
    expected = ranks.size * (ranks.size + 1) / 2
    if not bool((total == expected).all()):
        raise RuntimeError(
            f"{socket.gethostname()}: a first all-reduce over {ranks.size} ranks on {device} gave "
            f"{total[0].item()} in place of {expected}"
        )


def compare(store: Any, rank: int, size: int, facts: dict[str, str]) -> None:
    """Raise ValueError, on all ranks, where one has other facts than the first.

    Args:
        store: of the group.
        rank: this one.
        size: ranks of the group.
        facts: what must be the same everywhere -> as it is here.
    """
    own = {"host": socket.gethostname(), "facts": facts}
    store.set(f"preflight/{rank}", json.dumps(own))
    said = [json.loads(store.get(f"preflight/{other}")) for other in range(size)]
    store.set(f"preflight/{rank}/has_read", "")
    if rank == 0:  # which may serve the store, and is about to end where they differ
        for other in range(size):
            store.get(f"preflight/{other}/has_read")
    first = said[0]
    for other in range(1, size):
        for name, value in first["facts"].items():
            found = said[other]["facts"].get(name)
            if found != value:
                raise ValueError(
                    f"rank {other} on {said[other]['host']} differs from rank 0 on "
                    f"{first['host']}: {name} is {found} in place of {value}"
                )

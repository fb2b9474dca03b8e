"""What sequences have said so far, on the device."""

from __future__ import annotations

import torch

from nano_vllm.sequence import Sequence


class TokenHistory:
    """A row of token ids for each of the sequences that penalties and bad words look back on.

    Written from the host when a sequence is first seen, and from then on by the kernel that reads
    it: the newest token may not be known to the host.

    Args:
        max_len: tokens of a sequence at the most.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._slots: dict[Sequence, int] = {}
        self.token_ids = torch.empty((0, max_len), dtype=torch.int32)
        """[num_slots, max_len], int32."""

    def keep(self, sequences: list[Sequence], device: torch.device) -> list[int]:
        """Have these sequences' tokens on the device, and those of no others.

        Returns:
            the row of each.
        """
        kept = {s: self._slots[s] for s in sequences if s in self._slots}
        used = set(kept.values())
        self._grow(len(sequences), device)
        free = (slot for slot in range(len(self.token_ids)) if slot not in used)
        for sequence in sequences:
            if sequence not in kept:
                kept[sequence] = slot = next(free)
                known = torch.tensor(sequence.token_ids, dtype=torch.int32)
                if device.type == "cuda":
                    known = known.pin_memory()
                self.token_ids[slot, : len(known)].copy_(known, non_blocking=True)
        self._slots = kept
        return [kept[sequence] for sequence in sequences]

    def _grow(self, num_slots: int, device: torch.device) -> None:
        have = len(self.token_ids)
        if num_slots <= have and self.token_ids.device == device:
            return
        shape = max(-(-num_slots // 16) * 16, have), self._max_len
        grown = torch.zeros(shape, dtype=torch.int32, device=device)
        grown[:have] = self.token_ids
        self.token_ids = grown

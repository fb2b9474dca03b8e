"""Which replica a request goes to: the least loaded, or one that has computed how it begins."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

SEQUENCE_TOKENS = 128
"""Prompt tokens that take as long as the output of a sequence does: some 230 tokens of an 8B model
on an H200 (docs/benchmarks.md: 14 us for each beside others, 25 us for a token of a prompt).
"""


@dataclass(slots=True)
class _Request:
    replica: int
    num_prompt_tokens: int
    """To be computed still; 0 once the first token is here."""
    num_sequences: int

    @property
    def load(self) -> int:
        return self.num_prompt_tokens + SEQUENCE_TOKENS * self.num_sequences


class Router:
    """Chooses by what it has sent and what came back: no clock, no I/O.

    The load of a replica, in prompt tokens, is what its requests under way have to compute of their
    prompts, and SEQUENCE_TOKENS for each of their sequences. A request goes where the sum of this
    and of what it would have to compute itself is least; replicas that are equal take turns. So a
    prefix is worth the tokens that it saves and no more: with the request, the chosen replica has
    never more load than the least loaded one would have with it, computing all of its prompt.

    Args:
        num_replicas: numbered from 0.
        block_size: tokens of a KV block, the unit in which prefixes are shared.
        num_blocks: of a replica's KV cache, which is as much as is remembered of it; 0 where
            prefixes are not to be looked at.
    """

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        self._block_size = block_size
        self._caches = [SeenBlocks(num_blocks) for _ in range(num_replicas)] if num_blocks else []
        self._loads = [0] * num_replicas
        self._requests: dict[str, _Request] = {}
        self._turn = 0
        """Who is chosen of equals."""

    @property
    def loads(self) -> tuple[int, ...]:
        """By replica."""
        return tuple(self._loads)

    def route(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        num_sequences: int = 1,
        cache_salt: str | None = None,
    ) -> int:
        """The replica for a request, which then counts as under way there.

        Args:
            request_id: for `note_progress` and `end`.
            prompt_token_ids: at least one.
            num_sequences: that it will run.
            cache_salt: prompts share blocks with those of the same salt alone.
        """
        num_replicas = len(self._loads)
        new = [len(prompt_token_ids)] * num_replicas
        hashes: list[int] = []
        if self._caches:
            hashes = hash_blocks(prompt_token_ids, self._block_size, cache_salt)
            for replica, cache in enumerate(self._caches):
                new[replica] -= self._block_size * cache.num_found(hashes)
        replica = min(
            range(num_replicas),
            key=lambda i: (self._loads[i] + new[i], (i - self._turn) % num_replicas),
        )
        self._turn = replica + 1
        if self._caches:
            self._caches[replica].add(hashes)
        request = _Request(replica, new[replica], num_sequences)
        self._requests[request_id] = request
        self._loads[replica] += request.load
        return replica

    def note_progress(self, request_id: str) -> None:
        """A token came: the prompt is computed."""
        request = self._requests.get(request_id)
        if request is not None:
            self._loads[request.replica] -= request.num_prompt_tokens
            request.num_prompt_tokens = 0

    def end(self, request_id: str) -> None:
        """A request is not under way any more; fine behind its end too."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._loads[request.replica] -= request.load


class SeenBlocks:
    """Hashes of the blocks that a replica has computed last; with a block all before it.

    Args:
        capacity: blocks to remember.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[int, None] = OrderedDict()
        """The least recently used first."""

    def num_found(self, hashes: Sequence[int]) -> int:
        """How many blocks of a prompt are among them, from its first on."""
        return bisect_left(hashes, True, key=lambda block_hash: block_hash not in self._hashes)

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt's blocks are used. The first is the last to be forgotten, as in the KV cache."""
        for block_hash in reversed(hashes):
            self._hashes[block_hash] = None
            self._hashes.move_to_end(block_hash)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)


def hash_blocks(token_ids: Sequence[int], block_size: int, cache_salt: str | None) -> list[int]:
    """A hash for each full block that can be shared, of its tokens and all before them. A prompt's
    last token cannot: somebody wants its logits.

    Python's own hash of bytes, whose secret is drawn at its start: clients cannot make collisions,
    which would cost no more than a worse choice.
    """
    parent = 0 if cache_salt is None else hash(cache_salt)
    data = array("i", token_ids).tobytes()
    size = block_size * (len(data) // len(token_ids))
    hashes = []
    for start in range(0, (len(token_ids) - 1) // block_size * size, size):
        parent = hash((parent, data[start : start + size]))
        hashes.append(parent)
    return hashes

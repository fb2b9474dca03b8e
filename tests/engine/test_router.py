"""Where requests go: bounded imbalance, what a prefix is worth, and what is remembered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nano_vllm.engine.router import SEQUENCE_TOKENS, Router, SeenBlocks, hash_blocks

BLOCK_SIZE = 16


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(50_000) for _ in range(length)]


class Peer:
    """A router's requests, and what each replica is known to have computed, kept the plain way."""

    def __init__(self, num_replicas: int) -> None:
        self.router = Router(num_replicas, BLOCK_SIZE, 10_000)
        self.prefixes: list[set[tuple]] = [set() for _ in range(num_replicas)]
        self.under_way: dict[str, list[int]] = {}
        """By request: replica, prompt tokens to compute, sequences."""

    def loads(self) -> list[int]:
        loads = [0] * len(self.prefixes)
        for replica, num_tokens, num_sequences in self.under_way.values():
            loads[replica] += num_tokens + SEQUENCE_TOKENS * num_sequences
        return loads

    def new_tokens(self, replica: int, tokens: list[int], salt: str | None) -> int:
        length = 0
        while length + BLOCK_SIZE < len(tokens):
            if (salt, *tokens[: length + BLOCK_SIZE]) not in self.prefixes[replica]:
                break
            length += BLOCK_SIZE
        return len(tokens) - length

    def route(self, tokens: list[int], num_sequences: int, salt: str | None) -> None:
        before = self.loads()
        costs = [b + self.new_tokens(i, tokens, salt) for i, b in enumerate(before)]
        request_id = f"r{random.getrandbits(64)}"
        replica = self.router.route(request_id, tokens, num_sequences, salt)
        assert costs[replica] == min(costs)
        num_tokens = self.new_tokens(replica, tokens, salt)
        self.under_way[request_id] = [replica, num_tokens, num_sequences]
        for end in range(BLOCK_SIZE, len(tokens), BLOCK_SIZE):
            self.prefixes[replica].add((salt, *tokens[:end]))
        after = self.router.loads
        assert list(after) == self.loads()
        own = len(tokens) + SEQUENCE_TOKENS * num_sequences
        assert after[replica] <= min(before) + own


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["route", "route", "progress", "end"]),
        st.integers(0, 2),  # which of three beginnings
        st.integers(0, 5),  # its blocks
        st.integers(1, 40),  # tokens behind them
        st.integers(1, 4),
        st.sampled_from([None, "a"]),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), STEPS, st.randoms(use_true_random=False))
def test_the_cheapest_is_chosen_and_imbalance_is_bounded(num_replicas, steps, choose) -> None:
    peer = Peer(num_replicas)
    for number, (kind, beginning, num_blocks, rest, num_sequences, salt) in enumerate(steps):
        if kind == "route":
            tokens = prompt(beginning, 80)[: num_blocks * BLOCK_SIZE] + prompt(100 + number, rest)
            peer.route(tokens, num_sequences, salt)
        elif peer.under_way:
            request_id = choose.choice(sorted(peer.under_way))
            if kind == "progress":
                peer.router.note_progress(request_id)
                peer.under_way[request_id][1] = 0
            else:
                peer.router.end(request_id)
                peer.router.end(request_id)
                peer.router.note_progress(request_id)
                del peer.under_way[request_id]
        assert list(peer.router.loads) == peer.loads()
    for request_id in peer.under_way:
        peer.router.end(request_id)
    assert not any(peer.router.loads)


@pytest.mark.parametrize("num_blocks", [0, 1000])
def test_every_replica_gets_its_share(num_blocks: int) -> None:
    router = Router(3, BLOCK_SIZE, num_blocks)
    counts = [0, 0, 0]
    for number in range(300):
        counts[router.route(str(number), prompt(number, 40))] += 1
        if number >= 30:
            router.end(str(number - 30))
    assert max(counts) - min(counts) <= 3


def test_idle_replicas_take_turns() -> None:
    router = Router(3, BLOCK_SIZE, 0)
    chosen = []
    for number in range(6):
        chosen.append(router.route(str(number), [1, 2, 3]))
        router.end(str(number))
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_prefix_is_worth_the_tokens_that_it_saves() -> None:
    """A shared beginning draws requests to one replica until the others would be quicker."""
    shared = prompt(0, 10 * SEQUENCE_TOKENS)
    router = Router(2, BLOCK_SIZE, 1000)
    chosen = []
    for number in range(30):
        chosen.append(router.route(str(number), shared + prompt(1 + number, 8)))
        router.note_progress(str(number))
    first = chosen[0]
    stay = chosen.index(1 - first)
    assert 9 <= stay <= 11
    # From there on both have it: the load alone decides.
    assert abs(router.loads[0] - router.loads[1]) <= SEQUENCE_TOKENS
    assert chosen[stay : stay + 8] == [1 - first] * 8


def test_other_salts_and_short_prompts_gain_nothing() -> None:
    router = Router(2, BLOCK_SIZE, 1000)
    tokens = prompt(0, 10 * BLOCK_SIZE)

    def route(tokens: list[int], salt: str | None) -> int:
        replica = router.route("r", tokens, 1, salt)
        router.end("r")
        return replica

    assert route(tokens, "a") == 0
    assert route(tokens, "b") == 1
    assert route(tokens, "a") == 0
    assert route(tokens, "a") == 0
    assert route(tokens, "b") == 1
    # The last token of a prompt is computed: of one block none is shared.
    one = prompt(1, BLOCK_SIZE)
    assert [route(one, None) for _ in range(3)] == [0, 1, 0]
    assert [route([*one, 1], None) for _ in range(3)] == [1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=30))
def test_what_is_remembered_is_bounded_and_has_no_holes(uses) -> None:
    seen = SeenBlocks(capacity=20)
    chains = [hash_blocks(prompt(chain, 200), BLOCK_SIZE, None) for chain in range(5)]
    for chain, length in uses:
        seen.add(chains[chain][:length])
        assert seen.num_found(chains[chain][:length]) == length
        assert len(seen._hashes) <= 20
        found = [seen.num_found(hashes) for hashes in chains]
        assert sum(found) == len(seen._hashes)


def test_a_prompt_larger_than_the_cache_leaves_its_beginning() -> None:
    seen = SeenBlocks(capacity=4)
    hashes = hash_blocks(prompt(0, 200), BLOCK_SIZE, None)
    seen.add(hashes)
    assert seen.num_found(hashes) == 4


def test_a_block_is_known_by_all_before_it() -> None:
    a, b = prompt(0, 2 * BLOCK_SIZE + 1), prompt(1, 2 * BLOCK_SIZE + 1)
    mixed = b[:BLOCK_SIZE] + a[BLOCK_SIZE:]
    hashes = [hash_blocks(tokens, BLOCK_SIZE, None) for tokens in (a, b, mixed)]
    assert [len(own) for own in hashes] == [2, 2, 2]
    assert hashes[2][0] == hashes[1][0]
    assert len({own[1] for own in hashes}) == 3


def share_found(num_replicas: int, by_prefix: bool) -> float:
    """Of the prompt tokens of 32 conversations, some 8 turns of 200 tokens behind one of four
    beginnings of 1000, 8 users at a time: the share found in replicas that together hold half of
    all tokens.
    """
    order = random.Random(1)
    capacity = 32 * 2600 // BLOCK_SIZE // 2 // num_replicas
    router = Router(num_replicas, BLOCK_SIZE, capacity if by_prefix else 0)
    caches = [SeenBlocks(capacity) for _ in range(num_replicas)]
    conversations = [prompt(number % 4, 1000) + prompt(1000 + number, 200) for number in range(32)]
    num_found = num_tokens = 0
    under_way: list[str] = []
    for turn in range(32 * 8):
        number = order.randrange(8) + turn // 64 * 8  # those of eight users at a time
        tokens = conversations[number]
        hashes = hash_blocks(tokens, BLOCK_SIZE, None)
        replica = router.route(str(turn), tokens)
        num_found += caches[replica].num_found(hashes) * BLOCK_SIZE
        num_tokens += len(tokens)
        caches[replica].add(hashes)
        tokens += prompt(5000 + turn, 200)
        under_way.append(str(turn))
        if len(under_way) > 8:
            router.end(under_way.pop(0))
    return num_found / num_tokens


def test_conversations_are_found_again() -> None:
    assert min(share_found(num_replicas, True) for num_replicas in (2, 4, 8)) > 0.82
    assert share_found(4, False) < 0.67
    assert share_found(8, False) < 0.42

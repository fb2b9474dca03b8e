"""A step arrives as it was sent, or not at all."""

from __future__ import annotations

import os
import random
import threading

import pytest
import torch

from nano_vllm.distributed.progress import Progress
from nano_vllm.distributed.step_channel import SharedMemoryChannel
from nano_vllm.runner.input_batch import StagedInput
from nano_vllm.runner.step_message import Pairs, Step, StepReceiver, StepSender
from nano_vllm.sampling.gathering import LIKELIEST, WHOLE

CAPACITY = 1 << 16


class Line:
    """A channel in one process, whose bytes a test can change on their way."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []

    def send(self, parts: list[torch.Tensor]) -> None:
        self.parts += [part.clone() for part in parts]

    def receive(self, part: torch.Tensor) -> None:
        part.copy_(self.parts.pop(0))

    def finish(self) -> None:
        pass


def draw_pairs(draw: random.Random) -> Pairs:
    return [(draw.getrandbits(40), draw.getrandbits(40)) for _ in range(draw.choice((0, 1, 9)))]


def draw_step(draw: random.Random) -> Step:
    numbers = [draw.randrange(1000) for _ in StagedInput._fields]
    fed = draw.choice((None, [], [draw.randrange(99) for _ in range(7)]))
    return Step(
        StagedInput(*numbers),
        draw.choice((LIKELIEST, WHOLE, 50)),
        *(draw_pairs(draw) for _ in range(4)),
        fed,
    )  # type: ignore[misc]


def staging_of(draw: random.Random) -> torch.Tensor:
    return torch.frombuffer(bytearray(draw.randbytes(1000)), dtype=torch.uint8)


def test_what_arrives_is_what_was_sent(seed: int) -> None:
    draw = random.Random(seed)
    line = Line()
    sender, receiver = StepSender(line), StepReceiver(line)
    for _ in range(50):
        step, staging = draw_step(draw), staging_of(draw)
        arrived = torch.zeros(1000, dtype=torch.uint8)
        sender.send(step, staging)
        assert receiver.receive(lambda _, arrived=arrived: arrived) == step
        num_bytes = step.staged.num_bytes
        assert torch.equal(arrived[:num_bytes], staging[:num_bytes])
        assert not arrived[num_bytes:].any()
    sender.stop()
    assert receiver.receive(lambda _: torch.empty(0, dtype=torch.uint8)) is None


@pytest.mark.parametrize("part", range(3))
def test_a_bit_that_changes_on_the_way_is_noticed(seed: int, part: int) -> None:
    draw = random.Random(seed)
    for _ in range(30):
        line = Line()
        step = draw_step(draw)
        step.block_copies = [(1, 2)]
        step.staged = step.staged._replace(num_bytes=700)
        StepSender(line).send(step, staging_of(draw))
        changed = line.parts[part].view(torch.uint8)
        # But for what says how many bytes there are, without which nothing can be received.
        place = draw.randrange(len(changed))
        if part == 0 and place // 8 in (4, 6):
            continue
        changed[place] ^= 1 << draw.randrange(8)
        with pytest.raises(RuntimeError, match=r"^(message 0 has checksum|expected message 0 )"):
            StepReceiver(line).receive(lambda _: torch.empty(1000, dtype=torch.uint8))


def test_a_message_that_is_left_out_is_noticed(seed: int) -> None:
    draw = random.Random(seed)
    line = Line()
    sender = StepSender(line)
    sender.send(draw_step(draw), staging_of(draw))
    line.parts.clear()
    sender.send(draw_step(draw), staging_of(draw))
    with pytest.raises(RuntimeError, match=r"expected message 0 of .*, got 1"):
        StepReceiver(line).receive(lambda _: torch.empty(1000, dtype=torch.uint8))


@pytest.mark.skipif(not SharedMemoryChannel.is_supported(), reason="Gloo is used here")
def test_shared_memory(seed: int) -> None:
    """No message is overwritten before all have taken it."""
    draw = random.Random(seed)
    fd = SharedMemoryChannel.create(CAPACITY, 3)
    channels = [SharedMemoryChannel(fd, rank, 3, Progress()) for rank in range(3)]
    os.close(fd)
    steps = [(draw_step(draw), staging_of(draw)) for _ in range(200)]
    found: list[list[tuple[Step, torch.Tensor]]] = [[], [], []]

    def follow(rank: int) -> None:
        receiver = StepReceiver(channels[rank])
        while True:
            arrived = torch.zeros(1000, dtype=torch.uint8)
            step = receiver.receive(lambda _, arrived=arrived: arrived)
            if step is None:
                return
            found[rank].append((step, arrived))

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    sender = StepSender(channels[0])
    for step, staging in steps:
        sender.send(step, staging)
    sender.stop()
    for thread in threads:
        thread.join(30)
    for rank in (1, 2):
        assert len(found[rank]) == len(steps)
        for (step, staging), (arrived_step, arrived) in zip(steps, found[rank], strict=True):
            assert arrived_step == step
            num_bytes = step.staged.num_bytes
            assert torch.equal(arrived[:num_bytes], staging[:num_bytes])

"""What GPUs send to each other in a step, and how long that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nano_vllm.distributed.all_reduce_way import Way, largest_call, way_of
from nano_vllm.distributed.partition import vocabulary_part
from nano_vllm.gpus import Links
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.sampling.gathering import LIKELIEST, MAX_CANDIDATES, WHOLE, bytes_of_row


@dataclass(frozen=True)
class Communication:
    """Collectives of one step, summed over the stages."""

    all_reduces: int
    """Of hidden states: one behind the embedding, two in each layer."""
    all_reduce_bytes: int
    """Of a token, in all of them, on each GPU that takes part."""
    sends: int
    """From stage to stage, by each GPU of a stage."""
    send_bytes: int
    """Of a token, in all of them."""
    greedy_bytes: int
    """Of a row that takes the likeliest token, to all ranks: each one's best and its logit."""
    top_k_bytes: int
    """Of a row with the largest top-k that is drawn from candidates, to the first rank."""
    logits_bytes: int
    """Of a row that is sampled otherwise, to the first rank: a GPU's part of the logits."""

    @classmethod
    def of(cls, setup: Setup, layout: Layout) -> Communication:
        row = setup.model.hidden_size * setup.itemsize
        sends = layout.pp - 1
        if layout.tp == 1:
            return cls(0, 0, sends, sends * row, 0, 0, 0)
        reduces = 2 * setup.model.num_layers + 1
        part = vocabulary_part(setup.model.vocab_size, layout.tp)
        greedy, top_k, whole = (
            bytes_of_row(way, part, setup.itemsize) for way in (LIKELIEST, MAX_CANDIDATES, WHOLE)
        )
        return cls(reduces, reduces * row, sends, sends * row, greedy, top_k, whole)


def all_reduce_seconds(links: Links, num_bytes: float, ranks: int, gpus_per_host: int) -> float:
    """In the way that the engine takes within a host; between hosts by NCCL, each GPU with those of
    its place on other hosts.

    Args:
        links: figures.
        num_bytes: of each rank's tensor.
        ranks: GPUs, those of a host next to each other.
        gpus_per_host: of each host.
    """
    if ranks == 1:
        return 0.0
    here = min(ranks, gpus_per_host)
    if ranks > here:
        ring = 2 * (here - 1) / here * num_bytes
        hosts = -(-ranks // here)
        across = 2 * (hosts - 1) / hosts * num_bytes / here
        return links.hosts_latency + ring / links.bus + across / links.network
    return seconds_within_a_host(links, num_bytes, ranks, way_of(num_bytes, ranks))


def seconds_within_a_host(links: Links, num_bytes: float, ranks: int, way: Way) -> float:
    """Of an all-reduce in a way, or by NCCL where GPUs cannot write each other's memory."""
    ring = 2 * (ranks - 1) / ranks * num_bytes
    if links.peer is None or way is Way.NCCL:
        return links.nccl_latency + ring / links.bus
    latency = links.one_shot_latency + links.one_shot_latency_per_gpu * ranks
    if way is Way.PLAIN:
        calls = max(1, math.ceil(num_bytes / largest_call(ranks)))
        return calls * (latency + links.plain_latency) + (ranks - 1) * num_bytes / links.plain
    if way is Way.ONE_SHOT:
        return latency + (ranks - 1) * num_bytes / links.peer
    return latency + links.two_shot_latency + ring / links.peer


def send_seconds(links: Links, num_bytes: float, to_other_host: bool) -> float:
    """From a GPU of a stage to that of the next."""
    if to_other_host:
        return links.network_latency + num_bytes / links.network
    return links.send_latency + num_bytes / links.send

"""A plan as people read it, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

from nano_vllm.gpus import GIB, Links
from nano_vllm.plan.communication import Communication
from nano_vllm.plan.fit import Fit
from nano_vllm.plan.setup import Layout, Setup
from nano_vllm.plan.simulate import Cluster, Simulation, batches
from nano_vllm.plan.step_time import IN_A_STEP, SUSTAINED_ATTENTION, SUSTAINED_PRODUCT

Row = dict[str, Any]
PROMPT_LENS = (512, 4096, 32768)


def heading(setup: Setup, context: int, num_seqs: int) -> str:
    """What the plan is of."""
    gpu, config = setup.gpu, setup.config
    share = f"{config.gpu_memory_utilization:.0%}"
    return (
        f"{config.model}, {setup.dtype}, KV cache {config.kv_cache_dtype}, blocks of "
        f"{config.block_size}; {gpu.name}, {share} of {gpu.memory / GIB:.1f} GiB; "
        f"{setup.max_num_batched_tokens} tokens a step, {config.max_num_seqs} sequences; room for "
        f"{num_seqs} x {context} tokens"
    )


def memory_rows(setup: Setup, fits: list[Fit]) -> list[Row]:
    """GiB of the GPU with least room for keys and values, and what fits into the rest."""
    rows = []
    for found in fits:
        stage = found.fullest
        rows.append(
            {
                "tp": found.layout.tp,
                "pp": found.layout.pp,
                "GPUs": found.layout.num_gpus,
                "layers": _runs([len(s.place.layers) for s in found.stages]),
                "weights": _gib(stage.weights),
                "activations": _gib(stage.activations),
                "graphs": _gib(stage.graphs),
                "other": _gib(stage.context + stage.fixed),
                "KV pool": _gib(max(0, stage.pool)),
                "KV B/token": stage.block_bytes // setup.config.block_size,
                "blocks": found.num_blocks,
                "tokens": found.num_tokens,
                "sequences": found.max_concurrency,
                "fits": "yes" if found.fits else f"{found.missing / GIB:.2f} GiB short",
            }
        )
    return rows


def communication_rows(setup: Setup, layouts: list[Layout]) -> list[Row]:
    """Collectives of a step and the bytes of a token in them."""
    rows = []
    for layout in layouts:
        moved = Communication.of(setup, layout)
        rows.append(
            {
                "tp": layout.tp,
                "pp": layout.pp,
                "all-reduces": moved.all_reduces,
                "KiB/token reduced": moved.all_reduce_bytes / 1024,
                "sends": moved.sends,
                "KiB/token sent": moved.send_bytes / 1024,
                "B/greedy row": moved.greedy_bytes,
                "KiB/top-k row": moved.top_k_bytes / 1024,
                "KiB/sampled row": moved.logits_bytes / 1024,
            }
        )
    return rows


def verdict(fits: list[Fit]) -> str:
    """The layout with fewest GPUs that fits, of these the one with most room; or by how much the
    best one does not.
    """
    good = [found for found in fits if found.fits]
    if good:
        cheapest = min(good, key=lambda f: (f.layout.num_gpus, -f.num_tokens))
        gpus = cheapest.layout.num_gpus
        return (
            f"cheapest that fits: {cheapest.layout}, {gpus} GPU{'s' * (gpus > 1)}, "
            f"{cheapest.num_tokens} tokens of KV cache"
        )
    nearest = min(fits, key=lambda f: f.missing)
    return f"none fits: {nearest.layout} is {nearest.missing / GIB:.2f} GiB a GPU short"


def fits_json(fits: list[Fit]) -> list[Row]:
    """All numbers, in bytes."""
    return [
        {
            "tp": found.layout.tp,
            "pp": found.layout.pp,
            "fits": found.fits,
            "missing": found.missing,
            "num_blocks": found.num_blocks,
            "num_tokens": found.num_tokens,
            "max_concurrency": found.max_concurrency,
            "stages": [
                {
                    "layers": [stage.place.layers.start, stage.place.layers.stop],
                    "weights": stage.weights,
                    "context": stage.context,
                    "fixed": stage.fixed,
                    "activations": stage.activations,
                    "graphs": stage.graphs,
                    "pool": stage.pool,
                    "block_bytes": stage.block_bytes,
                }
                for stage in found.stages
            ],
        }
        for found in fits
    ]


def communication_json(setup: Setup, layouts: list[Layout]) -> list[Row]:
    """As `communication_rows`, in bytes."""
    return [
        {"tp": layout.tp, "pp": layout.pp, **asdict(Communication.of(setup, layout))}
        for layout in layouts
    ]


def assumptions(setup: Setup) -> list[str]:
    """What a simulation stands on."""
    gpu, links = setup.gpu, setup.gpu.links
    source = "measured" if gpu.is_measured else "assumed, by data sheet"
    return [
        f"{gpu.name} ({source}): copy {gpu.copy / 1e12:.2f} TB/s, large product "
        f"{gpu.matmul / 1e12:.0f} TFLOP/s: prompts get {SUSTAINED_PRODUCT:.0%} of it in products "
        f"and {SUSTAINED_ATTENTION:.0%} in attention; kernels take {IN_A_STEP} times as long in a "
        "step of decodes as alone",
        f"links: {_describe(links)}",
        f"{setup.gpus_per_host} GPUs a host; between hosts {links.network / 1e9:.0f} GB/s a GPU, "
        f"{links.network_latency * 1e6:.0f} us a send, {links.hosts_latency * 1e6:.0f} us an "
        f"all-reduce; the host's work is hidden behind the step before",
    ]


def step_rows(simulation: Simulation, layouts: list[Layout]) -> list[Row]:
    """Milliseconds per output token by batch; nothing where a batch does not fit."""
    limits = {layout: simulation.max_batch(layout) for layout in layouts}
    sizes = batches(max(limits.values(), default=0))
    rows: list[Row] = []
    for layout, limit in limits.items():
        row: Row = {"tp": layout.tp, "pp": layout.pp}
        for size in sizes:
            fits = size <= limit
            row[str(size)] = simulation.decode(layout, size).seconds * 1e3 if fits else None
        widest = simulation.decode(layout, limit) if limit else None
        row["bubble"] = None if widest is None else f"{widest.bubble:.0%}"
        row["all-reduce"] = None if widest is None else f"{widest.collectives:.0%}"
        rows.append(row)
    return rows


def prefill_rows(simulation: Simulation, layouts: list[Layout]) -> list[Row]:
    """Prompt tokens per second by the length of prompts."""
    longest = simulation.setup.max_model_len
    lengths = [length for length in PROMPT_LENS if length < longest] or [longest]
    return [
        {"tp": layout.tp, "pp": layout.pp}
        | {
            str(length): round(simulation.prefill_tokens_per_second(layout, length))
            for length in lengths
        }
        for layout in layouts
        if simulation.max_batch(layout)
    ]


def cluster_row(num_gpus: int, best: Cluster | None, quickest: Cluster | None) -> Row:
    """The layout with most tokens per second, and the one that is quickest for one sequence."""
    row: Row = {"GPUs": num_gpus}
    row |= dict.fromkeys(
        ("tp", "pp", "dp", "batch", "ms/token", "tokens/s", "tokens/s/GPU", "bubble")
    )
    if best is not None:
        row["tp"], row["pp"], row["dp"] = best.decode.layout.tp, best.decode.layout.pp, best.dp
        row["batch"], row["ms/token"] = best.decode.batch, best.decode.seconds * 1e3
        row["tokens/s"] = round(best.tokens_per_second)
        row["tokens/s/GPU"] = round(best.tokens_per_second / num_gpus)
        row["bubble"] = f"{best.decode.bubble:.0%}"
    row["quickest"], row["its ms/token"] = None, None
    if quickest is not None:
        row["quickest"] = str(quickest.decode.layout)
        row["its ms/token"] = quickest.decode.seconds * 1e3
    return row


def _describe(links: Links) -> str:
    ways = [f"NCCL {links.nccl_latency * 1e6:.0f} us and {links.bus / 1e9:.0f} GB/s (bus)"]
    if links.peer is not None:
        ways = [
            f"one-shot {links.one_shot_latency * 1e6:.1f} us, "
            f"{links.one_shot_latency_per_gpu * 1e6:.2f} us a GPU and {links.peer / 1e9:.0f} GB/s",
            f"two-shot {links.two_shot_latency * 1e6:.1f} us more",
            f"plain {links.plain_latency * 1e6:.1f} us more and {links.plain / 1e9:.0f} GB/s",
            *ways,
        ]
    return (
        f"all-reduces ({links.source}): {'; '.join(ways)}; sends (assumed): "
        f"{links.send_latency * 1e6:.0f} us and {links.send / 1e9:.0f} GB/s"
    )


def _runs(numbers: list[int]) -> str:
    """2, 4, 4, 4, 2 as 2+3*4+2."""
    runs = [(value, len(list(same))) for value, same in groupby(numbers)]
    return "+".join(f"{count}*{value}" if count > 1 else str(value) for value, count in runs)


def _gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 2)

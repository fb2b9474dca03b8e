"""Times sampling beside torch's way of doing the same, with a sort for top-p."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nano_vllm import ops
from nano_vllm.bench.kernel_row import Setup
from nano_vllm.bench.timing import alternate, repeat_timer

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


def sampling_rows(setup: Setup) -> Iterator[dict[str, Any]]:
    """Of logits as a model gives them, most of them far below a few; hot, as a step leaves them.
    Bytes are those of the logits, read once. And of flat ones, of which top-p keeps most.
    """
    on_gpu = setup.device.type == "cuda"
    vocab_size = 151_936 if on_gpu else 49_152
    for num_rows in (1, 32, 128) if on_gpu else (1, 16):
        noise = torch.randn(num_rows, vocab_size, device=setup.device)
        flat = noise.to(setup.dtype)
        likely = torch.randint(vocab_size, (num_rows, 30), device=setup.device)
        peaked = (2.5 * noise - 14).scatter(1, likely, 2 * noise[:, :30]).to(setup.dtype)
        for name, settings in SETTINGS.items():
            yield _row(setup, f"{num_rows} rows, {name}", peaked, **settings)
        yield _row(setup, f"{num_rows} flat rows, top-p 0.9", flat, top_p=0.9)


def _row(
    setup: Setup,
    shape: str,
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: float = 0,
    top_p: float = 1.0,
) -> dict[str, Any]:
    num_rows = len(logits)

    def each(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=logits.device)

    ours = partial(
        ops.sample_tokens,
        each(0, torch.int64),
        logits,
        temperatures=each(temperature, torch.float64),
        top_k=each(top_k, torch.int32),
        top_p=each(top_p, torch.float64),
        min_p=each(-math.inf, torch.float64),
        seeds=torch.arange(num_rows, device=logits.device),
        streams=each(0, torch.int64),
        seq_lens=each(9, torch.int32),
        prompt_lens=each(5, torch.int32),
    )
    torchs = _torch_sampler(logits, temperature, int(top_k), top_p)
    device = setup.device
    seconds, peer = alternate([repeat_timer([ours], device), repeat_timer([torchs], device)])
    return setup.row(
        "sample_tokens",
        "-",
        shape,
        seconds,
        moved=logits.numel() * logits.itemsize,
        is_paged=False,
        peers={"torch": peer},
    )


def _torch_sampler(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> Callable[[], torch.Tensor]:
    def sample() -> torch.Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        if top_k == 0 and top_p == 1:
            return _draw(logits.float().div(temperature).softmax(-1))
        scaled = logits.float().div(temperature)
        ordered, token_ids = (
            scaled.topk(top_k, -1) if top_k else scaled.sort(dim=-1, descending=True)
        )
        weights = ordered.softmax(-1)
        before = weights.cumsum(-1) - weights
        chosen = _draw(weights.masked_fill(before >= top_p, 0))
        return token_ids.gather(-1, chosen.unsqueeze(-1))

    return sample


def _draw(weights: torch.Tensor) -> torch.Tensor:
    """As multinomial does it, without its check, which waits for the device."""
    return weights.div(torch.empty_like(weights).exponential_()).argmax(-1)

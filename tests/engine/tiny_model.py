"""An engine on a CPU with a random model, for what a runner without one cannot show."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from nano_vllm.engine.llm import LLM

BLOCK_SIZE = 8
VOCAB_SIZE = 199


def make_llm(path: Path, **options: Any) -> LLM:
    """Who is admitted may have to leave again, and host memory is used however long it takes."""
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "num_blocks": 64,
        "block_size": BLOCK_SIZE,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
    }
    llm = LLM(str(path), **(settings | options))
    llm.engine.scheduler.admission.horizon = 0
    llm.engine.scheduler.admission.host_block_seconds = None
    return llm


def draw_prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(length)]

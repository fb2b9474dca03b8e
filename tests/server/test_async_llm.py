"""The engine in a process of its own, asked without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nano_vllm import BeamSearchParams, SamplingParams
from nano_vllm.config import EngineConfig
from nano_vllm.engine.async_llm import AsyncLLM
from nano_vllm.engine.messages import RequestDelta

PROMPT = list(range(40))


def test_samples_and_searches_with_salts(tiny_model: Path) -> None:
    async def whole(
        llm: AsyncLLM, params: SamplingParams | BeamSearchParams, salt: str | None
    ) -> tuple[int, RequestDelta]:
        deltas = [delta async for delta in llm.generate(PROMPT, params, cache_salt=salt)]
        for later in deltas[1:]:
            deltas[0].absorb(later)
        return len(deltas), deltas[0]

    async def scenario() -> None:
        llm = AsyncLLM(EngineConfig(str(tiny_model), device="cpu", num_blocks=128))
        await llm.start()
        try:
            greedy = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
            num_deltas, sampled = await whole(llm, greedy, "a")
            assert num_deltas > 1
            beam = BeamSearchParams(beam_width=1, max_tokens=100, ignore_eos=True)
            num_deltas, searched = await whole(llm, beam, "a")
            assert num_deltas == 1
            assert searched.completions[0].token_ids == sampled.completions[0].token_ids
            assert (sampled.num_cached_tokens, searched.num_cached_tokens) == (0, 32)
            _, other = await whole(llm, beam, "b")
            assert other.num_cached_tokens == 0
            with pytest.raises(ValueError, match="cache_salt must be"):
                await whole(llm, beam, "")
            with pytest.raises(ValueError, match=r"priority must be .* got 2147483648"):
                await llm.submit([(PROMPT, greedy)], priority=2**31).next()
        finally:
            await llm.close()

    asyncio.run(scenario())

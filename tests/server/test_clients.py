"""The official client against the default model, in all its ways."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from nano_vllm.config import DEFAULT_MODEL
from tests.server.running_server import RunningServer

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(smollm2: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=smollm2.url + "/v1", api_key="none", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=DEFAULT_MODEL, messages=FRANCE, temperature=0, max_tokens=8, logprobs=True
    )
    assert "The capital of France is Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or []) == 8


def test_streaming_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=DEFAULT_MODEL,
        messages=FRANCE,
        temperature=0,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "The capital of France is Paris" in text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_legacy_completions(client: openai.OpenAI) -> None:
    body = {"model": DEFAULT_MODEL, "prompt": "1, 2, 3, 4,", "temperature": 0, "max_tokens": 6}
    answer = client.completions.create(**body, logprobs=2)
    assert " 5" in answer.choices[0].text
    assert answer.choices[0].logprobs is not None
    stream = client.completions.create(**body, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_the_async_client(smollm2: RunningServer) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=smollm2.url + "/v1", api_key="none") as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model=DEFAULT_MODEL, messages=FRANCE, temperature=0, max_tokens=8, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one() for _ in range(4)))

    texts = asyncio.run(talk())
    assert len(set(texts)) == 1
    assert "Paris" in texts[0]


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [DEFAULT_MODEL]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=FRANCE)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model=DEFAULT_MODEL, messages=FRANCE, response_format={"type": "json_object"}
        )
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model=DEFAULT_MODEL, prompt="a", max_tokens=5000)


def test_loglikelihoods_as_lm_eval_asks_for_them(client: openai.OpenAI) -> None:
    """Token ids in, echo, and the log-probability of each token of the prompt."""
    url = str(client.base_url).removesuffix("v1/")
    # Its tokenizer_backend=remote: no tokenizer of its own.
    info = httpx.get(url + "tokenizer_info").json()
    assert info == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokens = httpx.post(url + "tokenize", json={"prompt": "Paris is in France"}).json()["tokens"]
    answer = client.completions.create(
        model=DEFAULT_MODEL,
        prompt=tokens,
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.token_logprobs or []) == len(tokens) + 1
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert all(value is None or value <= 0 for value in logprobs.token_logprobs or [])


@pytest.mark.parametrize("number", range(3))
def test_the_curl_examples_of_the_readme(smollm2: RunningServer, number: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    readme = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text()
    examples = re.findall(r"^curl .*?'$", readme, re.M | re.S)
    assert len(examples) == 3
    command = examples[number].replace("http://127.0.0.1:8000", smollm2.url)
    result = subprocess.run(
        ["bash", "-c", command + " --fail"], capture_output=True, text=True, check=True
    )
    assert ("Paris", "[DONE]", '"tokens"')[number] in result.stdout

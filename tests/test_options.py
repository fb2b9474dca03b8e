"""What options of engine, server and sampling may be: anything else is one clear line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nano_vllm import BeamSearchParams, EngineConfig, SamplingParams
from nano_vllm.server.server_config import ServerConfig

HUGE = 10**400
"""Beyond what a float holds."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": HUGE}, r"temperature must be a finite number in \[0, 100\], got 1000"),
        ({"temperature": -HUGE}, "temperature must be a finite number"),
        ({"temperature": float("nan")}, "temperature must be a finite number .*, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number .*, got inf"),
        ({"top_p": True}, "top_p must be a finite number .*, got True"),
        ({"logit_bias": {5: HUGE}}, r"logit_bias\[5\] must be a finite number"),
        ({"logit_bias": [5]}, r"logit_bias must be a dict by token id, got \[5\]"),
        ({"stop": 5}, "stop must be a list, got 5"),
        ({"stop": {"a": 1}}, "stop must be a list, got {'a': 1}"),
        ({"bad_words": "abc"}, "bad_words must be a list, got 'abc'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
        ({"allowed_token_ids": "5"}, "allowed_token_ids must be a list, got '5'"),
        ({"ignore_eos": "false"}, "ignore_eos must be True or False, got 'false'"),
        ({"detokenize": None}, "detokenize must be True or False, got None"),
        ({"skip_special_tokens": 0}, "skip_special_tokens must be True or False, got 0"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output must be True or False"),
        ({"max_tokens": 2**63}, r"max_tokens must be below 2\^63, got 9223372036854775808"),
        ({"top_k": 2**63}, r"top_k must be below 2\^63, got 9223372036854775808"),
        ({"max_tokens": None, "min_tokens": 2**31}, r"min_tokens must be an integer in \[0, 21474"),
    ],
)
def test_sampling_params(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        SamplingParams(**options)
    assert "\n" not in str(error.value)


def test_lists_of_sampling_params_may_be_of_any_kind() -> None:
    params = SamplingParams(stop="a", stop_token_ids=(1,), allowed_token_ids={1, 2}, bad_words=[])  # type: ignore[arg-type]
    assert params.stop == ["a"]
    assert SamplingParams(max_tokens=2**63 - 1, top_k=2**63 - 1).max_tokens == 2**63 - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list, got 5"),
        ({"length_penalty": HUGE}, "length_penalty must be a finite number"),
    ],
)
def test_beam_search_params(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        BeamSearchParams(beam_width=2, max_tokens=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 5}, "model must be a string, got 5"),
        ({"model": None}, "model must be a string, got None"),
        ({"tokenizer": ["a"]}, r"tokenizer must be a string, got \['a'\]"),
        ({"record": 1}, "record must be a string, got 1"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"seed": 2**63}, r"seed must be an integer in \[-2\^63, 2\^63\), got 922"),
        ({"block_size": "16"}, "block_size must be an integer, got '16'"),
        ({"block_size": 16.0}, "block_size must be an integer, got 16.0"),
        ({"max_model_len": True}, "max_model_len must be an integer, got True"),
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1, got 0"),
        ({"num_blocks": 2**63}, "num_blocks must be at most 9223372036854775807, got 922"),
        ({"max_num_seqs": 10**9}, "max_num_seqs must be at most 65536, got 1000000000"),
        ({"max_num_batched_tokens": 10**9}, "max_num_batched_tokens must be at most 16777216, got"),
        ({"gpu_memory_utilization": "0.9"}, "gpu_memory_utilization must be a number, got '0.9'"),
        ({"itl_slo": "x"}, "itl_slo must be a number, got 'x'"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"enforce_eager": None}, "enforce_eager must be True or False, got None"),
    ],
)
def test_engine_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EngineConfig.from_options(options)


def test_paths_are_taken_as_such() -> None:
    config = EngineConfig(model=Path("a"), tokenizer=Path("b"), record=Path("c"))  # type: ignore[arg-type]
    assert (config.model, config.tokenizer, config.record) == ("a", "b", "c")


def test_server_options() -> None:
    with pytest.raises(ValueError, match=r"^port must be an integer, got '8000'"):
        ServerConfig(port="8000")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^access_log must be True or False, got 1"):
        ServerConfig(access_log=1)  # type: ignore[arg-type]

"""`python -m nano_vllm.check`: a table of differences, and whether logits agree."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nano_vllm.check import main
from nano_vllm.config import ModelConfig
from nano_vllm.config_fields import ConfigFields
from nano_vllm.models.granite import GraniteForCausalLM


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "GPT2LMHeadModel"])
def test_an_architecture(capsys: pytest.CaptureFixture[str], architecture: str) -> None:
    assert main([architecture]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{architecture}, 63 tokens in chunks of 13")
    assert re.findall(r"^layer (\d) ", out, re.M) == [str(i) for i in range(6)]
    assert "logits agree" in out


def test_a_folder_keeps_its_heads_and_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.5] * 48,
            "long_factor": [9.0] * 48,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path)]) == 0
    assert len(re.findall("^layer ", capsys.readouterr().out, re.M)) == 2


def test_a_mistake_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose multiplier of the residual stream is not what it should be."""
    read_config = GraniteForCausalLM.read_config

    def mistaken(config: ModelConfig, fields: ConfigFields) -> ModelConfig:
        return replace(read_config(config, fields), residual_multiplier=0.5)

    monkeypatch.setattr(GraniteForCausalLM, "read_config", mistaken)
    assert main(["GraniteForCausalLM"]) == 1
    out = capsys.readouterr().out
    assert "logits differ" in out
    first = re.search(r"^layer 0 +(\S+)", out, re.M)
    assert first is not None
    assert float(first[1]) > 0.1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("FooForCausalLM", "architecture 'FooForCausalLM' is not supported; supported: Llama"),
        (".", "config.json is missing"),
    ],
)
def test_what_cannot_be_checked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1

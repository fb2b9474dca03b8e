from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import TEXTS


def save(folder: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    """A folder with tokenizer.json and other files, whose names are given without .json."""
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_backend"])
def test_equals_transformers(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    backend = tokenizers.Tokenizer.from_str(request.getfixturevalue(kind).to_str())
    backend.enable_truncation(5)
    backend.enable_padding(length=64, pad_token="a")
    folder = save(tmp_path, backend, tokenizer_config={"eos_token": "a", "model_max_length": 9})
    tokenizer = Tokenizer.from_path(folder)
    expected = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="a"
    )
    expected.backend_tokenizer.no_truncation()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text, padding=False), text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == (expected.eos_token_id,)
    assert tokenizer.vocab_size == len(expected)


def test_special_tokens(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    folder = save(
        tmp_path,
        byte_level,
        special_tokens_map={"bos_token": "<|im_start|>", "eos_token": "overridden"},
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "[not there]"},
        generation_config={"eos_token_id": [5, byte_level.token_to_id("<|im_end|>")]},
        config={},
    )
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.bos_token_id == byte_level.token_to_id("<|im_start|>")
    assert tokenizer.eos_token_ids == (byte_level.token_to_id("<|im_end|>"), 5)
    assert tokenizer.vocab_size == byte_level.get_vocab_size()
    assert tokenizer.token_to_id("<think>") == byte_level.token_to_id("<think>")
    for none in (10**9, -1, 2**32, -(2**70)):
        assert tokenizer.id_to_piece(none) is None
        assert tokenizer.decode([none, *tokenizer.encode("Hi"), none]) == "Hi"


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("files", "jinja", "expected"),
    [
        ({"tokenizer_config": {"chat_template": "one"}}, None, "one"),
        ({"tokenizer_config": {"chat_template": "one"}}, "two", "two"),
        ({"chat_template": {"chat_template": "three"}}, None, "three"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [
                        {"name": ["a"], "template": "five"},
                        {"name": "default", "template": "four"},
                    ]
                }
            },
            None,
            "four",
        ),
    ],
)
def test_chat_template_places(
    tmp_path: Path,
    byte_level: tokenizers.Tokenizer,
    files: dict[str, Any],
    jinja: str | None,
    expected: str,
) -> None:
    folder = save(tmp_path, byte_level, **files)
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES).text == expected


def test_no_chat_template(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer.from_path(save(tmp_path, byte_level))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template: give it a plain prompt"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "[nowhere]"}}, r"lacks the eos_token '\[nowhere\]'"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token must be a token, got 3"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template must be a string"),
        ({"tokenizer_config": []}, "must hold a JSON object"),
        ({"generation_config": {"eos_token_id": "x"}}, "'eos_token_id' must be a token id"),
    ],
)
def test_invalid_files(
    tmp_path: Path, byte_level: tokenizers.Tokenizer, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_path(save(tmp_path, byte_level, **files))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{}", "[1", '{"model": {"type": "X"}}'])
def test_broken_tokenizer_json(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is (missing|not a valid tokenizer)"):
        Tokenizer.from_path(tmp_path)


def test_text_that_is_not_unicode(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer.from_path(save(tmp_path, byte_level))
    with pytest.raises(ValueError, match="lone surrogate at position 2"):
        tokenizer.encode("ab\ud800")


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, nano_vllm.tokenizer.hf_tokenizer, nano_vllm.tokenizer.gguf_tokenizer, "
        "nano_vllm.tokenizer.detokenizer; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr

"""Mistral's tekken.json: tiktoken's ranks with pattern and special tokens beside them.

Source: `Tekkenizer` of mistral-common.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nano_vllm.config_fields import ConfigFields
from nano_vllm.tokenizer.gguf_pre_tokenizer import PreTokenization
from nano_vllm.tokenizer.tiktoken_ranks import MAX_ID, build_byte_level
from nano_vllm.tokenizer.vocabulary import Vocabulary
from nano_vllm.weights.json_file import read_json_object

_SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)
"""Of files up to version 7, which do not list them."""
_BOS, _EOS = "<s>", "</s>"


def load_tekken(path: Path) -> Vocabulary:
    """ValueError names what is at fault."""
    values = read_json_object(path)
    config = values.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{path}: field 'config' must hold an object, got {config!r}")
    fields = ConfigFields(config, str(path))
    num_special = fields.integer("default_num_special_tokens")
    vocab_size = fields.integer("default_vocab_size", minimum=num_special + 1)
    if vocab_size > MAX_ID:
        raise fields.error("default_vocab_size", f"must be at most {MAX_ID}, got {vocab_size}")
    special = _special_tokens(path, values, num_special)
    ranks = _ranks(path, values, vocab_size - num_special)
    try:
        # The special tokens come first.
        backend = build_byte_level(
            {token: rank + num_special for token, rank in ranks.items()},
            PreTokenization((fields.string("pattern"),)),
            special,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    named = {"bos_token": _BOS, "eos_token": _EOS}
    lacking = [token for token in named.values() if token not in special]
    if lacking:
        raise ValueError(f"{path}: special_tokens must have {lacking[0]!r}")
    return Vocabulary(backend, named, adds_bos=True)


def _special_tokens(path: Path, values: Mapping[str, Any], count: int) -> dict[str, int]:
    """Ids of the listed ones and of those that fill up to `count`."""
    listed = values.get("special_tokens")
    if listed is None:
        listed = [{"rank": i, "token_str": token} for i, token in enumerate(_SPECIAL_TOKENS)]
    names = {}
    for entry in _entries(path, "special_tokens", listed):
        name = entry.get("token_str")
        if not isinstance(name, str) or not name or entry["rank"] >= count:
            raise ValueError(
                f"{path}: each of special_tokens must have a token_str and a rank below {count}, "
                f"got {entry!r}"
            )
        names[entry["rank"]] = name
    ids = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(count)}
    if len(ids) != count:
        raise ValueError(f"{path}: special_tokens must be different ones")
    return ids


def _ranks(path: Path, values: Mapping[str, Any], count: int) -> dict[bytes, int]:
    """The first `count` tokens; a file may hold more than its model has."""
    ranks = {}
    for entry in _entries(path, "vocab", values.get("vocab"))[:count]:
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}: each of vocab must have token_bytes in base64, got {entry!r}"
            ) from None
        ranks[token] = entry["rank"]
    if sorted(ranks.values()) != list(range(count)):
        raise ValueError(f"{path}: vocab must have the {count} ranks from 0 on, each once")
    return ranks


def _entries(path: Path, name: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and type(entry.get("rank")) is int and entry["rank"] >= 0
        for entry in entries
    ):
        raise ValueError(f"{path}: field {name!r} must be a list of objects with a rank")
    return entries

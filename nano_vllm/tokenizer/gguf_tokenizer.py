"""The tokenizer inside a GGUF file, built as a tokenizers.Tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from nano_vllm.config_fields import ConfigFields
from nano_vllm.tokenizer.added_tokens import match_whole, of_type, surround
from nano_vllm.tokenizer.chat_template import ChatTemplate
from nano_vllm.tokenizer.gguf_pre_tokenizer import PRE_TOKENIZATIONS
from nano_vllm.tokenizer.sentencepiece_backend import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Pieces,
    build_sentencepiece,
    byte_piece,
)
from nano_vllm.tokenizer.tokenizer import Tokenizer, unique_ids
from nano_vllm.weights.gguf_file import GGUFFile

_PREFIX = "tokenizer.ggml."
_NAMED_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_EOS_KEYS = ("eos", "eot", "eom")
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
"""What ends a turn where the file does not say, as with Gemma 3 and Phi-3; llama.cpp looks for the
same names."""
_NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's only special tokens that leave the white space behind them alone."""


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Byte-level BPE ("gpt2") or SentencePiece ("llama"); ValueError names what is at fault."""
    file = GGUFFile(path)
    fields = ConfigFields(file.metadata, str(path))
    kind = fields.string(f"{_PREFIX}model")
    tokens = _tokens(fields)
    token_types = _array(fields, "token_type", int, len(tokens)) or (NORMAL,) * len(tokens)
    ids = {
        key: _token_id(fields, key, len(tokens)) for key in (*_NAMED_TOKENS.values(), *_EOS_KEYS)
    }
    named = {name: tokens[i] for name, key in _NAMED_TOKENS.items() if (i := ids[key]) is not None}
    if kind == "gpt2":
        backend, adds_bos = _byte_level(fields, tokens)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(fields, tokens, token_types, ids["unknown"]), True
    else:
        raise ValueError(
            f"{path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama"
        )
    own = of_type(USER_DEFINED, tokens, token_types)
    special = dict.fromkeys([*of_type(CONTROL, tokens, token_types), *named.values()])
    # In the model's tokenizer.json, but in no field of GGUF.
    strips = kind == "llama" and fields.string("general.architecture", None) == "phi3"
    stripping = () if not strips else {*own, *special}.difference(_NOT_STRIPPING)
    match_whole(backend, own, special, stripping)
    adds_bos = fields.flag(f"{_PREFIX}add_bos_token", adds_bos)
    adds_eos = fields.flag(f"{_PREFIX}add_eos_token", False)
    bos, eos = named.get("bos_token"), named.get("eos_token")
    surround(backend, bos if adds_bos else None, eos if adds_eos else None)
    matched = {*own, *special}
    turn_ends = [tokens.index(t) for t in _TURN_ENDS if ids["eot"] is None and t in matched]
    template = fields.string("tokenizer.chat_template", None)
    return Tokenizer(
        backend,
        bos_token_id=ids["bos"],
        eos_token_ids=unique_ids(*(ids[key] for key in _EOS_KEYS), *turn_ends),
        chat_template=ChatTemplate(template, named, str(path)) if template else None,
        origin=str(path),
    )


def _byte_level(fields: ConfigFields, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The BPE, and whether it adds BOS by default."""
    # Files from before there was such a key have "default" in llama.cpp.
    pre = fields.string(f"{_PREFIX}pre", "default")
    if pre not in PRE_TOKENIZATIONS:
        supported = ", ".join(PRE_TOKENIZATIONS)
        raise ValueError(
            f"{fields.source}: pre-tokenizer {pre!r} is not supported; supported: {supported}"
        )
    pre_tokenization = PRE_TOKENIZATIONS[pre]
    merges = []
    for merge in _array(fields, "merges", str) or ():
        left, separator, right = merge.partition(" ")
        if not separator:
            raise fields.error(f"{_PREFIX}merges", f"must hold pairs, got {merge!r}")
        merges.append((left, right))
    backend = _bpe(fields, tokens, merges, ignore_merges=pre_tokenization.ignores_merges)
    if pre_tokenization.normalizes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenization.build()
    backend.decoder = decoders.ByteLevel()
    return backend, pre_tokenization.adds_bos


def _sentencepiece(
    fields: ConfigFields, tokens: list[str], token_types: Sequence[int], unknown_id: int | None
) -> tokenizers.Tokenizer:
    scores = _array(fields, "scores", float, len(tokens))
    if scores is None:
        raise ValueError(f"{fields.source}: field {_PREFIX + 'scores'!r} is missing")
    missing = {byte_piece(byte) for byte in range(256)}.difference(tokens)
    if missing:
        raise fields.error(
            f"{_PREFIX}tokens", f"must hold a token for every byte, lacks {min(missing)!r}"
        )
    pieces = Pieces(
        tokens,
        token_types,
        scores,
        unknown_id,
        is_unigram=False,
        prefixes=fields.flag(f"{_PREFIX}add_space_prefix", True),
        trims=fields.flag(f"{_PREFIX}remove_extra_whitespaces", False),
    )
    try:
        return build_sentencepiece(pieces)
    except ValueError as error:
        raise ValueError(f"{fields.source}: tokenizer: {error}") from None


def _bpe(
    fields: ConfigFields,
    tokens: list[str],
    merges: list[tuple[str, str]],
    **options: bool | str | None,
) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"{fields.source}: the tokenizer's merges are not valid: {error}"
        ) from None


def _tokens(fields: ConfigFields) -> list[str]:
    tokens = _array(fields, "tokens", str)
    if not tokens:
        raise ValueError(f"{fields.source}: field {_PREFIX + 'tokens'!r} is missing")
    # llama.cpp's name for a token without text
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise fields.error(f"{_PREFIX}tokens", f"must not repeat a token, got {twice!r} twice")
    return tokens


def _array(
    fields: ConfigFields, name: str, element: type, length: int | None = None
) -> Sequence[Any] | None:
    value = fields.raw(_PREFIX + name, None)
    if value is None:
        return None
    if (
        not isinstance(value, tuple | list)
        or not all(isinstance(v, element) for v in value)
        or length not in (None, len(value))
    ):
        count = "" if length is None else f"{length} of "
        raise fields.error(_PREFIX + name, f"must be an array of {count}type {element.__name__}")
    return value


def _token_id(fields: ConfigFields, name: str, num_tokens: int) -> int | None:
    return fields.integer(f"{_PREFIX}{name}_token_id", None, minimum=0, maximum=num_tokens - 1)

"""The tokenizer inside a GGUF file, built as a tokenizers.Tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from nano_vllm.config_fields import ConfigFields
from nano_vllm.tokenizer.chat_template import ChatTemplate
from nano_vllm.tokenizer.gguf_pre_tokenizer import PRE_TOKENIZATIONS
from nano_vllm.tokenizer.gguf_sentencepiece import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    build_sentencepiece,
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
        scores = _array(fields, "scores", float, len(tokens))
        unknown = named.get("unk_token")
        backend, adds_bos = build_sentencepiece(fields, tokens, token_types, scores, unknown), True
    else:
        raise ValueError(
            f"{path}: tokenizer model {kind!r} is not supported; supported: gpt2, llama"
        )
    # Tokens that are matched whole wherever their text appears.
    own = _of_type(USER_DEFINED, tokens, token_types)
    special = dict.fromkeys([*_of_type(CONTROL, tokens, token_types), *named.values()])
    # In the model's tokenizer.json, but in no field of GGUF.
    strips = kind == "llama" and fields.string("general.architecture", None) == "phi3"
    backend.add_tokens(_added([token for token in own if token not in special], strips))
    backend.add_special_tokens(_added(special, strips))
    bos = ids["bos"] if fields.flag(f"{_PREFIX}add_bos_token", adds_bos) else None
    eos = ids["eos"] if fields.flag(f"{_PREFIX}add_eos_token", False) else None
    backend.post_processor = _surround(tokens, bos, eos)
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
    token_id = fields.integer(f"{_PREFIX}{name}_token_id", None, minimum=0)
    if token_id is not None and token_id >= num_tokens:
        raise fields.error(
            f"{_PREFIX}{name}_token_id", f"must be below {num_tokens}, got {token_id}"
        )
    return token_id


def _of_type(wanted: int, tokens: list[str], token_types: Sequence[int]) -> list[str]:
    return [token for token, kind in zip(tokens, token_types, strict=True) if kind == wanted]


def _added(tokens: Iterable[str], strips: bool) -> list[AddedToken]:
    """Args: strips: whether they take the white space behind them along."""
    return [
        AddedToken(token, normalized=False, rstrip=strips and token not in _NOT_STRIPPING)
        for token in tokens
    ]


def _surround(tokens: list[str], bos: int | None, eos: int | None) -> processors.TemplateProcessing:
    before = [] if bos is None else [tokens[bos]]
    after = [] if eos is None else [tokens[eos]]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(tokens[i], i) for i in {bos, eos} if i is not None],
    )

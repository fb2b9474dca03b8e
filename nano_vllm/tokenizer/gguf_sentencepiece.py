"""SentencePiece's BPE, GGUF's "llama" vocabulary, in the terms of the tokenizers library.

SentencePiece and llama.cpp merge the two neighbours whose joint piece has the best score, the
leftmost on ties; tokenizers merges the pair that comes first in a list. A list of all ways to make
a piece, best score first, comes to the same, in whatever order the ways to make one piece are, but
for:

- pieces of equal scores, of which the list has one come first everywhere (as in transformers).
  Trained vocabularies have none; those that were put together from several may.
- a piece with a character that is not itself in the vocabulary: never made.
- unused pieces: made, as in llama.cpp; SentencePiece takes them apart again.
- control and byte tokens: never made, as in SentencePiece; llama.cpp makes them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from nano_vllm.config_fields import ConfigFields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""SentencePiece's kinds of token, which GGUF has for every vocabulary."""

_SPACE = "▁"


def build_sentencepiece(
    fields: ConfigFields,
    tokens: list[str],
    token_types: Sequence[int],
    scores: Sequence[float] | None,
    unknown: str | None,
) -> tokenizers.Tokenizer:
    """Without added tokens; ValueError if scores or byte tokens are missing or not usable.

    A space is put before the text and again behind each special token in it, as in llama.cpp and
    the tokenizer.json of Llama 2. Not where one stands behind the token already: templates like
    Mistral v0.3's write it out, and llama.cpp makes two of it.
    """
    if scores is None:
        raise ValueError(f"{fields.source}: field 'tokenizer.ggml.scores' is missing")
    if not all(map(math.isfinite, scores)):
        raise fields.error("tokenizer.ggml.scores", "must hold finite numbers")
    vocab = {token: i for i, token in enumerate(tokens)}
    missing = next((piece for piece in map(byte_piece, range(256)) if piece not in vocab), None)
    if missing is not None:
        raise fields.error(
            "tokenizer.ggml.tokens", f"must hold a token for every byte, lacks {missing!r}"
        )
    merges = merges_by_score(tokens, scores, token_types)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixes = fields.flag("tokenizer.ggml.add_space_prefix", True)
    trims = fields.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    backend.normalizer = _normalizer(prefixes, trims)
    if prefixes and not trims:
        backend.pre_tokenizer = _space_prefix()
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixes else steps)
    return backend


def merges_by_score(
    tokens: list[str], scores: Sequence[float], token_types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best score first.

    Equal scores: longest left part first, as in transformers' converter, from which most
    tokenizer.json files come.
    """
    ids = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, token_types, strict=True))
        if kind in (NORMAL, USER_DEFINED, UNUSED)
    }
    pairs = [
        (-scores[i], -cut, cut - len(token), token)
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs.sort(key=lambda pair: pair[:3])
    return [(token[:-minus_cut], token[-minus_cut:]) for _, minus_cut, _, token in pairs]


def byte_piece(byte: int) -> str:
    """How SentencePiece spells the token of a byte."""
    return f"<0x{byte:02X}>"


def _normalizer(prefixes: bool, trims: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if trims:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if prefixes:
            steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _space_prefix() -> pre_tokenizers.PreTokenizer:
    """For what is not trimmed and may begin with spaces."""
    # Metaspace puts its character where it does not stand already. No blank is left by now, so that
    # the first one always puts it before the text, and the second sees that it did.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False),
        ]
    )

"""SentencePiece's vocabularies in the terms of the tokenizers library.

BPE: SentencePiece and llama.cpp merge the two neighbours whose joint piece has the best score, the
leftmost on ties; tokenizers merges the pair that comes first in a list. A list of all ways to make
a piece, best score first, comes to the same, in whatever order the ways to make one piece are, but
for:

- pieces of equal scores, of which the list has one come first everywhere (as in transformers).
  Trained vocabularies have none; those that were put together from several may.
- a piece with a character that is not itself in the vocabulary: never made.
- unused pieces: made, as in llama.cpp; SentencePiece takes them apart again.
- control and byte tokens: never made, as in SentencePiece; llama.cpp makes them too.

Unigram is the same in both, but that tokenizers knows of no kinds of piece. What a text never
makes, a control token above all, is cut behind its first character where it stands in a text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from nano_vllm.tokenizer.vocabulary import check_lengths

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""SentencePiece's kinds of token, by its own numbers, which GGUF has for every vocabulary."""

_SPACE = "▁"


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece vocabulary, as a file has it."""

    tokens: list[str]
    """Different ones; a user-defined token has its spaces as such, others as "▁"."""
    token_types: Sequence[int]
    scores: Sequence[float]
    unknown_id: int | None
    is_unigram: bool
    """Else BPE."""
    prefixes: bool
    """Whether a space is put before a text."""
    trims: bool
    """Whether spaces around a text are dropped, and all but one in a row."""
    charsmap: bytes = b""
    """SentencePiece's compiled table of what characters are replaced by."""


def build_sentencepiece(pieces: Pieces) -> tokenizers.Tokenizer:
    """Without added tokens; ValueError, without the name of the file, if they are not usable.

    A space is put before the text and again behind each special token in it, as in llama.cpp and
    the tokenizer.json of Llama 2. Not where one stands behind the token already: templates like
    Mistral v0.3's write it out, and llama.cpp makes two of it.
    """
    if not all(map(math.isfinite, pieces.scores)):
        raise ValueError("scores must be finite numbers")
    check_lengths(pieces.tokens)
    vocab = {token: i for i, token in enumerate(pieces.tokens)}
    has_bytes = all(byte_piece(byte) in vocab for byte in range(256))
    try:
        model = _unigram(pieces, has_bytes) if pieces.is_unigram else _bpe(pieces, vocab, has_bytes)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = _normalizer(pieces)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"the vocabulary is not valid: {error}") from None
    steps = []
    if pieces.prefixes and not pieces.trims:
        steps += _space_prefix()
    if pieces.is_unigram:
        steps.append(_cut_names(pieces))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    joins = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strips = [decoders.Strip(" ", 1, 0)] if pieces.prefixes else []
    backend.decoder = decoders.Sequence([*joins, *strips])
    return backend


def _bpe(pieces: Pieces, vocab: dict[str, int], has_bytes: bool) -> models.BPE:
    merges = merges_by_score(pieces.tokens, pieces.scores, pieces.token_types)
    unknown = None if pieces.unknown_id is None else pieces.tokens[pieces.unknown_id]
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)


def _unigram(pieces: Pieces, has_bytes: bool) -> models.Unigram:
    scored = list(zip(pieces.tokens, pieces.scores, strict=True))
    return models.Unigram(scored, unk_id=pieces.unknown_id, byte_fallback=has_bytes)


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


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.trims:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if pieces.prefixes:
            steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _space_prefix() -> list[pre_tokenizers.PreTokenizer]:
    """For what is not trimmed and may begin with spaces."""
    # Metaspace puts its character where it does not stand already. No blank is left by now, so that
    # the first one always puts it before the text, and the second sees that it did.
    return [
        pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
        pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False),
    ]


def _cut_names(pieces: Pieces) -> pre_tokenizers.PreTokenizer:
    rests: dict[str, list[str]] = {}
    for token, kind in zip(pieces.tokens, pieces.token_types, strict=True):
        if kind not in (NORMAL, USER_DEFINED):
            rests.setdefault(re.escape(token[0]), []).append(re.escape(token[1:]))
    cuts = [f"(?<={first})(?={'|'.join(rest)})" for first, rest in rests.items()]
    return pre_tokenizers.Split(Regex("|".join(cuts) or "(?!)"), behavior="isolated")

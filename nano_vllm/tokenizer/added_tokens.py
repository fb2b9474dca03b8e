"""Tokens that are matched whole wherever their text appears, and those around a text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_ID = re.compile("[0-9]{1,8}")


def match_whole(
    backend: tokenizers.Tokenizer,
    own: Iterable[str],
    special: Collection[str],
    stripping: Collection[str] = (),
) -> None:
    """Have tokens of the vocabulary matched before anything is split.

    Args:
        backend: whose vocabulary has all of them.
        own: stay in the text when it is decoded.
        special: are left out of it where asked, and are plain text for untrusted input.
        stripping: those that take the white space behind them along.
    """

    def added(tokens: Iterable[str]) -> list[AddedToken]:
        return [AddedToken(t, normalized=False, rstrip=t in stripping) for t in tokens]

    backend.add_tokens(added(token for token in own if token not in special))
    backend.add_special_tokens(added(special))


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Have a token put before each text and one behind it, each if there is one."""
    before = [] if bos is None else [bos]
    after = [] if eos is None else [eos]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )


def added_tokens(config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Those of tokenizer_config.json, by id; ValueError if they are none."""
    entries = config.get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise ValueError(f"added_tokens_decoder must be an object, got {entries!r}")
    tokens = {}
    for token_id, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not _ID.fullmatch(token_id):
            raise ValueError(
                f"added_tokens_decoder must map ids to tokens, got {token_id!r}: {entry!r}"
            )
        flags = {name: entry.get(name) is True for name in _FLAGS}
        tokens[int(token_id)] = AddedToken(content, **flags)
    return tokens


def of_type(wanted: int, tokens: Sequence[str], token_types: Sequence[int]) -> list[str]:
    """The tokens of one of SentencePiece's kinds."""
    return [token for token, kind in zip(tokens, token_types, strict=True) if kind == wanted]

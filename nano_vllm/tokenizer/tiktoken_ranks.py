"""tiktoken's byte-level BPE in the terms of the tokenizers library.

tiktoken merges the two neighbours whose joint bytes have the lowest rank, the leftmost on ties;
tokenizers merges the pair that comes first in a list. A list of all ways to make a token, by the
token's rank, comes to the same where tokens rank behind those they are made of, as training has it:
then what stands inside a token just before it is made is always the same pair.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from nano_vllm.config_fields import ConfigFields
from nano_vllm.tokenizer.added_tokens import added_tokens, match_whole
from nano_vllm.tokenizer.detokenizer import byte_level_alphabet
from nano_vllm.tokenizer.gguf_pre_tokenizer import PRE_TOKENIZATIONS, PreTokenization
from nano_vllm.tokenizer.vocabulary import Vocabulary, check_lengths
from nano_vllm.weights.json_file import check_size

MAX_ID = (1 << 24) - 1


@dataclass(frozen=True)
class _Family:
    """What a tokenizer class of the hub has in its code, which is never run."""

    pre_tokenization: PreTokenization
    special_tokens: tuple[str, ...]
    """With the ids behind the ranks, where the checkpoint lists none; the first ends a text."""


_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_FAMILIES = {
    "QWenTokenizer": _Family(
        PRE_TOKENIZATIONS["qwen2"], (*_QWEN_SPECIAL, *(f"<|extra_{i}|>" for i in range(205)))
    )
}


def load_tiktoken(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    """A file of ranks. It holds neither pattern nor special tokens, which tokenizer_config.json,
    `config`, must tell: `pat_str` and added_tokens_decoder; or a tokenizer_class that is known.
    """
    ranks = read_ranks(path)
    fields = ConfigFields(config, str(path.parent / "tokenizer_config.json"))
    pattern = fields.string("pat_str", None)
    family = _FAMILIES.get(fields.string("tokenizer_class", ""))
    if pattern is None and family is None:
        raise fields.error(
            "pat_str",
            f"must be the regular expression that {path.name} was made with, or tokenizer_class "
            f"one of {', '.join(_FAMILIES)}",
        )
    if pattern is not None or family is None:
        pre_tokenization = PreTokenization((pattern,))
    else:
        pre_tokenization = family.pre_tokenization
    added = added_tokens(config)
    special = {token.content: i for i, token in added.items() if token.special}
    named = {}
    if family is not None and not added:
        special = {token: i for i, token in enumerate(family.special_tokens, len(ranks))}
        named = {"eos_token": family.special_tokens[0]}
    own = {token.content: i for i, token in added.items() if not token.special}
    try:
        return Vocabulary(build_byte_level(ranks, pre_tokenization, special, own), named)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of a token -> its rank, from lines of both, the former in base64."""
    check_size(path)
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                encoded, rank = line.split()
                token = base64.b64decode(encoded, validate=True)
                value = int(rank)
            except ValueError:  # of base64 too
                start = line[:40].decode(errors="replace").strip()
                raise ValueError(
                    f"{path} line {number} must hold a token in base64 and its rank, got {start!r}"
                ) from None
            if ranks.setdefault(token, value) != value:
                raise ValueError(
                    f"{path} line {number} gives a token the rank {value}, it has {ranks[token]}"
                )
    return ranks


def build_byte_level(
    ranks: Mapping[bytes, int],
    pre_tokenization: PreTokenization,
    special: Mapping[str, int],
    own: Mapping[str, int] = MappingProxyType({}),
) -> tokenizers.Tokenizer:
    """ValueError, without the file's name, if it cannot be.

    Args:
        ranks: of the tokens that text is made of, which are their ids.
        pre_tokenization: the pieces within which tokens are merged.
        special: ids of tokens that text never makes.
        own: ids of tokens that are matched whole and are text.
    """
    _check_ranks(ranks)
    alphabet = byte_level_alphabet()
    spelled = {token: "".join(map(alphabet.__getitem__, token)) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    for name, token_id in {**own, **special}.items():
        if name in vocab:
            raise ValueError(f"the added token {name!r} is an ordinary one, {vocab[name]}, too")
        vocab[name] = token_id
    ids = set(vocab.values())
    if min(ids) < 0 or max(ids) > MAX_ID:
        raise ValueError(f"ids must lie in [0, {MAX_ID}], got {min(ids)} to {max(ids)}")
    if len(ids) != len(vocab):
        raise ValueError("several tokens have the same id")
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    try:
        # A piece that is a token itself is not merged up from bytes.
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
        backend.pre_tokenizer = pre_tokenization.build()
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"the vocabulary is not valid: {error}") from None
    if pre_tokenization.normalizes:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    match_whole(backend, own, special)
    return backend


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise ValueError(f"a token for every byte is needed, that of 0x{missing:02X} is missing")
    check_lengths(ranks)

"""Token ids -> text, one token at a time."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nano_vllm.tokenizer.tokenizer import Tokenizer

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_MAX_CHARACTER_TOKENS = 4
"""A character has no more bytes."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of a growing token sequence, as pieces that never change once they are given out.

    What `push` and `flush` return, concatenated, is `tokenizer.decode` of all the tokens at once. A
    character whose bytes come from several tokens is held back until it is whole, or known never to
    be. The cost of a token does not depend on how many came before.

    Args:
        tokenizer: whose tokens they are.
        skip_special_tokens: whether special tokens give no text.
        begins_text: False where the tokens go on from others: then a first space that
            SentencePiece's decoding takes from the beginning of a text stays.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, begins_text: bool = True
    ) -> None:
        self._id_to_piece = tokenizer.id_to_piece
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._stream = _make_stream(tokenizer, begins_text)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often "", never part of a character."""
        if token_id in self._skipped:
            return ""
        piece = self._id_to_piece(token_id)
        return "" if piece is None else self._stream.push(token_id, piece)

    def flush(self) -> str:
        """What is still held back; the sequence ends here."""
        return self._stream.flush()


class _Stream(Protocol):
    def push(self, token_id: int, piece: str) -> str: ...

    def flush(self) -> str: ...


class _ByteLevelStream:
    """Byte-level BPE: each character of a piece stands for a byte, except in added tokens."""

    def __init__(self) -> None:
        self._byte_of = {char: byte for byte, char in enumerate(byte_level_alphabet())}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, piece: str) -> str:
        try:
            data = bytes(map(self._byte_of.__getitem__, piece))
        except KeyError:
            data = piece.encode()
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePieceStream:
    """SentencePiece with byte fallback.

    A run of byte pieces is one unit: if it is not valid UTF-8 as a whole, each of its bytes becomes
    a replacement character (as in tokenizers' ByteFallback), so it is held back until it ends.
    """

    def __init__(self, strips_first_space: bool) -> None:
        self._strip = strips_first_space
        self._run = bytearray()

    def push(self, token_id: int, piece: str) -> str:
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte is not None:
            self._run.append(int(byte[1], 16))
            return ""
        return self._end_run() + self._stripped(piece.replace("▁", " "))

    def flush(self) -> str:
        return self._end_run()

    def _end_run(self) -> str:
        try:
            text = self._run.decode()
        except UnicodeDecodeError:
            text = _REPLACEMENT * len(self._run)
        self._run.clear()
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _WindowStream:
    """Any other decoder: decode the last few tokens with and without the new one and give out the
    difference.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_given = 0
        """Tokens of the window whose text was given out."""

    def push(self, token_id: int, piece: str) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_whole = not text.endswith(_REPLACEMENT)
        if is_whole or len(self._window) - self._num_given > _MAX_CHARACTER_TOKENS:
            return self._give(text)
        return ""

    def flush(self) -> str:
        return self._give(self._decode(self._window))

    def _give(self, text: str) -> str:
        given = self._decode(self._window[: self._num_given])
        if len(text) <= len(given):
            return ""
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        return text[len(given) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _make_stream(tokenizer: Tokenizer, begins_text: bool) -> _Stream:
    decoder = json.loads(tokenizer.decoder_json)
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    kinds = [step and step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevelStream()
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == spaces:
        if len(steps) == 3:
            return _SentencePieceStream(strips_first_space=False)
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return _SentencePieceStream(strips_first_space=begins_text)
    return _WindowStream(tokenizer)


def byte_level_alphabet() -> list[str]:
    """The character that stands for each byte in GPT-2's byte-level BPE.

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for U+0100
    onwards.
    """
    alphabet = []
    next_char = 256
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(next_char))
            next_char += 1
    return alphabet

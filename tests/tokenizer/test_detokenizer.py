from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from nano_vllm.tokenizer.detokenizer import Detokenizer, byte_level_alphabet
from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import TEXTS

REPLACEMENT = "\ufffd"


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.fixture(params=["byte_level", "sentencepiece_backend", "no_strip", "window", "words"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "words":
        words = {"a": 0, "b": 1, "</s>": 2}
        backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="b"))
        return Tokenizer(backend)
    name = "sentencepiece_backend" if request.param == "no_strip" else request.param
    name = "byte_level" if name == "window" else name
    backend = tokenizers.Tokenizer.from_str(request.getfixturevalue(name).to_str())
    if request.param == "no_strip":
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    if request.param == "window":  # the same in a form that is not recognized
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return Tokenizer(backend)


@pytest.mark.parametrize("skip", [True, False])
def test_pieces_add_up(tokenizer: Tokenizer, skip: bool) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip), text


def test_any_tokens_add_up(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    """Also sequences that are not valid UTF-8, and ids outside the vocabulary."""
    if "window" in request.node.name:
        pytest.skip("in a sequence of invalid bytes only the recognized decoders are exact")
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip), ids


def test_no_piece_ends_within_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        if REPLACEMENT not in text:
            pieces = stream(tokenizer, tokenizer.encode(text))
            assert not any(REPLACEMENT in piece for piece in pieces), text


def test_flush_tells_of_an_unfinished_character(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level)
    alphabet = byte_level_alphabet()
    ids = [byte_level.token_to_id(alphabet[byte]) for byte in "👍".encode()]
    assert stream(tokenizer, ids) == ["", "", "", "👍", ""]
    assert stream(tokenizer, ids[:3]) == ["", "", "", REPLACEMENT]
    assert stream(tokenizer, [*ids[:3], byte_level.token_to_id("a")])[3] == f"{REPLACEMENT}a"


@given(st.binary(max_size=20))
def test_bytes_decode_as_in_one_go(data: bytes) -> None:
    """Python's incremental decoder and the tokenizers library replace the same invalid parts."""
    alphabet = byte_level_alphabet()
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    assert "".join(stream(tokenizer, list(data))) == tokenizer.decode(list(data))


def test_alphabet() -> None:
    assert sorted(byte_level_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    encoded = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in (0x00, 0x20, 0x41, 0x7F):
        ((piece, _),) = encoded.pre_tokenize_str(chr(byte))
        assert piece == byte_level_alphabet()[byte]


def test_the_replacement_character_itself_is_not_held_back() -> None:
    """Models repeat it without end; the window must not grow with them."""
    words = {"a": 0, REPLACEMENT: 1, "▁b": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    ids = [0, *[1] * 40, 2, 1, 2]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    given = 0
    for count, piece in enumerate(pieces[:-1], 1):
        given += len(piece)
        assert given >= count - 5


def test_special_tokens_do_not_break_characters(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(byte_level)
    alphabet = byte_level_alphabet()
    first, second = (byte_level.token_to_id(alphabet[byte]) for byte in "é".encode())
    end = byte_level.token_to_id("<|im_end|>")
    assert stream(tokenizer, [first, end, second]) == ["", "", "é", ""]
    assert "".join(stream(tokenizer, [first, end, second], False)) == (
        f"{REPLACEMENT}<|im_end|>{REPLACEMENT}"
    )


def test_tokens_that_go_on_from_others(
    tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    """A prompt's text and that of what comes behind it are the text of all."""
    if "words" in request.node.name:
        pytest.skip("its decoder puts a space between tokens")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        # Where the first part ends within a character, its text is not the beginning of the whole.
        for cut in (c for c in range(1, len(ids)) if REPLACEMENT not in tokenizer.decode(ids[:c])):
            detokenizer = Detokenizer(tokenizer, begins_text=False)
            rest = "".join([*map(detokenizer.push, ids[cut:]), detokenizer.flush()])
            if tokenizer.special_token_ids.issuperset(ids[:cut]):
                rest = rest.removeprefix(" ")
            assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids), (text, cut)


def test_the_text_of_one_token(sentencepiece_backend: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(sentencepiece_backend)
    pieces = ["▁ab", "▁", "a", "日", "<0x20>", "<0x41>", "<0xFF>", "</s>"]
    texts = [tokenizer.token_text(sentencepiece_backend.token_to_id(piece)) for piece in pieces]
    assert texts == [" ab", " ", "a", "日", " ", "A", REPLACEMENT, "</s>"]
    assert tokenizer.token_text(10**6) == ""

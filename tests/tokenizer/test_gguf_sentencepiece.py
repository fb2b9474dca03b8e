from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from nano_vllm.tokenizer.detokenizer import Detokenizer
from nano_vllm.tokenizer.sentencepiece_backend import byte_piece
from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import TEXTS, token_type, train_sentencepiece

Write = Callable[..., Path]

OWN = ("<think>", "<|x|>", "\n\n")
RUNS = ("▁▁", "▁▁▁")  # Gemma's runs of spaces, matched before anything is merged
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "digits": {"split_digits": False},
    "gemma": {"prefix": False, "own": (*OWN, *RUNS)},
    "trims": {"trims": True},
    "trims, no prefix": {"trims": True, "prefix": False, "split_digits": False},
}
CHUNKS = [
    *(
        " ",
        "  ",
        "   ",
        "▁",
        "▁▁",
        "\n",
        "\n\n",
        "\n\n\n",
        "\t",
        "\x00",
        "\ufeff",
        "\u00a0",
        "\u200b",
    ),
    *("<s>", "</s>", "<unk>", "<0x41>", "<0x", "<think>", "<|x|>", "<thi", "⁇", "\ufffd"),
    *(
        "the",
        "ka",
        "lo",
        "ing",
        "aaaa",
        "ababab",
        "日本",
        "日",
        "한",
        "ü",
        "ß",
        "да",
        "é",
        "e\u0301",
    ),
    *("1", "22", "123456", "٣", "½", "👍🏽", "👩‍👩‍👧", "\U0010ffff", "H", "Hello, world!"),
]
texts = st.one_of(
    st.lists(st.sampled_from(CHUNKS), max_size=12).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text(" ▁\nab", max_size=20),
)
Pair = tuple[Tokenizer, sentencepiece.SentencePieceProcessor]


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, write_sentencepiece: Write) -> Pair:
    """A tokenizer from a GGUF file, and the model it was written from."""
    variant = VARIANTS[request.param]
    model = train_sentencepiece(**variant)
    path = write_sentencepiece(
        model,
        variant.get("own", ()),
        add_space_prefix=variant.get("prefix", True),
        remove_extra_whitespaces=variant.get("trims", False),
    )
    return Tokenizer.from_path(path), model


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
def test_equals_sentencepiece(pair: Pair, text: str) -> None:
    tokenizer, model = pair
    if tokenizer.token_to_id("  ") is not None:
        text = text.replace("▁", " ")  # which would make SentencePiece's runs, and not llama.cpp's
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == model.encode(text)
    decoded = tokenizer.decode(ids)
    if "▁" not in text:  # which trimming takes for text, and SentencePiece's decode for spaces
        assert decoded == model.decode(ids)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == decoded
    # Never part of a character.
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_long_texts_equal_sentencepiece(pair: Pair) -> None:
    tokenizer, model = pair
    rng = random.Random(0)
    for _ in range(20):
        text = "".join(rng.choices(CHUNKS, k=400)).replace("▁", " ")
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == model.encode(text)
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


class LlamaCpp:
    """llama.cpp's tokenizer of such vocabularies, as src/llama-vocab.cpp has it, but for spaces
    behind special tokens, where a second one is not put.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        matched: Sequence[str] = (),
        prefix: bool = True,
    ) -> None:
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.scores = dict(zip(tokens, scores, strict=True))
        matched = sorted(matched, key=len, reverse=True)
        self.matched = re.compile("|".join(map(re.escape, matched)) or "(?!)")
        self.prefix = " " if prefix else ""

    def encode(self, text: str) -> list[int]:
        ids, end = [], 0
        for match in self.matched.finditer(text):
            ids += [*self.fragment(text, end, match.start()), self.ids[match[0]]]
            end = match.end()
        return ids + self.fragment(text, end, len(text))

    def fragment(self, text: str, start: int, end: int) -> list[int]:
        has_space = start > 0 and text[start:end].startswith((" ", "▁"))
        prefix = "" if start == end or has_space else self.prefix
        return self.merge(prefix + text[start:end])

    def merge(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            joint = [a + b for a, b in itertools.pairwise(symbols)]
            places = [i for i, piece in enumerate(joint) if piece in self.scores]
            if not places:
                return [i for symbol in symbols for i in self.symbol(symbol)]
            best = max(places, key=lambda i: (self.scores[joint[i]], -i))
            symbols[best : best + 2] = [joint[best]]

    def symbol(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[byte_piece(byte)] for byte in symbol.encode()]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
@pytest.mark.parametrize("prefix", [True, False])
def test_special_tokens_in_text_as_in_llama_cpp(
    write_sentencepiece: Write, prefix: bool, text: str
) -> None:
    model = train_sentencepiece(own=OWN)
    tokenizer = Tokenizer.from_path(write_sentencepiece(model, OWN, add_space_prefix=prefix))
    ids = range(model.get_piece_size())
    tokens, scores = [model.id_to_piece(i) for i in ids], [model.get_score(i) for i in ids]
    matched = [token for i, token in enumerate(tokens) if token_type(model, i, OWN) in (2, 3, 4)]
    expected = LlamaCpp(tokens, scores, matched, prefix)
    assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text)
    assert tokenizer.encode(text) == [1, *expected.encode(text)]


vocabularies = st.lists(st.text("ab▁", min_size=2, max_size=7), unique=True, max_size=20)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=vocabularies, text=st.text("ab ", max_size=30), order=st.randoms(use_true_random=False)
)
def test_any_vocabulary_as_in_llama_cpp(
    write_vocabulary: Write, pieces: list[str], text: str, order: random.Random
) -> None:
    """Also those that training does not give: pieces that can be made in several ways."""
    tokens = [*map(byte_piece, range(256)), "▁", "a", "b", *pieces]
    scores = [float(-i) for i in range(len(tokens))]
    order.shuffle(scores)
    types = [6] * 256 + [1] * (len(tokens) - 256)
    path = write_vocabulary("llama", tokens, token_types=types, scores=scores)
    tokenizer = Tokenizer.from_path(path)
    assert tokenizer.encode(text) == LlamaCpp(tokens, scores).encode(text)


def test_equal_scores_as_in_transformers(
    write_sentencepiece: Write, write_vocabulary: Write
) -> None:
    model = train_sentencepiece()
    ids = range(model.get_piece_size())
    path = write_vocabulary(
        "llama",
        [model.id_to_piece(i) for i in ids],
        token_types=[token_type(model, i) for i in ids],
        scores=[model.get_score(i) // 8 for i in ids],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    tokenizer = Tokenizer.from_path(path)
    expected = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = expected.backend_tokenizer
    backend.pre_tokenizer = None  # which puts no second space before a leading one
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rng = random.Random(0)
    for text in [*TEXTS, *("".join(rng.choices(CHUNKS, k=50)) for _ in range(50))]:
        text = text.replace("<", "(")  # special tokens have a test of their own
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text), text
        assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == (2,)


def test_a_space_comes_before_each_text_behind_a_special_token(write_sentencepiece: Write) -> None:
    """As Llama 2's chat template wants it: <s>[INST] is <s>, ▁[, INST, ].

    Mistral v0.3's template writes the space out.
    """
    tokenizer = Tokenizer.from_path(write_sentencepiece(train_sentencepiece()))
    ids = tokenizer.encode("<s>the</s><s> the", add_special_tokens=False)
    assert [tokenizer.id_to_piece(i) for i in ids] == ["<s>", "▁the", "</s>", "<s>", "▁the"]
    untrusted = tokenizer.encode("</s>", add_special_tokens=False, parse_special=False)
    assert 2 not in untrusted
    assert tokenizer.decode(untrusted) == "</s>"


PHI3 = ("<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>")


@pytest.mark.parametrize("eos", ["</s>", "<|end|>"])
def test_special_tokens_of_phi3_take_white_space_along(
    write_sentencepiece: Write, eos: str
) -> None:
    model = train_sentencepiece(own=PHI3)
    eos_id = model.piece_to_id(eos)
    text = "<|user|>\n the <|end|>\n<|assistant|> \t\n"

    def pieces(architecture: str, text: str) -> list[str | None]:
        path = write_sentencepiece(model, PHI3, architecture=architecture, eos_token_id=eos_id)
        tokenizer = Tokenizer.from_path(path)
        assert tokenizer.eos_token_ids == ((eos_id,) if eos == "<|end|>" else (eos_id, 4))
        return [tokenizer.id_to_piece(i) for i in tokenizer.encode(text)[1:]]

    assert pieces("phi3", text) == ["<|user|>", "▁the", "▁", "<|end|>", "<|assistant|>"]
    assert pieces("phi3", "<s>\n<|endoftext|>\n") == ["<s>", "▁", "\n", "<|endoftext|>", "▁", "\n"]
    assert pieces("llama", "<|user|>\n") == ["<|user|>", "▁", "\n"]


def test_what_ends_a_turn_is_known_by_its_name(write_sentencepiece: Write) -> None:
    own = ("<end_of_turn>", "<|x|>")
    model = train_sentencepiece(own=own)
    turn = model.piece_to_id("<end_of_turn>")
    # Gemma 3's files name <eos> alone.
    assert Tokenizer.from_path(write_sentencepiece(model, own)).eos_token_ids == (2, turn)
    path = write_sentencepiece(model, own, eot_token_id=turn + 1)
    assert Tokenizer.from_path(path).eos_token_ids == (2, turn + 1)
    # A piece like others is text.
    assert Tokenizer.from_path(write_sentencepiece(model)).eos_token_ids == (2,)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_begin_and_end_tokens(
    write_sentencepiece: Write, bos: bool | None, eos: bool | None
) -> None:
    flags = {"add_bos_token": bos, "add_eos_token": eos}
    flags = {name: flag for name, flag in flags.items() if flag is not None}
    tokenizer = Tokenizer.from_path(write_sentencepiece(train_sentencepiece(), **flags))
    inner = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [*[1] * (bos is not False), *inner, *[2] * (eos is True)]


def test_chat_template_knows_the_named_tokens(write_sentencepiece: Write) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}"
    path = write_sentencepiece(train_sentencepiece(), chat_template=template)
    prompt = Tokenizer.from_path(path).apply_chat_template([{"role": "user", "content": "x"}]).text
    assert prompt == "<s>x</s><unk>"


BYTES = [byte_piece(byte) for byte in range(256)]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (["a"], {}, "'tokenizer.ggml.scores' is missing"),
        (["a"], {"scores": [0.0, 1.0]}, "must be an array of 1 of type float"),
        (BYTES, {"scores": [math.nan] * 256}, "scores must be finite numbers"),
        (["a"], {"scores": [0.0]}, "must hold a token for every byte, lacks '<0x00>'"),
        (BYTES[:255], {"scores": [0.0] * 255}, "a token for every byte, lacks '<0xFF>'"),
        (BYTES, {"scores": [0.0] * 256, "unknown_token_id": 256}, "must be at most 255, got 256"),
        (BYTES, {"scores": [0.0] * 256, "padding_token_id": 2**32 - 1}, "must be at most 255, got"),
        (BYTES, {"scores": [0.0] * 256, "token_types": [6]}, "must be an array of 256 of type int"),
    ],
)
def test_invalid(write_vocabulary: Write, tokens: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_path(write_vocabulary("llama", tokens, **options))
    assert "vocabulary.gguf" in str(error.value)
    assert "\n" not in str(error.value)

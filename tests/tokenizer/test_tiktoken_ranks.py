"""tiktoken's files beside tiktoken itself, and Mistral's own beside tiktoken and SentencePiece."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nano_vllm.tokenizer.detokenizer import Detokenizer, byte_level_alphabet
from nano_vllm.tokenizer.gguf_pre_tokenizer import PRE_TOKENIZATIONS
from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import SENTENCEPIECE_CORPUS, TEXTS

CL100K = PRE_TOKENIZATIONS["llama-bpe"].patterns[0]
SPECIAL = {"<|endoftext|>": 400, "<|im_start|>": 403, "<|im_end|>": 404}  # with a gap
DECODER = {str(i): {"content": token, "special": True} for token, i in SPECIAL.items()} | {
    "401": {"content": "<think>", "special": False}
}
CONFIG: dict[str, Any] = {
    "pat_str": CL100K,
    "added_tokens_decoder": DECODER,
    "eos_token": "<|im_end|>",
}
texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.lists(st.sampled_from(SENTENCEPIECE_CORPUS), max_size=4).map("".join),
    st.text(" \n'sta1½ü한👍\u0301", max_size=30),
)
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Trained on many scripts, with what byte-level vocabularies are at their worst in: pieces of
    one character.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZATIONS["llama-bpe"].build()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*SENTENCEPIECE_CORPUS, "a" * 64, "aaab" * 9], trainer)
    byte_of = {char: byte for byte, char in enumerate(byte_level_alphabet())}
    return {bytes(map(byte_of.__getitem__, t)): i for t, i in backend.get_vocab().items()}


@pytest.fixture
def write(tmp_path: Path, ranks: dict[bytes, int]) -> Write:
    """Writes a folder with a file of ranks."""

    def write(
        config: dict[str, Any] = CONFIG, name: str = "tokenizer.tiktoken", text: str | None = None
    ) -> Path:
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        (tmp_path / name).write_text("".join(lines) if text is None else text)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])


def check_equal(tokenizer: Tokenizer, expected: tiktoken.Encoding, text: str, shift: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert ids == [i + shift for i in expected.encode_ordinary(text)], text
    assert stream(tokenizer, ids) == tokenizer.decode(ids) == text


@pytest.fixture(scope="session")
def expected(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    return tiktoken.Encoding("test", pat_str=CL100K, mergeable_ranks=ranks, special_tokens=SPECIAL)


@pytest.fixture(params=["tokenizer.tiktoken", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, write: Write) -> Tokenizer:
    return Tokenizer.from_path(write(name=request.param))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
def test_equals_tiktoken(tokenizer: Tokenizer, expected: tiktoken.Encoding, text: str) -> None:
    check_equal(tokenizer, expected, text, 0)
    own = text.replace("<think>", "")
    assert tokenizer.encode(own) == expected.encode(own, allowed_special="all")


def test_texts_equal_tiktoken(tokenizer: Tokenizer, expected: tiktoken.Encoding) -> None:
    for text in TEXTS:
        check_equal(tokenizer, expected, text, 0)
        assert tokenizer.encode(text) == expected.encode(text, allowed_special="all")


def test_a_piece_that_no_merge_makes(tmp_path: Path) -> None:
    """Is a token all the same, where it is a whole piece."""
    ranks = {**{bytes([i]): i for i in range(256)}, b"abc": 256}
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "x.tiktoken").write_text("".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pat_str": r"\w+|\W"}))
    expected = tiktoken.Encoding(
        "test", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={}
    )
    tokenizer = Tokenizer.from_path(tmp_path)
    for text in ("abc", "abc abcd"):
        check_equal(tokenizer, expected, text, 0)
    assert tokenizer.encode("abc") == [256]


def test_special_tokens(write: Write) -> None:
    tokenizer = Tokenizer.from_path(write())
    text = "a<|im_end|><think>"
    ids = tokenizer.encode(text)
    assert ids[-2:] == [404, 401]
    assert tokenizer.decode(ids) == "a<think>"
    plain = tokenizer.encode(text, parse_special=False)
    assert not tokenizer.special_token_ids & set(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.special_token_ids == set(SPECIAL.values())
    assert tokenizer.eos_token_ids == (404,)
    assert tokenizer.bos_token_id is None
    assert tokenizer.vocab_size == 404


def test_qwen(write: Write, ranks: dict[bytes, int]) -> None:
    """What its tokenizer_config.json does not say stands in code that is not run."""
    tokenizer = Tokenizer.from_path(write({"tokenizer_class": "QWenTokenizer"}, "qwen.tiktoken"))
    expected = tiktoken.Encoding(
        "test",
        pat_str=PRE_TOKENIZATIONS["qwen2"].patterns[0],
        mergeable_ranks=ranks,
        special_tokens={},
    )
    assert tokenizer.encode("12345 ü") == expected.encode_ordinary("12345 ü")
    assert tokenizer.encode("<|im_end|>") == [402]
    assert tokenizer.token_to_id("<|extra_204|>") == 400 + 3 + 204
    assert tokenizer.eos_token_ids == (400,)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize(
    ("config", "text", "message"),
    [
        ({}, None, "'pat_str' must be the regular expression that tokenizer.tiktoken was made"),
        ({"tokenizer_class": "X"}, None, "tokenizer_class one of QWenTokenizer"),
        ({"pat_str": "("}, None, "the vocabulary is not valid"),
        ({**CONFIG, "added_tokens_decoder": {"x": {}}}, None, "must map ids to tokens, got 'x'"),
        ({**CONFIG, "added_tokens_decoder": {"5": {"content": "<x>"}}}, None, "the same id"),
        ({**CONFIG, "added_tokens_decoder": {"450": {"content": "a"}}}, None, "an ordinary one"),
        (CONFIG, "IQ== 0\nIQ== 1\n", "line 2 gives a token the rank 1, it has 0"),
        (CONFIG, "IQ== 0\n!! 1\n", "line 2 must hold a token in base64 and its rank, got '!! 1'"),
        (CONFIG, "IQ==\n", "line 1 must hold a token in base64"),
        (CONFIG, "IQ== 0\n", "that of 0x00 is missing"),
        (CONFIG, "", "that of 0x00 is missing"),
    ],
)
def test_invalid(write: Write, config: dict[str, Any], text: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_path(write(config, text=text))
    assert "\n" not in str(error.value)


def test_two_files_of_ranks(write: Write) -> None:
    write(name="a.tiktoken")
    with pytest.raises(ValueError, match=r"one \*.tiktoken, got a.tiktoken, b.tiktoken"):
        Tokenizer.from_path(write(name="b.tiktoken"))


def test_tekken_equals_tiktoken(mistral_files: Path, tmp_path: Path) -> None:
    """Mistral's own file, read as its own library reads it."""
    shutil.copy(mistral_files / "tekken_240911.json", tmp_path / "tekken.json")
    tokenizer = Tokenizer.from_path(tmp_path)
    values = json.loads((tmp_path / "tekken.json").read_text())
    count = values["config"]["default_vocab_size"] - 1000
    ranks = {base64.b64decode(e["token_bytes"]): e["rank"] for e in values["vocab"][:count]}
    expected = tiktoken.Encoding(
        "tekken",
        pat_str=values["config"]["pattern"],
        mergeable_ranks=ranks,
        special_tokens={},
    )
    rng = random.Random(0)
    chars = "".join(TEXTS)
    drawn = ["".join(rng.choices(chars, k=60)) for _ in range(300)]
    for text in [*TEXTS, *drawn, *SENTENCEPIECE_CORPUS]:
        check_equal(tokenizer, expected, text, 1000)
    # However the bytes are cut into tokens.
    for text in TEXTS:
        data = text.encode()
        for cut in range(len(data) + 1):
            parts = [*longest(data[:cut], ranks), *longest(data[cut:], ranks)]
            assert stream(tokenizer, [i + 1000 for i in parts]) == text
    assert tokenizer.vocab_size == 131072
    assert tokenizer.encode("x") == [1, *tokenizer.encode("x", add_special_tokens=False)]
    assert tokenizer.encode("[INST]x</s>", add_special_tokens=False)[::2] == [3, 2]
    assert not {0, 1, 2, 3} & set(tokenizer.encode("<s>[INST]x</s>", False, parse_special=False))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))


def longest(data: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Tokens that make the bytes, each as long as can be."""
    ids = []
    while data:
        size = next(n for n in range(min(len(data), 32), 0, -1) if data[:n] in ranks)
        ids.append(ranks[data[:size]])
        data = data[size:]
    return ids


TEKKEN: dict[str, Any] = {
    "config": {"pattern": ".", "default_vocab_size": 256 + 3, "default_num_special_tokens": 3},
    "vocab": [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)
    ],
    "special_tokens": [{"rank": 1, "token_str": "<s>"}, {"rank": 2, "token_str": "</s>"}],
}


def test_special_tokens_of_a_tekken_file(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(TEKKEN))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.encode("<SPECIAL_0>a</s>") == [0, 3 + ord("a"), 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "'config' must hold an object, got None"),
        ({"config": {}}, "'default_num_special_tokens' is missing"),
        ({"vocab": TEKKEN["vocab"][:255]}, "must have the 256 ranks from 0 on, each once"),
        ({"vocab": [{"rank": i} for i in range(256)]}, "must have token_bytes in base64"),
        ({"vocab": [{"token_bytes": ""}]}, "'vocab' must be a list of objects with a rank"),
        ({"special_tokens": [{"rank": 3, "token_str": "x"}]}, "and a rank below 3, got"),
        ({"special_tokens": TEKKEN["special_tokens"][:1]}, "special_tokens must have '</s>'"),
        ({"special_tokens": None}, "and a rank below 3, got"),
        (
            {"special_tokens": [{"rank": i, "token_str": "x"} for i in range(3)]},
            "special_tokens must be different ones",
        ),
    ],
)
def test_invalid_tekken(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps({**TEKKEN, **change}))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_path(tmp_path)
    assert "tekken.json" in str(error.value)
    assert "\n" not in str(error.value)

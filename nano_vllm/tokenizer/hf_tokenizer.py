"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nano_vllm.config_fields import ConfigFields
from nano_vllm.tokenizer.added_tokens import added_tokens, surround
from nano_vllm.tokenizer.chat_template import ChatTemplate
from nano_vllm.tokenizer.tokenizer import Tokenizer, unique_ids
from nano_vllm.tokenizer.vocabulary import Vocabulary
from nano_vllm.weights.json_file import check_size, read_json_object

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer with what stands beside it; ValueError names the file at fault.

    Of several forms tokenizer.json comes first, then tekken.json, a SentencePiece model
    (tokenizer.model), and tiktoken's ranks (*.tiktoken, or a tokenizer.model of that kind).
    """
    config = {
        **_optional(folder / "special_tokens_map.json"),
        **_optional(folder / "tokenizer_config.json"),
    }
    path = _find_vocabulary(folder)
    vocabulary = _read_vocabulary(path, config)
    backend = vocabulary.backend
    if path.name != "tokenizer.json":  # which has them itself
        _add_tokens(backend, added_tokens(config), path)
    named = vocabulary.named | {
        name: _content(config[name], name, folder) for name in _NAMED_TOKENS if config.get(name)
    }
    ids = {name: backend.token_to_id(token) for name, token in named.items()}
    for name in ("bos_token", "eos_token"):
        if name in ids and ids[name] is None:
            raise ValueError(f"{path} lacks the {name} {named[name]!r}")
    # A named token is special even where the file does not say so.
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [t for n, t in named.items() if ids[n] is not None and t not in added]
    )
    if path.name != "tokenizer.json":
        fields = ConfigFields(config, str(folder / "tokenizer_config.json"))
        bos, eos = named.get("bos_token"), named.get("eos_token")
        adds_bos = fields.flag("add_bos_token", vocabulary.adds_bos)
        adds_eos = fields.flag("add_eos_token", False)
        surround(backend, bos if adds_bos else None, eos if adds_eos else None)
    generation = folder / "generation_config.json"
    generation_eos = ConfigFields(_optional(generation), str(generation)).token_ids("eos_token_id")
    template = _chat_template(folder, config)
    return Tokenizer(
        backend,
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=unique_ids(ids.get("eos_token"), *generation_eos),
        chat_template=ChatTemplate(template, named, str(folder)) if template else None,
        origin=str(folder),
    )


def _find_vocabulary(folder: Path) -> Path:
    for name in ("tokenizer.json", "tekken.json", "tokenizer.model"):
        if (folder / name).exists():
            return folder / name
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return ranks[0]
    if ranks:
        raise ValueError(
            f"{folder} must have one *.tiktoken, got {', '.join(p.name for p in ranks)}"
        )
    raise ValueError(
        f"{folder / 'tokenizer.json'} is missing, and so are tekken.json, tokenizer.model and "
        "*.tiktoken; tokenizer names another place, skip_tokenizer_init does without"
    )


def _read_vocabulary(path: Path, config: dict[str, Any]) -> Vocabulary:
    if path.name == "tokenizer.json":
        check_size(path)
        try:
            return Vocabulary(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"{path} is not a valid tokenizer: {error}") from None
    if path.name == "tekken.json":
        from nano_vllm.tokenizer.tekken import load_tekken

        return load_tekken(path)
    with path.open("rb") as file:
        first = file.read(1)
    # The tag of a SentencePiece model's first piece; base64 has no such character.
    if first == b"\n":
        from nano_vllm.tokenizer.sentencepiece_model import load_sentencepiece_model

        return load_sentencepiece_model(path)
    from nano_vllm.tokenizer.tiktoken_ranks import load_tiktoken

    return load_tiktoken(path, config)


def _add_tokens(backend: tokenizers.Tokenizer, tokens: dict[int, AddedToken], path: Path) -> None:
    """Beside the vocabulary, in which ids go on without a gap."""
    for token_id, token in sorted(tokens.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        expected = backend.token_to_id(token.content)
        if expected != token_id:
            raise ValueError(
                f"{path}: added token {token.content!r} must have the id {expected}, got {token_id}"
            )


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _content(token: Any, name: str, folder: Path) -> str:
    """A token is a string, or an object with its content and how to match it."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: {name} must be a token, got {token!r}"
        )
    return content


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    if (folder / "chat_template.jinja").exists():
        check_size(folder / "chat_template.jinja")
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _optional(folder / "chat_template.json").get(
        "chat_template", config.get("chat_template")
    )
    if isinstance(template, list):
        template = {
            t["name"]: t["template"]
            for t in template
            if isinstance(t, dict) and isinstance(t.get("name"), str) and "template" in t
        }
    if not isinstance(template, str | dict | None):
        raise ValueError(
            f"{folder}: chat_template must be a string or a list of them, got {template!r}"
        )
    return template or None

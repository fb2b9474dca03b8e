"""Text <-> token ids."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nano_vllm.tokenizer.caller_text import RenderedChat
from nano_vllm.tokenizer.chat_template import ChatTemplate

_OWN_ARGUMENTS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
)
"""Variables of a template that have an argument of their own."""


class Tokenizer:
    """A checkpoint's tokenizer; all methods may be called from several threads.

    Args:
        backend: splits and joins text. Its padding and truncation are switched off.
        bos_token_id: begins a sequence, if anything does.
        eos_token_ids: each of them ends a sequence.
        chat_template: None for a model that is not for chat.
        origin: where it comes from, for errors.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        chat_template: ChatTemplate | None = None,
        origin: str = "the tokenizer",
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._plain: _PlainBackend | None = None
        """Made when first asked for."""
        self._token_texts: dict[int, str] = {}
        """By token id, as far as they were asked for: log-probabilities ask by the thousand."""
        self._chat_template = chat_template
        self._origin = origin
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._special_texts = frozenset(t.content for t in added.values() if t.special)
        self._strips_first_space = '"type":"Strip"' in self.decoder_json

    @classmethod
    def from_path(cls, path: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder or inside a .gguf file."""
        if path.suffix == ".gguf":
            from nano_vllm.tokenizer.gguf_tokenizer import load_gguf_tokenizer

            return load_gguf_tokenizer(path)
        from nano_vllm.tokenizer.hf_tokenizer import load_hf_tokenizer

        return load_hf_tokenizer(path)

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any text; ValueError if it cannot be encoded as UTF-8.
            add_special_tokens: whether to add what the model expects around a text, such as BOS; a
                rendered chat template has that already.
            parse_special: whether the name of a special token in the text becomes that token; with
                untrusted text it had better not.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be valid Unicode, got a lone surrogate at position {error.start}"
            ) from None
        backend = self._backend if parse_special else self._plain_backend().backend
        # Unlike `encode`, this lets other threads run meanwhile.
        return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all the tokens; ids outside the vocabulary count for nothing."""
        try:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except OverflowError:  # the backend's numbers are of 32 bits, without a sign
            known = [i for i in token_ids if 0 <= i < 2**32]
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of a token among others, where `decode` of it alone takes away a first space."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.decode([token_id], skip_special_tokens=False)
            piece = self.id_to_piece(token_id) or ""
            if self._strips_first_space and piece.startswith(("▁", " ", "<0x20>")):
                text = f" {text}"
            self._token_texts[token_id] = text
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        """The prompt for a conversation, for `encode_chat`.

        Args:
            messages: objects with role and content.
            add_generation_prompt: whether to open the assistant's answer.
            continue_final_message: whether the last message goes on instead.
            tools: function descriptions, for templates that know tools.
            documents: for templates that know documents.
            chat_template_kwargs: whatever else the template takes.
        """
        if self._chat_template is None:
            raise ValueError(f"{self._origin} has no chat template: give it a plain prompt")
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise ValueError(
                f"chat_template_kwargs must be a mapping, got {chat_template_kwargs!r:.100}"
            )
        variables = dict(chat_template_kwargs or {})
        for name in _OWN_ARGUMENTS:
            if name in variables:
                raise ValueError(f"chat_template_kwargs must not set {name}")
        if continue_final_message:
            if add_generation_prompt:
                raise ValueError(
                    "continue_final_message and add_generation_prompt exclude each other"
                )
            variables["continue_final_message"] = True
        return self._chat_template.render(
            messages,
            add_generation_prompt,
            tools,
            documents,
            variables,
            self._special_texts,
            goes_on=continue_final_message,
        )

    def encode_chat(self, chat: RenderedChat, parse_special: bool = False) -> list[int]:
        """Token ids of a conversation.

        What came from the caller makes no special token, whatever it says: `<|im_end|>` in a
        message is encoded as the characters that it is. Added tokens that are not special, such as
        `<think>`, are matched everywhere, as a model's earlier answers have them.

        Args:
            chat: from `apply_chat_template`.
            parse_special: whether the name of a special token becomes that token in the caller's
                texts too, as in transformers; for texts that are trusted.
        """
        token_ids = self.encode(chat.text, add_special_tokens=False)
        if parse_special:
            return token_ids
        pattern = self._added_pattern
        written = [t for t in pattern.findall(chat.marked) if t in self._special_texts]
        special = [i for i in token_ids if i in self.special_token_ids]
        if special == [self.token_to_id(token) for token in written]:
            return token_ids
        plain = self._plain_backend()
        text = pattern.sub(lambda m: plain.stand_ins.get(m[0], m[0]), chat.marked)
        text = chat.without_marks(text)
        ids = plain.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [plain.token_ids.get(i, i) for i in ids]

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None outside the vocabulary."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    @property
    def decoder_json(self) -> str:
        """How pieces become text, in the terms of tokenizer.json."""
        decoder = self._backend.decoder
        return "null" if decoder is None else decoder.__getstate__().decode()

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        """Finds added tokens as the backend does: the leftmost, the longest of these."""
        texts = [t.content for t in self._backend.get_added_tokens_decoder().values()]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    def _plain_backend(self) -> _PlainBackend:
        if self._plain is None:
            self._plain = _PlainBackend(self._backend)
        return self._plain


class _PlainBackend:
    """The same with special tokens read as plain text. Others, that nobody can guess, stand in for
    them.
    """

    def __init__(self, original: tokenizers.Tokenizer) -> None:
        self.backend = tokenizers.Tokenizer.from_str(original.to_str())
        self.backend.encode_special_tokens = True
        prefix = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))
        special = {i: t for i, t in original.get_added_tokens_decoder().items() if t.special}
        stand_ins = {
            token_id: AddedToken(
                f"{prefix}{chr(0x100000 + number)}",
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
            )
            for number, (token_id, token) in enumerate(special.items())
        }
        self.backend.add_tokens(list(stand_ins.values()))
        self.stand_ins = {special[i].content: token.content for i, token in stand_ins.items()}
        """What stands in for a special token's text, and ..."""
        self.token_ids = {
            self.backend.token_to_id(token.content): i for i, token in stand_ins.items()
        }
        """... the special token's id, by that of its stand-in."""


def unique_ids(*token_ids: int | None) -> tuple[int, ...]:
    """The ids that are there, each once, in order."""
    return tuple(dict.fromkeys(i for i in token_ids if i is not None))

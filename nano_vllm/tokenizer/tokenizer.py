"""Text <-> token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nano_vllm.tokenizer.chat_template import ChatTemplate


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
        self._plain: tokenizers.Tokenizer | None = None
        """The same with special tokens read as plain text; made when first asked for."""
        self._chat_template = chat_template
        self._origin = origin
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
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
        backend = self._backend if parse_special else self._plain_backend()
        # Unlike `encode`, this lets other threads run meanwhile.
        return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all the tokens; ids outside the vocabulary count for nothing."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of a token among others, where `decode` of it alone takes away a first space."""
        text = self.decode([token_id], skip_special_tokens=False)
        piece = self.id_to_piece(token_id) or ""
        if self._strips_first_space and piece.startswith(("▁", " ", "<0x20>")):
            return f" {text}"
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, to be encoded with add_special_tokens=False.

        Args:
            messages: objects with role and content.
            add_generation_prompt: whether to open the assistant's answer.
            tools: function descriptions, for templates that know tools.
            variables: whatever else the template takes.
        """
        if self._chat_template is None:
            raise ValueError(f"{self._origin} has no chat template: give it a plain prompt")
        return self._chat_template.render(messages, add_generation_prompt, tools, **variables)

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
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    @property
    def decoder_json(self) -> str:
        """How pieces become text, in the terms of tokenizer.json."""
        decoder = self._backend.decoder
        return "null" if decoder is None else decoder.__getstate__().decode()

    def _plain_backend(self) -> tokenizers.Tokenizer:
        if self._plain is None:
            plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
            plain.encode_special_tokens = True
            self._plain = plain
        return self._plain


def unique_ids(*token_ids: int | None) -> tuple[int, ...]:
    """The ids that are there, each once, in order."""
    return tuple(dict.fromkeys(i for i in token_ids if i is not None))

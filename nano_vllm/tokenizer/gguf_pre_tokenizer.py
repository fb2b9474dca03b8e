"""How GGUF's byte-level vocabularies split text before merging, by `tokenizer.ggml.pre`.

Patterns are those of the models' own tokenizer.json, with which llama.cpp's agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_CONTRACTION}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"


@dataclass(frozen=True)
class PreTokenization:
    """What `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]
    """Each splits what the one before it left."""
    ignores_merges: bool = False
    """A split that is itself in the vocabulary is not merged up from bytes."""
    adds_bos: bool = False
    """Unless the file says otherwise."""
    normalizes: bool = False
    """To NFC."""

    def build(self) -> PreTokenizer:
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = PreTokenization((_CL100K,), ignores_merges=True, adds_bos=True)
_DIGITS_GPT2 = PreTokenization((_DIGIT, _GPT2))

PRE_TOKENIZATIONS = {
    "default": PreTokenization((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "chatglm-bpe": PreTokenization((_CL100K,)),
    "dbrx": PreTokenization((_CL100K,)),
    "glm4": PreTokenization((_CL100K,), ignores_merges=True),
    "gpt-2": PreTokenization((_GPT2,)),
    "gpt-4o": PreTokenization((_O200K,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenization((_QWEN2,), normalizes=True),
    "refact": _DIGITS_GPT2,
    "smaug-bpe": PreTokenization((_CL100K,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "tekken": PreTokenization((_TEKKEN,), ignores_merges=True, adds_bos=True),
}

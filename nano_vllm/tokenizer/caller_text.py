"""Keeps what callers say from being read as special tokens behind a chat template.

A template joins its own text with that of callers, and special tokens are then looked for in the
whole. So, before it is rendered, one character of each special token's text is replaced by a mark
wherever a caller has written it: no special token is found any more but those of the template.
Comparisons see what was written (`template_sandbox`); what a template cuts and replaces is a mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_PRIVATE_USE = range(0xE000, 0xF900)
_MAX_LITERALS, _MAX_LITERAL_LENGTH = 256, 256
"""Well-known templates have a few dozen; a hostile one must not slow down every message."""
_KEPT = re.compile(r"[\w\s\"'\\./-]")
"""What identifiers, paths and JSON are made of is not replaced if a token has anything else."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as its template wrote it."""

    marked: str
    """The text with the callers' marks."""
    marks: Mapping[str, str]
    """The character that each mark stands for."""

    @cached_property
    def text(self) -> str:
        """As it reads."""
        return self.without_marks(self.marked)

    def without_marks(self, text: str) -> str:
        """A text made of `marked`, as it reads."""
        for mark, character in self.marks.items():
            text = text.replace(mark, character)
        return text

    def up_to_mark(self, end: str, content: str) -> RenderedChat:
        """Without what is behind the last message's text, which then goes on; ValueError if the
        template has changed it.

        Args:
            end: a mark that stands, with a space behind it, at the end of that text.
            content: the text.
        """
        before, mark, behind = self.marked.rpartition(end)
        if not behind.startswith(" "):  # the template trims
            before = before.rstrip()
        if not mark or content.strip() not in self.without_marks(before):
            raise ValueError("the last message cannot be continued: the template changes it")
        return RenderedChat(before, self.marks)


class CallerText:
    """Puts marks into the texts of callers.

    Args:
        special: texts of the special tokens.
        literals: strings that the template looks for. Where a caller has written one of them it
            stays as it is, unless part of a special token may begin in it.
    """

    def __init__(self, special: Collection[str], literals: Iterable[str]) -> None:
        places = {token: _place(token) for token in special}
        self._marked = sorted({token[i] for token, i in places.items()})
        tails = {token[i:] for token, i in places.items()}
        beginnings = {tail[:end] for tail in tails for end in range(1, len(tail) + 1)}

        def may_begin_token(text: str) -> bool:
            return text in beginnings or any(text[:i] in tails for i in range(1, len(text)))

        characters = f"([{re.escape(''.join(self._marked))}])" if self._marked else "(?!)"
        found = re.compile(characters)
        known = [
            literal
            for literal in literals
            if len(literal) <= _MAX_LITERAL_LENGTH
            and (places_in := [match.start() for match in found.finditer(literal)])
            and not any(may_begin_token(literal[i:]) for i in places_in)
        ]
        known = sorted(known[:_MAX_LITERALS], key=len, reverse=True)
        self._found = re.compile("|".join([*map(re.escape, known), characters]))

    def choose_marks(self, free: Iterator[str]) -> dict[str, str]:
        """A mark for each character, from `free_characters`."""
        return {character: next(free) for character in self._marked}

    def mark(self, value: Any, marks: Mapping[str, str]) -> Any:
        """The same JSON value with marks in all its strings.

        Args:
            value: made of mappings, sequences, strings and scalars.
            marks: from `choose_marks`.
        """
        if isinstance(value, str):
            return self._found.sub(lambda m: marks[m[1]] if m[1] else m[0], value)
        if isinstance(value, dict):
            return {self.mark(k, marks): self.mark(v, marks) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(v, marks) for v in value]
        return value


def free_characters(text: str) -> Iterator[str]:
    """Characters that are not in `text`, an ASCII JSON of everything that a template is given;
    ValueError when there are no more.
    """
    lower = text.lower()
    yield from (chr(code) for code in _PRIVATE_USE if f"\\u{code:04x}" not in lower)
    raise ValueError("a conversation must not have all of Unicode's private-use characters")


def unescape_marks(text: str, marks: Iterable[str]) -> str:
    """The text with marks where a template has written them as JSON's escapes."""
    for mark in marks:
        text = text.replace(json.dumps(mark)[1:-1], mark)
    return text


def _place(token: str) -> int:
    """Of the character to replace."""
    return next((i for i, c in enumerate(token) if not _KEPT.match(c)), 0)

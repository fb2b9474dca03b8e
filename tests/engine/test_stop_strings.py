from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nano_vllm.engine.stop_strings import StopStrings


def one_by_one(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: the text grows by characters until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", max_size=6), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_pieces_do_not_matter(pieces: list[str], stop: list[str], include: bool) -> None:
    whole = "".join(pieces)
    expected, found = one_by_one(whole, stop, include)
    text = StopStrings(stop, include)
    shown = ""
    for piece in pieces:
        text.push(piece)
        # What was shown stays, and nothing is held back that could not yet begin a stop string.
        assert text.settled_text.startswith(shown)
        shown = text.settled_text
        held = text.text[len(shown) :]
        assert not held or any(s.startswith(held) for s in stop)
    assert (text.text, text.found) == (expected, found)
    assert expected.startswith(shown)


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "found"),
    [
        (["Hello, wor", "ld"], ["world"], "Hello, ", "world"),
        (["one STOP two"], ["STOP"], "one ", "STOP"),
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        (["xabc"], ["bc", "abc"], "x", "abc"),
        (["ab", "ab", "c"], ["abac"], "ababc", None),
        (["a"], ["a"], "", "a"),
    ],
)
def test_examples(pieces: list[str], stop: list[str], text: str, found: str | None) -> None:
    stream = StopStrings(stop)
    for piece in pieces:
        stream.push(piece)
    assert (stream.text, stream.found) == (text, found)


def test_nothing_follows_a_stop_string() -> None:
    text = StopStrings(["b"])
    for piece in ("ab", "c"):
        text.push(piece)
    assert text.text == "a"


def test_a_stop_string_cannot_end_where_it_must_not() -> None:
    text = StopStrings(["ab"])
    text.push("ab", may_stop=False)
    text.push("xa", may_stop=False)
    assert text.found is None
    text.push("b")
    assert (text.text, text.found) == ("abx", "ab")


class Counted(str):
    """Counts how often somebody looks into it."""

    looks = 0

    def __getitem__(self, key: Any) -> str:
        Counted.looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("piece", ["ab", "x", "xab", "abc"])
def test_a_character_costs_no_more_where_a_stop_string_is_long(piece: str) -> None:
    text = StopStrings([Counted("x" + "ab" * 500 + "c")])
    Counted.looks = 0
    for _ in range(500):
        text.push(piece)
        assert len(text.settled_text) <= len(text.text)
    assert Counted.looks <= 3 * len(text.text)

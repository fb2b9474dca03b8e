"""The list of bugs that `python -m tests.planted_bugs` plants fits the code."""

from __future__ import annotations

from tests.planted_bugs import ROOT, read_bugs


def test_every_bug_can_be_planted() -> None:
    bugs = read_bugs()
    assert len(bugs) >= 40
    assert len({bug.what for bug in bugs}) == len(bugs)
    for what, file, right, wrong in bugs:
        assert (ROOT / file).read_text().count(right) == 1, f"{what}: {file} has changed"
        assert right != wrong

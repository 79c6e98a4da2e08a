"""What messages say of the errors of libraries."""

from __future__ import annotations

import pytest

from sskt.teacher_cache.errors import described, first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no compiler\n\nadvice of ten lines", "no compiler"),
        ("\n  no compiler  \n", "no compiler"),
        ("backend='inductor' raised:\n\nCppCompileError: no compiler\nmore", None),
        ("raised:", "raised:"),
        ("", "ValueError"),
    ],
)
def test_a_message_of_many_lines_becomes_one(text: str, line: str | None) -> None:
    """A first line that only announces the cause, as torch.compile's, is of no use alone."""
    expected = line or "backend='inductor' raised: CppCompileError: no compiler"
    assert first_line(ValueError(text)) == expected


def test_an_error_is_named_by_its_class() -> None:
    assert described(KeyError("stl10")) == "KeyError: 'stl10'"
    assert described(AssertionError()) == "AssertionError"

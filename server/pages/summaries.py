"""Label sets as the pages show them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from sskt.server.pages.coverage import Coverage, CoverageCache
from sskt.server.pages.drawing import Drawing, drawn
from sskt.teacher_cache.format.encodings import error_text
from sskt.teacher_cache.label_sets.label_set import LabelSet

_LIST = re.compile(r"\[\n\s+([-0-9.e+,\s]+?)\n\s+\]")


def as_text(value: Any) -> str:
    """JSON for people: indented, lists of numbers on one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


@dataclass(frozen=True)
class Summary:
    """A label set as the page shows it. ``coverage``: None while it is being read."""

    label_set: LabelSet
    coverage: Coverage | None
    drawing: Drawing | None
    trouble: str

    @property
    def spec_text(self) -> str:
        """The spec as JSON, for people."""
        return as_text(self.label_set.spec)

    @property
    def policy(self) -> str:
        """The view policy with its parameters."""
        views = self.label_set.spec["views"]
        given = ", ".join(f"{k} {_short(v)}" for k, v in views["parameters"].items())
        return f"{views['policy']} ({given})" if given else str(views["policy"])

    @property
    def error_text(self) -> str:
        """The measured cost of the encoding."""
        return error_text(self.label_set.attributes.get("error"))

    @property
    def stored_words(self) -> str:
        """Samples x seeds that are stored, in words."""
        return self.drawing.words if self.drawing else self.trouble or "being counted"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def summaries_of(request: Request, sets: list[LabelSet]) -> list[Summary]:
    """The sets with what is known now of their files."""
    summaries = []
    coverages: CoverageCache = request.app.state.coverages
    for label_set, found in zip(sets, coverages.of(sets), strict=True):
        known = found if isinstance(found, Coverage) else None
        drawing = drawn(known) if known else None
        summaries.append(
            Summary(label_set, known, drawing, found if isinstance(found, str) else "")
        )
    return summaries

"""A GPU's memory slices as lines of text: what lies where, and who has it. Pure.

| 2g.20gb       | 2g.20gb       |...............| 3g.40gb                       |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_WIDTH = 64
"""Characters for all slices of a GPU: beside a margin this fits 80 columns, and divides by 4, 8 and 12 as
far as they need it."""


@dataclass(frozen=True)
class Block:
    """Slices from `start` on that belong together; `label` above, `owner` below."""

    start: int
    size: int
    label: str
    owner: str = ""


def draw(width: int, blocks: Iterable[Block]) -> list[str]:
    """The map of a GPU with `width` slices: labels, owners (if there is one), numbers."""
    there = sorted(blocks, key=lambda b: b.start)
    spans = list(_spans(width, there))
    cell = max(3, _WIDTH // max(width, 1))
    lines = [_row(cell, [(size, block.label if block else None) for size, block in spans])]
    if any(block.owner for block in there):
        lines.append(_row(cell, [(size, block.owner if block else None) for size, block in spans]))
    return [*lines, " " + "".join(f"{n:<{cell}}" for n in range(width)).rstrip()]


def _spans(width: int, blocks: Sequence[Block]) -> Iterator[tuple[int, Block | None]]:
    """Sizes from left to right, with their block; None where nothing is."""
    at = 0
    for block in blocks:
        if block.start > at:
            yield block.start - at, None
        yield block.size, block
        at = block.start + block.size
    if at < width:
        yield width - at, None


def _row(cell: int, spans: Sequence[tuple[int, str | None]]) -> str:
    return "|" + "|".join(_fit(text, size * cell - 1) for size, text in spans) + "|"


def _fit(text: str | None, width: int) -> str:
    """The text in exactly this width. What is too long becomes shorter: a profile loses its memory, a leftover is what
    is left; then whatever is over goes."""
    if text is None:
        return "." * width
    if len(text) > width:
        text = re.sub(r"\.\d+gb|(?<=^left)over$", "", text)
    return f"{text[:width]:<{width}}"

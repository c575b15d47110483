"""Durations, sizes, times and fractions as people write them. Pure.

One parser for each, for the whole system: a bare number never has a guessed unit, and nonsense
raises instead of becoming zero.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from fractions import Fraction

_UNIT_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([dhms])")
_DURATION_WHOLE = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt])(?:i?b)?|(\d+)b", re.IGNORECASE)
_SIZE_FACTOR = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_EXTRA_FRACTION = re.compile(r"(\.\d{6})\d+")
_SHORT_FRACTION = re.compile(r"\.(\d{1,5})(?!\d)")


def parse_duration(text: str) -> timedelta:
    """`72h`, `0.5h`, `30m`, `7d`, `1d12h`, `0`. A bare number other than 0 raises ValueError."""
    if text == "0":
        return timedelta(0)
    if not _DURATION_WHOLE.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration; write a number with its unit, such as 30m, 72h or 1d12h")
    seconds = sum(Fraction(n) * _UNIT_SECONDS[unit] for n, unit in _DURATION.findall(text))
    try:
        return timedelta(seconds=float(seconds))
    except OverflowError:
        raise ValueError(f"{text!r} is longer than any calendar; write null for unlimited") from None


def format_duration(value: timedelta | None) -> str:
    """`72h`, `30m`, `1h30m`, `45s`; `unlimited` for None. The inverse of parse_duration."""
    if value is None:
        return "unlimited"
    seconds = round(value.total_seconds())
    parts = []
    for unit in "hms":
        count, seconds = divmod(seconds, _UNIT_SECONDS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0"


def parse_size(text: str) -> int:
    """Bytes in `64g`, `512m`, `1.5t` (powers of 1024, as Docker counts). No unit: ValueError."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is not a size; write a number with its unit, such as 512m or 64g")
    if match[3]:
        return int(match[3])
    return int(Fraction(match[1]) * _SIZE_FACTOR[match[2].lower()])


def format_size(size: int) -> str:
    """The shortest exact form that systemd reads: `192G`, `512M`, `1100B`."""
    for suffix in "TGMK":
        factor = _SIZE_FACTOR[suffix.lower()]
        if size and size % factor == 0:
            return f"{size // factor}{suffix}"
    return f"{size}B"


def parse_time(text: str) -> datetime:
    """An ISO 8601 time as aware UTC. Naive times are UTC; Docker's nine fraction digits are accepted."""
    text = _EXTRA_FRACTION.sub(r"\1", text.strip())
    text = _SHORT_FRACTION.sub(lambda m: "." + m[1].ljust(6, "0"), text)
    if text.endswith(("Z", "z")):
        text = text[:-1] + "+00:00"
    value = datetime.fromisoformat(text)
    return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value.astimezone(timezone.utc)


def format_time(value: datetime) -> str:
    """UTC to the second: `2025-11-21T10:30:00Z`."""
    return value.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def after(when: datetime, span: timedelta) -> datetime:
    """`when` plus `span`, at most the last day that a date can name."""
    try:
        return when + span
    except OverflowError:
        return datetime.max.replace(tzinfo=timezone.utc)

"""Durations, sizes and times as people and Docker write them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest
from ds01 import units
from hypothesis import given
from hypothesis import strategies as st

ZONES = ["UTC", "Europe/Berlin", "America/New_York"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("72h", 259200),
        ("30m", 1800),
        ("7d", 604800),
        ("45s", 45),
        ("1d12h", 129600),
        ("1h30m15s", 5415),
        ("0.5h", 1800),
        ("0.25h", 900),
        ("0.01h", 36),
        ("1.5d", 129600),
        ("0.1h", 360),
        ("0", 0),
        ("0h", 0),
        ("0.0m", 0),
    ],
)
def test_duration(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "48",
        "0.5",
        "00",
        "h",
        ".5h",
        "5.h",
        "-1h",
        "+1h",
        "1 h",
        " 1h",
        "1h ",
        "1h\n",
        "1H",
        "1w",
        "1h30",
        "1h,30m",
        "1e3h",
        "0x1h",
        "1:30",
        "inf",
        "unlimited",
        "null",
        "invalid",
        "1_000h",
    ],
)
def test_what_is_no_duration_raises_and_never_becomes_zero(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration; write a number with its unit"):
        units.parse_duration(text)


def test_a_duration_beyond_every_calendar_is_refused_like_any_other_nonsense() -> None:
    with pytest.raises(ValueError):
        units.parse_duration("99999999999999d")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unlimited"),
        (timedelta(0), "0"),
        (timedelta(hours=72), "72h"),
        (timedelta(minutes=30), "30m"),
        (timedelta(minutes=90), "1h30m"),
        (timedelta(seconds=45), "45s"),
        (timedelta(days=7), "168h"),
        (timedelta(hours=1, seconds=1), "1h1s"),
    ],
)
def test_format_duration_tells_null_from_zero(value: timedelta | None, text: str) -> None:
    assert units.format_duration(value) == text


@given(st.integers(min_value=0, max_value=10**9))
def test_a_duration_survives_being_written_and_read(seconds: int) -> None:
    value = timedelta(seconds=seconds)
    assert units.parse_duration(units.format_duration(value)) == value


@given(st.integers(0, 10**4), st.integers(0, 999), st.sampled_from("dhm"))
def test_fractions_of_a_unit_are_exact(whole: int, thousandths: int, unit: str) -> None:
    seconds = {"d": 86400, "h": 3600, "m": 60}[unit]
    expected = timedelta(milliseconds=(whole * 1000 + thousandths) * seconds)
    assert units.parse_duration(f"{whole}.{thousandths:03}{unit}") == expected


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    try:
        value = units.parse_duration(text)
    except ValueError:
        return
    assert text == "0" or text[-1] in "dhms"
    assert value >= timedelta(0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64g", 64 * 1024**3),
        ("64G", 64 * 1024**3),
        ("64gb", 64 * 1024**3),
        ("64GiB", 64 * 1024**3),
        ("512m", 512 * 1024**2),
        ("1.5t", 1536 * 1024**3),
        ("0.5g", 512 * 1024**2),
        ("100k", 102400),
        ("100b", 100),
        ("0g", 0),
    ],
)
def test_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "64", "64x", "g", "-1g", "1 g", "64g\n", "64gg", "64ib", "1.5b", ".5g", "1e3m", "64 GB", "unlimited"]
)
def test_what_is_no_size_raises(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write a number with its unit"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(192 * 1024**3, "192G"), (1536 * 1024**3, "1536G"), (1024**4, "1T"), (512 * 1024**2, "512M"), (1000, "1000B")],
)
def test_format_size_is_the_shortest_exact_form(size: int, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(min_value=1, max_value=2**60))
def test_a_size_survives_being_written_and_read(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


_HALF_PAST = datetime(2025, 11, 21, 10, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-11-21T10:30:00Z", _HALF_PAST),
        ("2025-11-21T10:30:00z", _HALF_PAST),
        ("2025-11-21T10:30:00", _HALF_PAST),
        ("2025-11-21 10:30:00", _HALF_PAST),
        (" 2025-11-21T10:30:00Z\n", _HALF_PAST),
        ("2025-11-21T10:30:00+00:00", _HALF_PAST),
        ("2025-11-21T11:30:00+01:00", _HALF_PAST),
        ("2025-11-21T05:30:00-05:00", _HALF_PAST),
        ("2025-11-21T10:30:00.123456789+00:00", _HALF_PAST.replace(microsecond=123456)),
        ("2025-11-21T11:30:00.5+01:00", _HALF_PAST.replace(microsecond=500000)),
        ("2025-07-01", datetime(2025, 7, 1, tzinfo=timezone.utc)),
        ("0001-01-01T00:00:00Z", datetime(1, 1, 1, tzinfo=timezone.utc)),
    ],
)
def test_time_is_utc_wherever_the_server_stands(
    zone: str, text: str, expected: datetime, timezone_of: Callable[[str], None]
) -> None:
    timezone_of(zone)
    value = units.parse_time(text)
    assert value == expected
    assert value.utcoffset() == timedelta(0)


@pytest.mark.parametrize("digits", range(1, 10))
@pytest.mark.parametrize("suffix", ["Z", "", "+00:00"])
def test_time_with_one_to_nine_fraction_digits(digits: int, suffix: str) -> None:
    value = units.parse_time(f"2025-11-21T10:30:00.{'123456789'[:digits]}{suffix}")
    assert value == _HALF_PAST.replace(microsecond=int("123456789"[:digits][:6].ljust(6, "0")))


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2025-13-01T00:00:00Z", "2025-02-30", "10:30", "1763721000", "2025-11-21T25:00:00Z"]
)
def test_what_is_no_time_raises(text: str) -> None:
    with pytest.raises(ValueError):
        units.parse_time(text)


@pytest.mark.parametrize("zone", ZONES)
def test_format_time_is_utc_wherever_the_server_stands(zone: str, timezone_of: Callable[[str], None]) -> None:
    timezone_of(zone)
    assert units.format_time(_HALF_PAST) == "2025-11-21T10:30:00Z"
    east = datetime(2025, 7, 1, 12, 0, 0, 999, tzinfo=timezone(timedelta(hours=2)))
    assert units.format_time(east) == "2025-07-01T10:00:00Z"


@given(
    st.datetimes(
        min_value=datetime(1970, 1, 1),
        max_value=datetime(2200, 1, 1),
        timezones=st.integers(-14, 14).map(lambda hours: timezone(timedelta(hours=hours))),
    )
)
def test_a_time_survives_being_written_and_read(value: datetime) -> None:
    assert units.parse_time(units.format_time(value)) == value.replace(microsecond=0)

"""Times as people type them."""

import pytest

from ftkit.core.durations import Rhythm, rhythm_of, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("55m", 3300), ("1h30m", 5400), ("2d", 172800), ("1.5h", 5400), ("0.5", 0.5)],
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "soon", "5 m", "-5m", "m5", "1h30", "5w", "1e3"])
def test_what_is_no_time_is_none(text):
    assert seconds_of(text) is None


@pytest.mark.parametrize(
    ("text", "rhythm"),
    [
        ("50", Rhythm(steps=50)),
        ("10%", Rhythm(steps=20)),
        ("0.1%", Rhythm(steps=1)),
        ("100%", Rhythm(steps=200)),
        ("10m", Rhythm(seconds=600)),
        ("30s", Rhythm(seconds=30)),
    ],
)
def test_rhythms_are_steps_shares_or_times(text, rhythm):
    assert rhythm_of(text, steps=200) == rhythm


@pytest.mark.parametrize("text", ["0", "0%", "101%", "often", "-3", "1.5"])
def test_what_is_no_rhythm_is_none(text):
    assert rhythm_of(text, steps=200) is None

"""Parts of a step add up to all of it."""

from contextlib import suppress

import pytest

from cp2image import stopwatch
from cp2image.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def test_a_part_within_a_part_counts_in_the_inner_one(clock):
    watch = Stopwatch()
    with watch.part("outer"):
        clock(1)
        with watch.part("inner"):
            clock(2)
        clock(4)
    clock(8)  # outside of all
    with watch.part("outer"):
        clock(16)
    assert watch.seconds == {"outer": 21, "inner": 2}


def test_what_workers_did_is_moved_out_of_the_part_that_waits(clock):
    watch = Stopwatch()
    with watch.part("waiting"):
        clock(10)
        watch.credit({"measuring": 12, "reading": 2}, workers=2)
        clock(1)
    assert watch.take() == {"waiting": 4, "measuring": 6, "reading": 1}
    assert watch.seconds == {}


def test_a_part_that_fails_is_counted_and_closed(clock):
    watch = Stopwatch()
    with watch.part("outer"):
        with suppress(ZeroDivisionError), watch.part("inner"):
            clock(1)
            clock(1 / 0)
        clock(2)
    assert watch.seconds == {"outer": 2, "inner": 1}

"""Times of requests that keep keys and values: the figures follow from the engine's steps."""

import pytest

from benchmarks.engine.reuse_time import parse, schedule_steps, summary


def test_figures() -> None:
    options = parse(["--canvas", "100", "--tokens-per-pass", "4", "--block-length", "10"])
    assert schedule_steps(options) == 25
    steps = [("whole", 1.0), ("window", 0.1), ("window", 0.3), ("window", 0.2), ("mixed", 0.4)]
    row = summary(options, 2, steps)
    assert row["seconds"] == pytest.approx(2.0)
    assert row["tokens_per_s"] == pytest.approx(100.0)
    assert (row["window_ms"], row["window_steps"]) == (200.0, 3)
    assert (row["whole_ms"], row["whole_steps"]) == (1000.0, 1)
    assert (row["mixed_steps"], row["refresh_tokens"]) == (1, 10)

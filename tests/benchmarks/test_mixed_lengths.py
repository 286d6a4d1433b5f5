"""The benchmark of mixed lengths without a server."""

import threading
import time
from pathlib import Path

import pytest

from benchmarks.measuring.rows import RowFile, read_rows
from benchmarks.serving import mixed
from benchmarks.serving.mixed import Kind, Measured, percentile, rows_of, run, run_phase

CHAT = Kind("chat", clients=2, requests=3, prompt_len=24, canvas=8, steps=8)
LONG = Kind("long", clients=1, requests=1, prompt_len=600, canvas=32, steps=32)


def test_long_requests_are_under_way_when_chat_begins() -> None:
    asked: list[str] = []
    lock = threading.Lock()

    def ask(kind: Kind, seed: int) -> bool:
        with lock:
            asked.append(kind.name)
        time.sleep(0.1 if kind is LONG else 0.01)
        return True

    seconds, measured = run_phase([CHAT, LONG], ask, 0.05)
    assert asked == ["long"] + ["chat"] * 6
    assert [len(of_kind.latencies) for of_kind in measured] == [6, 1]
    assert seconds >= measured[1].latencies[0] >= 0.1


def test_what_does_not_come_whole_has_failed() -> None:
    def ask(kind: Kind, seed: int) -> bool:
        if seed % 2:
            raise ConnectionResetError
        return seed > 0

    _, (chat,) = run_phase([CHAT], ask, 0.0)
    # Clients 0 and 1 ask with seeds 0 to 2 and 7 to 9.
    assert (len(chat.latencies), chat.failed) == (2, 4)


def test_rows() -> None:
    rows = rows_of("mixed", [CHAT, LONG], 4.0, [Measured([0.1, 0.2, 0.3], 3), Measured([4.0])])
    assert set(rows[0]) <= set(mixed.COLUMNS)
    assert [row["latency_ms_p50"] for row in rows] == [pytest.approx(200), pytest.approx(4000)]
    assert rows[0]["output_tokens_per_s"] == (3 * 8 + 32) / 4.0
    assert (rows[0]["requests"], rows[0]["failed"]) == (6, 3)
    assert percentile([], 50) != percentile([], 50)


def test_phases_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        mixed, "complete", lambda url, body: {"usage": {"completion_tokens": body["max_tokens"]}}
    )
    file = RowFile(tmp_path / mixed.FILE, mixed.COLUMNS)
    assert not run("http://host:1", "model", [CHAT, LONG], 0.0, file, {"checkout": "this"})
    rows = read_rows(tmp_path / mixed.FILE)
    assert [(row["phase"], row["kind"]) for row in rows] == [
        ("alone", "chat"),
        ("alone", "long"),
        ("mixed", "chat"),
        ("mixed", "long"),
    ]


def test_the_budget_is_the_context() -> None:
    options = mixed.parse(["--small"])
    arguments = mixed.server_options(options, Path("tests/golden/llada-mha"), [CHAT, LONG])
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--max-model-len"] == given["--max-num-batched-tokens"] == "632"

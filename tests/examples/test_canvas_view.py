"""Pictures of a canvas, with and without a terminal, and of a real request."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import canvas_view
from examples.canvas_view import render, show
from vllm_sparsed.shown_canvas import ShownCanvas, token_texts


class FakeTokenizer:
    all_special_ids = (3,)

    def decode(self, tokens: list[int]) -> str:
        (token,) = tokens
        return {1: "90", 2: " harbor", 3: "<|eot|>", 4: "\n", 5: "蜂"}[token]


TEXT = token_texts(FakeTokenizer())


def canvas_after(passes: int, *tokens: int | None) -> ShownCanvas:
    return ShownCanvas(
        prompt=0,
        index=0,
        passes=passes,
        most_passes=8,
        sparse_from=4 if passes >= 4 else None,
        finished=False,
        tokens=list(tokens),
        decided_in=[0 if token is None else 1 for token in tokens],
    )


BEFORE = canvas_after(3, None, 2, None, None, None, None)
AFTER = canvas_after(4, 1, 2, None, 4, None, 3)


def test_what_is_new_stands_out() -> None:
    assert render(AFTER, BEFORE, TEXT, 80) == [
        "pass   4/8 sparse   4/6 decided",
        "\x1b[7m90\x1b[0m harbor░\x1b[7m⏎\x1b[0m░\x1b[7m·\x1b[0m",
    ]
    # On the first picture everything decided is new.
    assert render(BEFORE, None, TEXT, 80)[1] == "░\x1b[7m harbor\x1b[0m░░░░"


def test_one_plain_line_without_a_width() -> None:
    assert render(AFTER, None, TEXT) == [
        "pass   4/8 sparse   4/6 decided",
        "90 harbor░⏎░·",
    ]


def test_lines_fit_the_terminal() -> None:
    canvas = canvas_after(1, 2, 2, None, 5, 1, None)
    lines = render(canvas, canvas, TEXT, 10)
    assert lines == ["pass   1/8", " harbor", " harbor░蜂", "90░"]


def pictures() -> Iterator[ShownCanvas]:
    yield BEFORE
    yield AFTER


def test_redraws_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    show(pictures(), TEXT, delay=0)
    printed = capsys.readouterr().out
    assert printed.startswith("\x1b[?25l\r\x1b[Jpass   3/8 dense")
    # Up over both lines of the picture before.
    assert "░░░░\n\x1b[2A\r\x1b[Jpass   4/8 sparse" in printed
    assert printed.endswith("\n\x1b[?25h")


def test_cursor_comes_back_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing() -> Iterator[ShownCanvas]:
        yield BEFORE
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(KeyboardInterrupt):
        show(failing(), TEXT, delay=0)
    assert capsys.readouterr().out.endswith("\x1b[?25h")


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(pictures(), TEXT, delay=60)
    assert capsys.readouterr().out.splitlines() == [
        "pass   3/8 dense    1/6 decided ░ harbor░░░░",
        "pass   4/8 sparse   4/6 decided 90 harbor░⏎░·",
    ]


def test_a_real_request(random_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, canvas_view.__file__, "--model", str(random_model), "--steps", "8"],
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in "".join(line for line in done.stdout.splitlines() if "decided" in line)
    seen = re.findall(r"^pass +(\d)/8 (\w+) +(\d+)/32 decided (.+)$", done.stdout, re.MULTILINE)
    assert [(int(step), kind) for step, kind, _, _ in seen] == [
        (step, "dense" if step <= 3 else "sparse") for step in range(1, 9)
    ]
    assert [int(decided) for _, _, decided, _ in seen] == [4, 8, 12, 16, 20, 24, 28, 32]
    for _, _, decided, canvas in seen:
        assert canvas.count("░") == 32 - int(decided)

"""A server with options of its own: a folder of generation defaults, debug lines in its log."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.golden_cases import load_cases
from tests.engine.http_server import MODEL_NAME, Server, serve

CASES = load_cases("llada-mha")
SPARSE_CASE = next(case for case in CASES if case.block_mask)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def configured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with VLLM_LOGGING_LEVEL=DEBUG, a temperature of 2 and a small token budget."""
    folder = tmp_path_factory.mktemp("configured")
    (folder / "generation_config.json").write_text('{"temperature": 2.0}')
    options = ("--generation-config", str(folder), "--max-num-scheduled-tokens", "1")
    with serve(checkpoint, folder / "log", *options, VLLM_LOGGING_LEVEL="DEBUG") as server:
        yield server


def chat(server: Server, **changes: object) -> tuple[str, int]:
    """Text and number of tokens of a chat answer in four steps."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "w20 w21 w22"}],
        "seed": 1,
        "ignore_eos": True,
        "vllm_xargs": {"diffusion_steps": 4},
        **changes,
    }
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def test_a_folder_of_generation_defaults_caps_no_canvas(configured: Server) -> None:
    assert chat(configured, max_tokens=300)[1] == 300
    assert chat(configured)[1] == 128


def test_a_folder_of_generation_defaults_gives_the_temperature(configured: Server) -> None:
    drawn = chat(configured)
    assert drawn == chat(configured, temperature=2.0)
    assert drawn != chat(configured, temperature=0.0)


def test_a_small_token_budget_is_raised_in_both_processes(configured: Server) -> None:
    assert configured.complete(CASES[0])["token_ids"] == CASES[0].expected
    line = "max_num_scheduled_tokens raised from 1 to max_model_len=640"
    assert line in configured.log.read_text()


def test_start_up_line(server: Server) -> None:
    """At the default level, once, with the settings and the size of the store."""
    lines = re.findall(r"INFO .* SparseD: (.*)", server.log.read_text())
    assert len(lines) == 1
    # 2048 tokens are 128 blocks of 16, and an eighth more, for long and for short requests each;
    # a row keeps most where a sequence of 40 blocks is half prompt: its 20 and 11 of the canvas.
    assert lines[0].startswith(
        "skip 0.2, select 0.5, block size 16; pattern store of 288 rows x 31 blocks "
        "for 2 layers and 16 heads: 0.0 GiB"
    )
    assert "density" not in server.log.read_text()


def test_density_of_a_request_is_a_debug_line(configured: Server) -> None:
    configured.complete(SPARSE_CASE)
    lines = re.findall(r"DEBUG .* Request \S+: density (\S+) over", configured.log.read_text())
    assert len(lines) >= 1
    assert 0 < float(lines[-1]) < 1

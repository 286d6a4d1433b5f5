"""The server process of the demo: reported when it fails, gone when the demo is over."""

import re
import time
from pathlib import Path

import pytest

from examples import local_server
from examples.local_server import ServerError, served
from tests.examples.fake_vllm import SERVER_WITH_WORKER, write_program


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    "error", [None, KeyboardInterrupt, RuntimeError], ids=["none", "interrupt", "failure"]
)
def test_server_and_its_workers_end(
    error: type[BaseException] | None, fake_vllm: Path, tmp_path: Path
) -> None:
    write_program(fake_vllm, SERVER_WITH_WORKER)

    def use_server() -> None:
        with served("some/model", [], tmp_path / "log", name="demo") as address:
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
            assert is_running(int(fake_vllm.with_name("worker").read_text()))
            if error is not None:
                raise error

    if error is None:
        use_server()
    else:
        with pytest.raises(error):
            use_server()
    worker = int(fake_vllm.with_name("worker").read_text())
    deadline = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def test_unhealthy_server_is_given_up(
    fake_vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(fake_vllm, "import time; time.sleep(600)")
    monkeypatch.setattr(local_server, "START_LIMIT", 1.0)
    with (
        pytest.raises(ServerError, match="not healthy after 1 s"),
        served("some/model", [], tmp_path / "log", name="demo"),
    ):
        pytest.fail("the server was taken for healthy")


def test_options_reach_the_command(fake_vllm: Path, tmp_path: Path) -> None:
    write_program(fake_vllm, "import sys; print(sys.argv); sys.exit(3)")
    log = tmp_path / "log"
    with (
        pytest.raises(ServerError, match="ended with status 3 while starting"),
        served("some/model", ["--dtype", "float32"], log, name="demo"),
    ):
        pytest.fail("the server was taken for healthy")
    printed = log.read_text()
    assert "'serve', 'some/model', '--served-model-name', 'demo', '--host'" in printed
    assert "'--dtype', 'float32']" in printed

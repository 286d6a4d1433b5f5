"""A whole decoding step through the kernels equals the loop over rows, and PyTorch's path."""

import pytest
import torch

from tests.decoding.test_batch_decoder import REQUESTS, Request, decode, expected, mixed_batch

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("request_", REQUESTS)
def test_one_request_equals_the_loop(request_: Request) -> None:
    assert decode([request_])[0].tolist() == expected(request_)


@pytest.mark.parametrize(("chunk", "wide"), [(10**6, None), (64, 3)])
def test_mixed_batch_equals_pytorch(
    chunk: int, wide: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some of them: the interpreter takes a second for each, and all are tested alone.
    requests = [r for r in mixed_batch() if r.dtype == torch.float32][::4]
    through_kernels = [tokens.tolist() for tokens in decode(requests, chunk, wide)]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert [tokens.tolist() for tokens in decode(requests, chunk, wide)] == through_kernels

"""A real `vllm serve` for tests, with a tokenizer made up for the golden checkpoint."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from examples.local_server import served
from tests.engine.golden_cases import GOLDEN, GoldenCase
from tests.engine.reuse_cases import ReuseCase
from tests.golden.parallel_cases import ParallelCase

MODEL_NAME = "golden"

# At the lengths of the tests dense attention would be faster on a GPU.
SPARSED = {"block_size": 16, "select": 0.5, "dense_if_faster": False}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: without /v1.
        log: what it printed so far.
    """

    url: str
    log: Path

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=600)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30)

    def complete(
        self, case: GoldenCase | ParallelCase | ReuseCase, **changes: Any
    ) -> dict[str, Any]:
        """The only choice of a golden case's completion, with `changes` to its body."""
        response = self.post("/v1/completions", completion_body(case, **changes))
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples called `name` that carry the labels.

        Raises:
            KeyError: there is none.
        """
        values = [
            sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(name)
        return float(sum(values))


def completion_body(case: GoldenCase | ParallelCase | ReuseCase, **changes: Any) -> dict[str, Any]:
    """A golden case as the body of /v1/completions; a change to None leaves the field out."""
    body = {
        "model": MODEL_NAME,
        "prompt": case.prompt,
        "max_tokens": case.params["gen"],
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": case.extra_args,
        **changes,
    }
    return {key: value for key, value in body.items() if value is not None}


def make_checkpoint(folder: Path, model: str = "llada-mha") -> Path:
    """A copy of a golden checkpoint with a word-level tokenizer: token i is the word `w<i>`."""
    path = folder / model
    path.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / model / name, path / name)
    return add_tokenizer(path)


def add_tokenizer(path: Path, with_template: bool = True) -> Path:
    """Put that tokenizer into a checkpoint of 384 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(384)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w1",
        eos_token="w2",
        pad_token="w2",
        mask_token="w383",
    )
    if with_template:
        fast.chat_template = (
            "{% for m in messages %}w10 {{ m['content'] }} w11 {% endfor %}"
            "{% if add_generation_prompt %}w12 {% endif %}"
        )
    fast.save_pretrained(path)
    return path


@contextlib.contextmanager
def serve(model: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Run `vllm serve` until the block ends.

    Raises:
        ServerError: it did not start; holds the end of its log.
    """
    usual = [
        *("--attention-backend", "sparsed", "--dtype", "float32", "--max-model-len", "640"),
        *("--additional-config", json.dumps({"sparsed": SPARSED})),
    ]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", **environment}
    with served(model, [*usual, *options], log, name=MODEL_NAME, environment=variables) as address:
        yield Server(address, log)

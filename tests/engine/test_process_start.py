"""Worker processes find the backend, whether they are spawned or forked."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.engine.golden_cases import GOLDEN, load_cases
from vllm_sparsed.attention.registration import BACKEND_CLASS


@pytest.fixture(scope="module")
def config() -> Any:
    arguments = EngineArgs(
        model=str(GOLDEN / "llada-mha"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=640,
        attention_backend="sparsed",
    )
    return arguments.create_engine_config()


def test_member_survives_pickling(config: Any) -> None:
    member = config.attention_config.backend
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    other = AttentionBackendEnum.CPU_ATTN
    assert pickle.loads(pickle.dumps(other)) is other


def test_configuration_is_read_where_no_plugin_was_loaded(config: Any) -> None:
    program = (
        "import pickle, sys\n"
        "assert 'vllm' not in sys.modules\n"
        "config = pickle.load(sys.stdin.buffer)\n"
        "member = config.attention_config.backend\n"
        "print(member.name, member.get_path())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(config),
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    assert result.stdout.decode().splitlines()[-1].split() == ["SPARSED", BACKEND_CLASS]


def _report(config: Any, pipe: Any) -> None:
    member = config.attention_config.backend
    pipe.send((member.name, member.get_path(), member is AttentionBackendEnum["SPARSED"]))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_configuration_reaches_a_child(config: Any, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(config, sender), daemon=True)
    child.start()
    assert receiver.poll(120)
    assert receiver.recv() == ("SPARSED", BACKEND_CLASS, True)
    child.join()
    assert child.exitcode == 0


FORKED_ENGINE = """
import json, multiprocessing, sys
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

model, prompt, args, num_tokens = json.loads(sys.argv[1])
options = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=640,
               max_num_batched_tokens=2048, attention_backend="sparsed",
               additional_config={"sparsed": {"block_size": 16, "select": 0.5,
                                             "dense_if_faster": False}})
EngineArgs(model=model, **options).create_engine_config()

def serve():
    llm = LLM(model, **options)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True,
                            detokenize=False, extra_args=args)
    output, = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    print("RESULT " + json.dumps(list(output.outputs[0].token_ids)), flush=True)

child = multiprocessing.get_context("fork").Process(target=serve)
child.start()
child.join(240)
if child.exitcode is None:
    child.kill()
    sys.exit("the engine did not end")
sys.exit(child.exitcode)
"""


def test_engine_runs_in_a_forked_process() -> None:
    """The plugin was loaded and the configuration built before the fork, as with
    VLLM_WORKER_MULTIPROC_METHOD=fork (which vLLM does not allow on CPUs)."""
    case = load_cases("llada-mha")[4]
    arguments = [str(GOLDEN / case.model), case.prompt, case.extra_args, case.params["gen"]]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", FORKED_ENGINE, json.dumps(arguments)],
        env={**env, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = next(line for line in result.stdout.splitlines() if line.startswith("RESULT "))
    assert json.loads(answer.removeprefix("RESULT ")) == case.expected

"""One rank of a tensor-parallel model, which writes its logits to a file.

python -m tests.models.parallel_logits FOLDER RANK RANKS RENDEZVOUS OUTPUT [expert]
"""

import sys
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs

from tests.models.loading import LoadedModel
from tests.models.test_forward import sequences
from vllm_sparsed.plugin import register


def main(folder: str, rank: str, ranks: str, rendezvous: str, output: str, *kind: str) -> None:
    """Load `folder` as rank `rank` of `ranks` and save the logits of `test_forward.sequences`."""
    register()
    arguments = {
        "tensor_parallel_size": int(ranks),
        "enable_expert_parallel": kind == ("expert",),
        "distributed_executor_backend": "external_launcher",
    }
    config = EngineArgs(
        folder, skip_tokenizer_init=True, dtype="float32", **arguments
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(int(ranks), int(rank), f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(int(ranks), 1)
    loaded = LoadedModel(Path(folder), **arguments)
    sizes = {name: parameter.numel() for name, parameter in loaded.model.named_parameters()}
    torch.save((loaded.logits(sequences()), sizes), f"{output}-{rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])

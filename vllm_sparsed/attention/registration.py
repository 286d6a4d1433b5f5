"""The backend's name in vLLM's registry, without importing the backend."""

from typing import Any, Final

BACKEND_NAME: Final = "SPARSED"
BACKEND_CLASS: Final = "vllm_sparsed.attention.backend.SparsedAttentionBackend"


def restore_backend() -> Any:
    """The SPARSED member of vLLM's backend enum, entered first where this process lacks it.

    Enum members pickle by value, and a spawned process unpickles the engine's configuration before
    it loads plugins: the member is therefore pickled as a call of this function.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_CLASS)
        member = AttentionBackendEnum[BACKEND_NAME]
        # On the instance: the other members keep the enum's own way of pickling.
        member.__dict__["__reduce_ex__"] = _reduce_backend
    return AttentionBackendEnum[BACKEND_NAME]


def _reduce_backend(protocol: int) -> tuple[Any, tuple[()]]:
    return restore_backend, ()

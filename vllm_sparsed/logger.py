"""Loggers of this package, below vLLM's: its settings of handlers and level hold for them too."""

import logging

from vllm import logger as vllm_logger


def init_logger(name: str) -> logging.Logger:
    """The logger of the module `name`, called `vllm.<name>`: vLLM configures only names below."""
    return vllm_logger.init_logger(f"vllm.{name}")

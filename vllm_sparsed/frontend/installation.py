"""Puts the middleware into the API server that this process is about to build."""

import logging

from vllm_sparsed.logger import init_logger

logger = init_logger(__name__)

_installed = False


def install_middleware() -> None:
    """Enter the middleware where vLLM's `build_app` looks for a container's own. May be repeated.

    vLLM hands each application to `model_hosting_container_standards`, one of its requirements,
    which adds the middleware that a process has registered there. A container that has a
    middleware of its own in that place keeps it, and this one is left out with a warning.
    """
    global _installed
    loggers = (logging.getLogger(), logging.getLogger("vllm"))
    levels = [(handler, handler.level) for log in loggers for handler in log.handlers]
    root_level = loggers[0].level
    try:
        # It sets levels of the root logger when it is imported; vLLM too puts them back.
        from model_hosting_container_standards.common.fastapi.middleware import custom_middleware

        from vllm_sparsed.frontend.middleware import RequestMiddleware

        if not _installed:
            custom_middleware("pre_post_process")(RequestMiddleware)
            _installed = True
    except Exception as error:
        logger.warning(
            "Streamed requests with bad parameters are answered with status 200 and the error in "
            "the stream, as the middleware of vllm_sparsed could not be installed: %s",
            error,
        )
    finally:
        loggers[0].setLevel(root_level)
        for handler, level in levels:
            handler.setLevel(level)

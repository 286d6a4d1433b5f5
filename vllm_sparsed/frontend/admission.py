"""What became of the HTTP request that is being handled: admitted to the engine, or refused.

The checks of a request and the middleware that answers it meet here. The checks run inside vLLM's
`InputProcessor`, in the context of the request's own task, so a context variable joins the two.
Offline, and for routes that the middleware does not serve, there is nothing to tell.
"""

from contextvars import ContextVar
from typing import Final, Protocol


class AdmissionListener(Protocol):
    """Whoever waits for the outcome of the checks."""

    def admitted(self) -> None:
        """The parameters of a request are good; its prompt is checked in the same call."""

    def refused(self, error: Exception) -> None:
        """A check raised `error`."""


LISTENER: Final[ContextVar[AdmissionListener | None]] = ContextVar("LISTENER", default=None)


def tell_admitted() -> None:
    listener = LISTENER.get()
    if listener is not None:
        listener.admitted()


def tell_refused(error: Exception) -> None:
    listener = LISTENER.get()
    if listener is not None:
        listener.refused(error)

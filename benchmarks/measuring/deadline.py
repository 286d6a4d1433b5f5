"""A time budget of a command."""

import math
import time


class Deadline:
    """Starts when it is made; without minutes it never passes."""

    def __init__(self, minutes: float | None = None) -> None:
        """Start the clock.

        Args:
            minutes: until the deadline; None: there is none.
        """
        self._started = time.perf_counter()
        self._seconds = math.inf if minutes is None else 60.0 * minutes

    @property
    def seconds_left(self) -> float:
        """Negative once it has passed."""
        return self._seconds - (time.perf_counter() - self._started)

    @property
    def passed(self) -> bool:
        return self.seconds_left <= 0

    @property
    def note(self) -> str:
        """Why something was not measured, as a table's note."""
        return f"not started: the {self._seconds / 60:g} minutes are used up"

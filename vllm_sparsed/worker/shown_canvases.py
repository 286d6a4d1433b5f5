"""Canvases for `GET /v1/canvases`, of running requests and of those that ended lately."""

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from vllm_sparsed.shown_canvas import ShownCanvas
from vllm_sparsed.worker.request_state import RequestState

KEPT: Final = 32
"""Ended requests whose canvas is kept, so that a viewer gets its last picture."""


class ShownCanvases:
    """Finds the canvases of a request by the id that its client knows."""

    def __init__(self) -> None:
        self._ended: OrderedDict[str, RequestState] = OrderedDict()

    def end(self, state: RequestState) -> None:
        """Keep the canvas of a request that has ended, if it may be shown."""
        if state.decided_in is not None:
            self._ended[state.request_id] = state
            if len(self._ended) > KEPT:
                self._ended.popitem(last=False)

    def find(self, running: Iterable[RequestState], request_id: str) -> list[ShownCanvas]:
        """The canvases of a request, in the order of its prompts and choices.

        Args:
            running: the requests that run now.
            request_id: as the client knows it.
        """
        pattern = _internal_ids(request_id)
        found: dict[tuple[int, int], ShownCanvas] = {}
        states = [(state, True) for state in self._ended.values()]
        # The later one counts: a request that was preempted runs again.
        states += [(state, False) for state in running if state.decided_in is not None]
        for state, finished in states:
            match = pattern.fullmatch(state.request_id)
            if match is not None:
                place = int(match["prompt"] or 0), int(match["index"] or 0)
                found[place] = _picture(state, place, finished)
        return [found[place] for place in sorted(found)]


def _internal_ids(request_id: str) -> re.Pattern[str]:
    """The ids that vLLM makes of a request's: `<index>_` before it for each of several choices, the
    prompt's number (completions alone) and eight random digits behind it."""
    prompt = r"(-(?P<prompt>\d{1,7}))?" if request_id.startswith("cmpl-") else r"(?P<prompt>)"
    return re.compile(rf"((?P<index>\d+)_)?{re.escape(request_id)}{prompt}(-[0-9a-f]{{8}})?")


def _picture(state: RequestState, place: tuple[int, int], finished: bool) -> ShownCanvas:
    assert state.decided_in is not None
    # With infilling the answer begins with the prompt, whose masks are filled too.
    canvas = slice(state.plan.first_output, None)
    tokens = [
        None if token == state.mask_token_id else token for token in state.tokens[canvas].tolist()
    ]
    decided_in = state.decided_in[canvas].tolist()
    return ShownCanvas(
        prompt=place[0],
        index=place[1],
        passes=state.num_passes,
        most_passes=state.plan.num_steps,
        sparse_from=state.first_sparse_pass,
        finished=finished,
        tokens=tokens,
        decided_in=[
            0 if token is None else number for token, number in zip(tokens, decided_in, strict=True)
        ],
    )

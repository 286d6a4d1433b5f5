"""The pages of running requests, taken from and given back to vLLM's block manager."""

from copy import copy

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from vllm_sparsed.attention.pages import PAGE_SIZE
from vllm_sparsed.planning.request_plan import RequestPlan


class RequestPages:
    """Gives a request all pages of its sequences at once: their lengths are known, so none grows.

    Attributes:
        num_pages: that requests may hold together.
    """

    def __init__(self, manager: KVCacheManager, num_blocks: int) -> None:
        """Prepare.

        Args:
            manager: vLLM's.
            num_blocks: of the store; vLLM holds one of them back.
        """
        self.num_pages = max(0, num_blocks - 1)
        self._manager = manager

    def needed(self, plan: RequestPlan) -> int:
        """Pages of a request; 0 where it keeps nothing, as one does whose pages never fit."""
        if plan.reuse is None:
            return 0
        pages = plan.num_sequences * -(-plan.seq_len // PAGE_SIZE)
        return pages if pages <= self.num_pages else 0

    def take(self, request: Request, plan: RequestPlan) -> bool:
        """Take the request's pages; False, and nothing taken, where too few are free."""
        needed = self.needed(plan)
        if needed == 0:
            return True
        if needed > self._manager.block_pool.get_num_free_blocks():
            return False
        for sequence in range(plan.num_sequences):
            # vLLM's watermark keeps room for requests to grow, which none does here.
            taken = self._manager.allocate_slots(
                _holder(request, sequence), plan.seq_len, has_scheduled_reqs=False
            )
            if taken is None:
                self.free(request)
                return False
        return True

    def block_ids(self, request: Request, plan: RequestPlan) -> tuple[list[int], ...]:
        """The request's pages, those of its sequences one after the other, as one group's."""
        if self.needed(plan) == 0:
            return ()
        pages: list[int] = []
        for sequence in range(plan.num_sequences):
            (ids,) = self._manager.get_block_ids(_holder(request, sequence).request_id)
            pages += ids
        return (pages,)

    def free(self, request: Request) -> None:
        """Give back what the request holds, if anything."""
        for sequence in range(2):
            self._manager.free(_holder(request, sequence))


def _holder(request: Request, sequence: int) -> Request:
    """The request under whose id vLLM counts the pages of one of its sequences."""
    if sequence == 0:
        return request
    holder = copy(request)
    holder.request_id = f"{request.request_id}/unconditional"
    return holder

"""Checks of a prompt's tokens: masks in it are to be filled only where that is asked for."""

from collections.abc import Sequence

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from vllm_sparsed.frontend.admission import INFILL, tell_refused


class MaskedDiffusionRenderer(HfRenderer):
    """vLLM's renderer of Hugging Face tokenizers.

    `InputProcessor` has it validate a prompt's tokens, offline and in a server, right after the
    request's parameters.
    """

    def validate_token_ids(self, token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        """As vLLM's; refuse masks where the request does not ask for infilling.

        Raises:
            VLLMValidationError: says where the first mask is.
        """
        try:
            mask = self.model_config.hf_config.mask_token_id
            if INFILL.get() is False and mask in token_ids:
                raise VLLMValidationError(
                    f"the prompt holds the mask token {self._shown(mask)} at position "
                    f"{list(token_ids).index(mask)}: set diffusion_infill to 1 in vllm_xargs to "
                    "have masks filled in and the whole sequence returned, or leave it out",
                    parameter=parameter or "prompt",
                )
            super().validate_token_ids(token_ids, parameter=parameter)
        except VLLMValidationError as error:
            tell_refused(error)
            raise

    def _shown(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        return f"{self.tokenizer.decode([token])} ({token})"

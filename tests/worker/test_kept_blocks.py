"""A request that keeps keys and values leaves no mask that its schedule has a step for."""

from dataclasses import replace

import numpy as np
import pytest

from tests.decoding.plain_engine import engine_settings, make_state
from vllm_sparsed.config.settings import EngineSettings

MASK = 383
SETTINGS = engine_settings(MASK, server={"diffusion": {"kv_reuse_pages": True}})
DREAM = replace(SETTINGS, logit_shift=True)


@pytest.mark.parametrize("mode", ["prefix", "dual", "window"])
@pytest.mark.parametrize("steps", [2, 3, 4, 8])
@pytest.mark.parametrize("alg", ["low_confidence", "random", "origin", "maskgit_plus"])
@pytest.mark.parametrize("settings", [SETTINGS, DREAM], ids=["llada", "dream"])
def test_all_is_decided(settings: EngineSettings, alg: str, steps: int, mode: str) -> None:
    parameters = {
        "diffusion_alg": alg,
        "diffusion_steps": steps,
        "diffusion_block_length": 4,
        "diffusion_kv_reuse": mode,
    }
    state = make_state(settings, [10, 11], 8, parameters, pages=[0])
    assert state.kept is not None
    for _ in range(steps):
        tokens = None
        if state.takes_pass():
            if state.kept.first_alone:
                assert state.unmask_probability() == 1.0
            tokens = np.full(state.judged.size, -1)
            tokens[: sum(selection.quota for selection in state.selections)] = 7
        state.commit(tokens)
    assert state.finished
    assert (state.tokens[2:] == 7).all()


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_first_position_that_stays_a_mask_is_refreshed(mode: str) -> None:
    """With Dream's shift the row before the block decides it, which windows lack."""
    parameters = {"diffusion_block_length": 4, "diffusion_kv_reuse": mode}
    state = make_state(DREAM, [10, 11], 8, parameters, pages=[0])
    assert state.kept is not None and state.kept.window is None
    assert state.judged.tolist() == [2]
    state.commit(np.array([MASK]))
    assert state.kept.window is None
    assert state.judged.tolist() == [2, 3, 4, 5]
    state.commit(np.array([7, -1, -1, -1]))
    assert state.kept.window is not None

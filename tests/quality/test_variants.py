"""Baselines, ablations and recorded patterns in a running engine, against the plain reference."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from benchmarks.quality.answering import Asking, answer_cases
from benchmarks.quality.cases import Case, make_cases
from benchmarks.quality.settings import DENSE, Setting
from benchmarks.quality.similarity import record_patterns
from benchmarks.quality.variants import block_mask, install
from benchmarks.reference.generate import Request, Step, generate_llada, output_tokens
from benchmarks.reference.models import ReferenceModel
from small_model.training.tokenizer import TURN_END
from tests.quality.variant_reference import VariantSequence, kept_blocks

STEPS = 32
ASKING = Asking(canvas=32)
SPARSE = Setting(0.3, 0.2, 16)
EARLY = Setting(0.3, None, 16, schedule="from_start")
EVERY_STEP = Setting(0.3, 0.2, 16, schedule="every_step")
SETTINGS = {
    "dense": DENSE,
    "sparsed": SPARSE,
    "window": Setting(0.3, 0.2, 16, "window"),
    "sink-window": Setting(0.3, 0.2, 16, "sink_window"),
    "shared-heads": Setting(0.3, 0.2, 16, "shared_heads"),
    "joint-selection": Setting(0.3, 0.2, 16, "joint_selection"),
    "from-start": EARLY,
    "window-from-start": Setting(0.3, None, 16, "window", "from_start"),
    "every-step": EVERY_STEP,
}


@pytest.fixture(scope="module")
def cases(llm: LLM) -> list[Case]:
    """Two lengths that are no multiple of a block."""
    tokenizer = llm.get_tokenizer()
    return make_cases(tokenizer, ["multi_key", "report"], [150, 203], 1, ASKING.canvas)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    """What a setting does to a case: the sequence and the steps, computed once."""
    model = ReferenceModel.load(checkpoint, torch.float64)

    @lru_cache
    def run(setting: Setting, prompt: tuple[int, ...]) -> tuple[VariantSequence, list[Step]]:
        sequence = VariantSequence(model, ASKING.canvas, STEPS, setting)
        request = Request(lambda: sequence, torch.tensor(prompt), ASKING.canvas, 0, False)
        steps = generate_llada(request, steps=STEPS, block_length=ASKING.canvas)
        return sequence, steps

    return run


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_answers_are_those_of_the_reference(
    llm: LLM, cases: list[Case], reference: Any, setting: Setting
) -> None:
    """All questions in one batch, the reference one by one in float64."""
    tokenizer = llm.get_tokenizer()
    ends = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END))
    for case, answered in zip(cases, answer_cases(llm, cases, setting, ASKING), strict=True):
        sequence, steps = reference(setting, tuple(case.prompt))
        request = Request(lambda: None, torch.tensor(case.prompt), ASKING.canvas, 0, False)
        tokens = output_tokens(request, steps)
        # An end token, which random weights may choose too, is the last one that vLLM gives.
        length = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        # vLLM holds back bytes that may be the start of a character.
        assert answered.text == text.rstrip("\N{REPLACEMENT CHARACTER}")
        decided = {p - len(case.prompt): step.index for step in steps for p in step.positions}
        # A mask whose candidate is the mask token stays one: it counts for the last step.
        assert answered.decided == [decided.get(place, 31) for place in range(length)]
        assert answered.steps == 32 or length < len(tokens)
        assert len(sequence.dense) == setting.first_sparse_step(32)
        if setting.is_dense:
            assert answered.density is None
        else:
            first = sequence.built[min(sequence.built)]
            assert answered.density == pytest.approx(float(first.double().mean()))


def test_from_start_has_no_dense_step(reference: Any, cases: list[Case]) -> None:
    """And so its answer is another one: what the test above compares means something."""
    prompt = tuple(cases[0].prompt)
    sequence, steps = reference(EARLY, prompt)
    assert sequence.dense == []
    assert list(sequence.built) == [0]
    assert [s.tokens for s in steps] != [s.tokens for s in reference(SPARSE, prompt)[1]]


def patterns_by_step(llm: LLM, case: Case, setting: Setting) -> dict[int, torch.Tensor]:
    """bool [layers, heads, n, n] in the store after each step, by the step."""
    from vllm import SamplingParams

    llm.collective_rpc(install, args=(setting,))
    extra = ASKING.extra_args(case, setting)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, extra_args=extra)
    llm.llm_engine.add_request("watched", {"prompt_token_ids": case.prompt}, params)
    (runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
    found = {}
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for state in runner.requests.values():
            if state.pattern_rows:
                (rows,) = state.pattern_rows
                lists, counts = runner.store.indices[:, rows], runner.store.counts[:, rows]
                found[state.step - 1] = block_mask(lists, counts, len(rows)).transpose(1, 2)
    return found


@pytest.mark.parametrize("setting", list(SETTINGS.values())[1:], ids=list(SETTINGS)[1:])
def test_patterns_are_those_of_the_reference(
    llm: LLM, cases: list[Case], reference: Any, setting: Setting
) -> None:
    case = cases[1]
    found = patterns_by_step(llm, case, setting)
    built = reference(setting, tuple(case.prompt))[0].built
    assert list(found) == list(range(min(built), 32))
    for step, pattern in found.items():
        assert torch.equal(pattern, built[max(b for b in built if b <= step)])
    if setting.pattern == "shared_heads":
        assert torch.equal(found[31], found[31][:, :1].expand_as(found[31]))


def test_density_is_that_of_sparsed_in_every_row(llm: LLM, cases: list[Case]) -> None:
    wanted = patterns_by_step(llm, cases[0], SPARSE)[7].sum(dim=-1)
    assert wanted.unique().numel() > 1
    for name in ("window", "sink-window", "joint-selection"):
        pattern = patterns_by_step(llm, cases[0], SETTINGS[name])[7]
        assert torch.equal(pattern.sum(dim=-1), wanted)


def test_patterns_are_rebuilt(llm: LLM, cases: list[Case]) -> None:
    """The one of the last dense step is SparseD's; later ones are others."""
    rebuilt = patterns_by_step(llm, cases[0], EVERY_STEP)
    reused = patterns_by_step(llm, cases[0], SPARSE)
    assert torch.equal(rebuilt[7], reused[7])
    assert torch.equal(reused[31], reused[7])
    assert not torch.equal(rebuilt[31], rebuilt[7])


@pytest.mark.parametrize("schedule", ["reuse", "every_step", "from_start"])
def test_all_blocks_are_dense_attention(llm: LLM, cases: list[Case], schedule: str) -> None:
    whole = Setting(1.0, None if schedule == "from_start" else 0.2, 16, schedule=schedule)
    answered = answer_cases(llm, cases, whole, ASKING)
    dense = answer_cases(llm, cases, DENSE, ASKING)
    assert [a.text for a in answered] == [a.text for a in dense]
    assert [a.decided for a in answered] == [a.decided for a in dense]
    assert {a.density for a in answered} == {1.0}


def test_recorded_patterns(llm: LLM, cases: list[Case], reference: Any) -> None:
    """Of a dense run, in every step; the engine is left as it was, with all its rows."""
    case = cases[0]
    recorded = record_patterns(llm, case, SPARSE, ASKING)
    blocks = -(-(len(case.prompt) + ASKING.canvas) // 16)
    assert recorded.shape == (32, 2, 4, blocks, blocks)
    model = reference(SPARSE, tuple(case.prompt))[0].model
    steps = reference(DENSE, tuple(case.prompt))[1]
    for step in (0, 1, 31):
        layers = model.logits(steps[step].before)[1]
        wanted = torch.stack([kept_blocks(layer, ASKING.canvas, SPARSE) for layer in layers])
        assert torch.equal(recorded[step], wanted)
    answered = answer_cases(llm, [case], DENSE, ASKING)
    assert answered[0].density is None
    (store,) = llm.collective_rpc(lambda worker: worker.model_runner.store)
    assert store.num_free_rows == store.size.total_rows

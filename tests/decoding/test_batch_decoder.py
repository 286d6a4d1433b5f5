"""A batch's decoding step against a loop over requests and rows, written from the papers' loops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sparsed.config.parameter_table import PACES
from vllm_sparsed.decoding import NOT_FINITE
from vllm_sparsed.decoding.batch_decoder import BatchDecoder, Candidates
from vllm_sparsed.decoding.paces import RULES, ranking_of
from vllm_sparsed.decoding.rng import Stream, uniform

VOCAB, MASK, EOS, EOT = 37, 36, 2, 5
ALGORITHMS = ("low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy")
DREAM_RANKED = ("maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class Request:
    alg: str
    num_rows: int = 12
    take: int = 5
    pace: str | None = None
    bound: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    alg_temp: float = 0.0
    cfg_scale: float = 0.0
    probability: float = 1.0
    seed: int = 7
    step: int = 3
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    dtype: torch.dtype = torch.float32

    def positions(self) -> range:
        return range(100 + self.seed % 11, 100 + self.seed % 11 + 3 * self.num_rows, 3)

    def logits(self, guidance: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed % 1000 + 5000 * guidance)
        logits = 2 * torch.randn(self.num_rows, VOCAB, generator=generator)
        # Often the argmax, so that the options about it matter.
        logits[:, [EOS, EOT, MASK]] += 2
        return logits.to(self.dtype)


def decode(
    requests: Sequence[Request], chunk: int = 1000, wide: int | None = None, device: str = "cpu"
) -> list[Tensor]:
    """Run one batch; the hidden states are the logits."""

    def numbers(value: Callable[[Request], float], dtype: type = np.float64) -> np.ndarray:
        return np.array([value(r) for r in requests], dtype=dtype)

    sizes = [r.num_rows for r in requests]
    request = np.repeat(np.arange(len(requests), dtype=np.int32), sizes)
    candidates = Candidates(
        request=request,
        group=request,
        position=np.concatenate([np.array(r.positions(), dtype=np.int32) for r in requests]),
        rule=numbers(lambda r: 0 if r.pace is None else RULES[r.pace], np.int64),
        quota=numbers(lambda r: r.take, np.int64),
        bound=numbers(lambda r: r.bound),
        rankings=tuple(ranking_of(r.alg, r.pace) for r in requests),
        temperature=numbers(lambda r: r.temperature),
        top_p=numbers(lambda r: r.top_p),
        top_k=numbers(lambda r: r.top_k, np.int64),
        alg_temp=numbers(lambda r: r.alg_temp),
        seed=numbers(lambda r: r.seed, np.int64),
        step=numbers(lambda r: r.step, np.int64),
        probability=numbers(lambda r: r.probability),
        cfg_scale=numbers(lambda r: r.cfg_scale),
        logits_eos_inf=numbers(lambda r: r.logits_eos_inf, bool),
        confidence_eos_eot_inf=numbers(lambda r: r.confidence_eos_eot_inf, bool),
    )
    decoder = BatchDecoder(
        vocab_size=VOCAB,
        mask_token_id=MASK,
        eos_token_id=EOS,
        eot_token_id=EOT,
        device=device,
        max_chunk_rows=chunk,
    )
    if wide is not None:
        decoder._wide_rows = wide
    guided = [r.logits(guidance=True) for r in requests if r.cfg_scale > 0]

    def compute_logits(hidden: Tensor) -> Tensor:
        assert 1 <= hidden.shape[0] <= chunk
        return hidden

    tokens = decoder.decode(
        candidates,
        torch.cat([r.logits() for r in requests]).to(device),
        torch.cat(guided).to(device) if guided else None,
        compute_logits,
    )
    assert tokens.dtype == torch.int64
    return list(tokens.cpu().split(sizes))


def draws(request: Request, position: int, stream: Stream, columns: int | None = None) -> Tensor:
    seed, step, place = (torch.tensor([x]) for x in (request.seed, request.step, position))
    return uniform(seed, step, place, stream, columns)[0]


def expected(request: Request) -> list[int]:
    """The reference: one row after the other."""
    candidates, confidences = [], []
    guidance = request.logits(guidance=True).float()
    for row, (position, logits) in enumerate(
        zip(request.positions(), request.logits().float(), strict=True)
    ):
        if request.cfg_scale > 0:
            logits = guidance[row] + (request.cfg_scale + 1) * (logits - guidance[row])
        if request.logits_eos_inf:
            logits = logits.clone()
            logits[EOS] = -torch.inf
        plain = logits.softmax(0)
        shaped = logits / request.temperature if request.temperature > 0 else logits
        shaped = cut(shaped, request.top_p, request.top_k)
        if request.temperature > 0:
            noise = (
                -draws(request, position, Stream.CANDIDATE, VOCAB).log()
            ) ** request.temperature
            scores = logits.double().exp() / noise
            scores[shaped == -torch.inf] = 0
            candidate = int(scores.argmax())
        else:
            candidate = int(logits.argmax())
        probabilities = shaped.softmax(0)
        first, second = probabilities.sort(descending=True).values[:2].tolist()
        plain_first, plain_second = plain.sort(descending=True).values[:2].tolist()
        plain_entropy = float(plain[plain > 0] @ plain[plain > 0].log())
        confidence = {
            "low_confidence": lambda c=candidate, p=plain: float(p[c]),
            "random": lambda q=position: float(draws(request, q, Stream.RANDOM_ORDER)),
            "origin": lambda: 0.0,
            "maskgit_plus": lambda c=candidate, p=probabilities: float(p[c]),
            "topk_margin": lambda a=first, b=second: a - b,
            "entropy": lambda p=probabilities: float(p[p > 0] @ p[p > 0].log()),
            "factor": lambda c=candidate, p=plain: float(p[c]),
            "threshold": lambda a=plain_first, b=plain_second, c=candidate, p=plain: (
                a - b if request.alg == "topk_margin" else float(p[c])
            ),
            "entropy_bound": lambda e=plain_entropy: e,
            "entropy_threshold": lambda e=plain_entropy: e,
        }[request.pace or request.alg]()
        if request.alg_temp > 0:
            uniforms = draws(request, position, Stream.ORDER_NOISE)
            confidence = confidence / request.alg_temp - float((-uniforms.log()).log())
        if request.confidence_eos_eot_inf and candidate in (EOS, EOT):
            confidence = -np.inf
        candidates.append(candidate)
        confidences.append(confidence)
    ranking = sorted(range(request.num_rows), key=lambda i: (-confidences[i], i))
    tokens = [-1] * request.num_rows
    if request.pace is not None:
        ranking = [i for i in ranking if candidates[i] != MASK]
        entropies = 0.0
        for n, row in enumerate(ranking, start=1):
            sure = {
                "threshold": confidences[row] >= request.bound,
                "factor": confidences[row] >= 1 - request.bound / (n + 1),
                "entropy_bound": entropies <= request.bound and confidences[row] > -np.inf,
                "entropy_threshold": -confidences[row] < request.bound,
            }[request.pace]
            entropies -= confidences[row]
            if n <= request.take or sure:
                tokens[row] = candidates[row]
        return tokens
    for row in ranking[: request.take]:
        if draws(request, request.positions()[row], Stream.ORIGIN) < request.probability:
            tokens[row] = candidates[row]
    return tokens


def cut(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """top_p, then top_k: the token that passes the threshold stays, and so do ties of the k-th."""
    logits = logits.clone()
    if top_p < 1:
        probabilities = logits.softmax(0)
        total = 0.0
        for token in logits.sort(descending=True, stable=True).indices.tolist():
            if total > top_p:
                logits[token] = -torch.inf
            total += float(probabilities[token])
    if top_k > 0:
        kth = logits.sort(descending=True).values[min(top_k, VOCAB) - 1]
        logits[logits < kth] = -torch.inf
    return logits


VARIANTS = {
    "greedy": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 5.0, "seed": -(2**62)},
    "top_p": {"top_p": 0.6},
    "top_p-temperature": {"top_p": 0.6, "temperature": 1.3},
    "top_p-one-token": {"top_p": 1e-6, "temperature": 1.0},
    "top_k": {"top_k": 3},
    "top_k-one": {"top_k": 1, "temperature": 2.0},
    "top_k-beyond-vocabulary": {"top_k": 1000, "temperature": 0.7},
    "top_p-top_k-temperature": {"top_p": 0.9, "top_k": 4, "temperature": 1.1},
    "alg_temp": {"alg_temp": 0.5},
    "alg_temp-temperature": {"alg_temp": 2.0, "temperature": 0.4},
    "guidance": {"cfg_scale": 1.5},
    "guidance-temperature": {"cfg_scale": 0.3, "temperature": 1.0, "dtype": torch.bfloat16},
    "no-eos": {"logits_eos_inf": True},
    "no-eos-temperature": {"logits_eos_inf": True, "temperature": 1.0},
    "ends-last": {"confidence_eos_eot_inf": True},
    "ends-last-all-taken": {"confidence_eos_eot_inf": True, "take": 12},
    "chance": {"probability": 0.4, "take": 12},
    "one-row": {"num_rows": 1, "take": 1},
    "none-taken": {"take": 0},
    "more-than-there-are": {"take": 99},
    "max-seed": {"seed": 2**63 - 1, "temperature": 1.0},
}
PACED = {
    "low": {"take": 1, "bound": 0.15},
    "middle": {"take": 1, "bound": 0.3},
    "high": {"take": 0, "bound": 0.6},
    "nats": {"take": 1, "bound": 2.3},
    "many-nats": {"take": 1, "bound": 9.0},
    "temperature": {"take": 1, "bound": 0.2, "temperature": 0.9},
    "top_p-temperature": {"take": 1, "bound": 2.0, "temperature": 1.5, "top_p": 0.7},
    "top_k-temperature": {"take": 1, "bound": 2.0, "temperature": 1.5, "top_k": 3},
    "guidance": {"take": 1, "bound": 0.5, "cfg_scale": 1.5},
    "no-eos": {"take": 1, "bound": 1.5, "logits_eos_inf": True},
    "ends-last": {"take": 1, "bound": 1.8, "confidence_eos_eot_inf": True},
    "one-row": {"take": 1, "num_rows": 1},
}
REQUESTS = [
    pytest.param(Request(alg, **variant), id=f"{alg}-{name}")
    for alg in ALGORITHMS
    for name, variant in VARIANTS.items()
] + [
    pytest.param(Request(alg, pace=pace, **variant), id=f"{alg}-{pace}-{name}")
    for pace, algs in PACES.items()
    for alg in (algs[0], "topk_margin")
    for name, variant in PACED.items()
]


@pytest.mark.parametrize("request_", REQUESTS)
def test_one_request_equals_the_loop(request_: Request) -> None:
    assert decode([request_])[0].tolist() == expected(request_)


@pytest.mark.gpu
@pytest.mark.parametrize("request_", REQUESTS)
def test_one_request_equals_the_loop_on_gpu(request_: Request) -> None:
    assert decode([request_], device="cuda")[0].tolist() == expected(request_)


@pytest.mark.gpu
@pytest.mark.parametrize(("chunk", "wide"), [(10**6, None), (64, 3)])
def test_mixed_batch_on_gpu_equals_each_alone_on_cpu(chunk: int, wide: int | None) -> None:
    requests = [replace(r, dtype=torch.float32) for r in mixed_batch()]
    alone = [decode([r])[0].tolist() for r in requests]
    assert [tokens.tolist() for tokens in decode(requests, chunk, wide, "cuda")] == alone


def mixed_batch() -> list[Request]:
    requests = [param.values[0] for param in REQUESTS]
    generator = np.random.default_rng(0)
    return [
        replace(requests[i], num_rows=int(generator.integers(1, 20)), step=int(i))
        for i in generator.permutation(len(requests))
    ]


@pytest.mark.parametrize(("chunk", "wide"), [(10**6, None), (64, 3), (7, 1), (1, 1)])
def test_mixed_batch_equals_each_alone(chunk: int, wide: int | None) -> None:
    # bfloat16 logits cannot be concatenated with float32 ones as one batch's hidden states.
    requests = [replace(r, dtype=torch.float32) for r in mixed_batch()]
    alone = [decode([r])[0].tolist() for r in requests]
    assert [tokens.tolist() for tokens in decode(requests, chunk, wide)] == alone


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_batch_of_one_treatment_equals_the_loop(alg: str) -> None:
    requests = [Request(alg, num_rows=n, take=n // 2 + 1, seed=n) for n in (1, 2, 17, 5)]
    assert [t.tolist() for t in decode(requests, chunk=4)] == [expected(r) for r in requests]


@pytest.mark.parametrize("alg", ["low_confidence", *DREAM_RANKED])
def test_equal_confidence_takes_the_lowest_position(alg: str, monkeypatch) -> None:
    # Saturated rows: every confidence is the same float.
    saturated = torch.full((6, VOCAB), -200.0)
    saturated[torch.arange(6), torch.arange(6) + 10] = 200.0
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: saturated)
    both = [Request(alg, num_rows=6, take=2), Request(alg, num_rows=6, take=3)]
    assert [t.tolist() for t in decode(both)] == [
        [10, 11, -1, -1, -1, -1],
        [10, 11, 12, -1, -1, -1],
    ]


def test_rows_in_any_position_order_decide_alike(monkeypatch) -> None:
    request = Request("low_confidence", num_rows=9, take=4, temperature=1.0)
    tokens = expected(request)
    logits, positions = request.logits(), list(request.positions())
    shuffled = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: logits[shuffled])
    monkeypatch.setattr(Request, "positions", lambda self: [positions[i] for i in shuffled])
    assert decode([request])[0].tolist() == [tokens[i] for i in shuffled]


def test_mask_token_is_a_candidate_like_any_other(monkeypatch) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, MASK], logits[1, 9], logits[2, 9] = 9.0, 8.0, 7.0
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: logits)
    assert decode([Request("low_confidence", num_rows=3, take=2)])[0].tolist() == [MASK, 9, -1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 5}])
@pytest.mark.parametrize("alg", ALGORITHMS)
def test_logits_that_are_not_finite_are_told(
    alg: str, options: dict[str, float], value: float, monkeypatch
) -> None:
    broken = Request(alg).logits()
    broken[[0, 4], [3, 30]] = value
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: broken)
    (tokens,) = decode(
        [Request(alg, take=12, alg_temp=0.5, confidence_eos_eot_inf=True, **options)]
    )
    assert (tokens == NOT_FINITE).nonzero()[:, 0].tolist() == [0, 4]


@pytest.mark.parametrize("pace", PACES)
def test_paces_pass_the_mask_token_over(pace: str, monkeypatch) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, MASK], logits[1, 9], logits[2, 8] = 9.0, 8.0, 7.0
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: logits)
    sure = {"threshold": 0.1, "factor": 3.0, "entropy_bound": 99.0, "entropy_threshold": 9.0}
    one = Request("low_confidence", num_rows=3, take=1, pace=pace, bound=1e-9)
    if pace == "threshold":
        one = replace(one, bound=1.0)
    every = replace(one, bound=sure[pace])
    logits_of_masks = torch.zeros(3, VOCAB)
    logits_of_masks[:, MASK] = 9.0
    assert [t.tolist() for t in decode([one, every])] == [[-1, 9, -1], [-1, 9, 8]]
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: logits_of_masks)
    assert [t.tolist() for t in decode([one, every])] == [[-1, -1, -1]] * 2


def test_large_logits_and_temperatures_do_not_overflow(monkeypatch) -> None:
    logits = torch.tensor([[3e4] + [-3e4] * (VOCAB - 1)])
    monkeypatch.setattr(Request, "logits", lambda self, guidance=False: logits)
    for alg in ALGORITHMS:
        cold = Request(alg, num_rows=1, take=1, temperature=0.01)
        assert decode([cold])[0].tolist() == [0]
        hot = replace(cold, temperature=1e300, top_k=2)
        assert 0 <= int(decode([hot])[0]) < VOCAB


class NothingWaits(TorchDispatchMode):
    """Refuses the operations that make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "nonzero" not in name, name
        assert "masked_select" not in name, name
        assert "unique" not in name, name
        if name.startswith(("aten::index.", "aten::index_put")):
            assert all(index.dtype != torch.bool for index in args[1] if index is not None), name
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits() -> None:
    requests = [replace(r, dtype=torch.float32) for r in mixed_batch()]
    with NothingWaits():
        tokens = decode(requests, chunk=64)
    assert any((t >= 0).any() for t in tokens)


def test_no_rows() -> None:
    assert decode([Request("entropy", num_rows=0)])[0].tolist() == []


@pytest.mark.parametrize(
    "bad",
    [
        {"mask_token_id": VOCAB},
        {"eos_token_id": -1},
        {"eot_token_id": VOCAB},
        {"max_chunk_rows": 0},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_set_up_is_refused(bad: dict[str, int]) -> None:
    good = {
        "vocab_size": VOCAB,
        "mask_token_id": MASK,
        "eos_token_id": None,
        "eot_token_id": None,
        "device": "cpu",
        "max_chunk_rows": 1,
    }
    BatchDecoder(**good)
    with pytest.raises(ValueError, match=r"special tokens|max_chunk_rows"):
        BatchDecoder(**(good | bad))


def test_guidance_needs_its_own_hidden_states(monkeypatch) -> None:
    logits = Request("low_confidence").logits()
    monkeypatch.setattr(
        Request, "logits", lambda self, guidance=False: logits[:5] if guidance else logits
    )
    with pytest.raises(
        ValueError, match="12 candidates, 12 of them guided, but 12 and 5 hidden states"
    ):
        decode([Request("low_confidence", cfg_scale=1.0)])

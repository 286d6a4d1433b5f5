"""The candidates of one step, as the host knows them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_sparsed.decoding.algorithms import Ranking


@dataclass(frozen=True, slots=True)
class Candidates:
    """Masked positions that one step may decide: R candidates of B requests in K groups.

    A group's candidates are of one request and compete with each other.

    Attributes:
        request: int32 [R], ascending index into the attributes of [B].
        group: int32 [R], ascending index into those of [K].
        position: int32 [R], position within the sequence; distinct within a request.
        rule: int64 [K], `Rule`.
        quota: int64 [K], how many of a group's best are decided by any rule.
        bound: float64 [K], of its rule.
        rankings: [B], what orders the candidates.
        temperature: float [B]; below 1e-5 a candidate's token is the argmax.
        top_p: float [B]; 1 or more: off.
        top_k: int [B]; 0 or less: off.
        alg_temp: float [B], temperature of the order.
        seed: int64 [B].
        step: int [B], coordinate of the random numbers.
        probability: float [B], with which each of those counted is decided.
        cfg_scale: float [B], guidance; 0: none.
        logits_eos_inf: bool [B].
        confidence_eos_eot_inf: bool [B].
    """

    request: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    rule: npt.NDArray[np.int64]
    quota: npt.NDArray[np.int64]
    bound: npt.NDArray[np.float64]
    rankings: tuple[Ranking, ...]
    temperature: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    alg_temp: npt.NDArray[np.float64]
    seed: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float64]
    cfg_scale: npt.NDArray[np.float64]
    logits_eos_inf: npt.NDArray[np.bool_]
    confidence_eos_eot_inf: npt.NDArray[np.bool_]

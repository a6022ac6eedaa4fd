"""The Gittins index of requests whose output lengths are known in distribution only.

Gittins and Jones 1974; for jobs of unknown size Sevcik, JACM 21, 1974, and Aalto, Ayesta and Righter, Queueing Systems
63, 2009. On one server that may preempt at will it is optimal for the mean of costs that grow by a constant rate each:
no policy that does not know the lengths does better. For costs that grow faster and faster the rate of the moment takes
its place, as in the generalized c-mu rule (Van Mieghem, Annals of Applied Probability 5, 1995).
"""

from __future__ import annotations

import numpy as np

from fastserve.policies.gittins.lengths import Stages
from fastserve.policies.gittins.queue import FIRST_OF_ALL, Index


def gittins_index(
    stages: Stages,
    hazards: np.ndarray,
    *,
    token_costs: np.ndarray,
    setup_costs: np.ndarray,
    length_power: float,
    step_s: float,
) -> Index:
    """The index at the beginning of each stage, as an `Index` with one more row: nothing beats level 0.

    `hazards[s]` is the probability that a request that reaches stage s finishes in it. `token_costs[s]` is the machine
    time of a token there (s), `setup_costs[s, state]` that before the first token. A request of n output tokens that
    leaves after t seconds costs t^p / n^length_power, so that each second it stays costs more by about
    p t^(p-1) / n^length_power: that is the relief its finishing brings, of which this is the part that does not depend
    on t. Served without pause it will be older by its remaining tokens, of `step_s` seconds each: its lead. Weight and
    lead are taken at the best stage to give up after, for an old request.
    """
    starts = np.array(stages.starts, dtype=float)
    lengths = stages.final_lengths
    log_survival = np.concatenate(([0.0], np.cumsum(np.log1p(-np.minimum(hazards[:-1], 1 - 1e-12)))))
    # Rows: where it stands; columns: the stage in which it finishes, or is given up at the end of.
    is_ahead = np.tri(len(stages), dtype=bool).T
    reaches = np.where(is_ahead, np.exp(np.minimum(log_survival[None, :] - log_survival[:, None], 0.0)), 0.0)
    relief = reaches * (hazards * lengths**-length_power)
    remaining_s = (lengths[None, :] - starts[:, None]) * step_s
    tokens = hazards * (lengths - starts) + (1 - hazards) * stages.tokens_through
    total_relief = np.cumsum(relief, axis=1)
    total_cost = np.cumsum(reaches * (tokens * token_costs), axis=1)
    total_lead = np.cumsum(relief * remaining_s, axis=1)
    ratios = total_relief[:, :, None] / (np.where(is_ahead, total_cost, np.inf)[:, :, None] + setup_costs[:, None, :])
    best = ratios.argmax(axis=1)
    rows = np.arange(len(stages))[:, None]
    log_weights = np.zeros((len(stages) + 1, setup_costs.shape[1]))
    leads_s = np.full_like(log_weights, step_s)
    log_weights[FIRST_OF_ALL + 1 :] = np.log(ratios.max(axis=1))
    leads_s[FIRST_OF_ALL + 1 :] = total_lead[rows, best] / total_relief[rows, best]
    return Index(log_weights, leads_s)

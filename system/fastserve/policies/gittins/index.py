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


class GittinsIndex:
    """Computes indices; what does not depend on what was learned is computed once.

    A request of n output tokens that leaves after t seconds costs t^p / n^length_power, so that each second it stays
    costs more by about p t^(p-1) / n^length_power: that is the relief its finishing brings, of which the weight is the
    part that does not depend on t. Served without pause it will be older by its remaining tokens, of `step_s` seconds
    each: its lead. Weight and lead are taken at the best stage to give up after, for an old request.
    """

    def __init__(self, stages: Stages, length_power: float, step_s: float) -> None:
        starts = np.array(stages.starts, dtype=float)
        lengths = stages.final_lengths
        self._stages = stages
        self._step_s = step_s
        self._relief = lengths**-length_power
        # Rows: where it stands; columns: the stage in which it finishes, or is given up at the end of.
        self._is_ahead = np.tri(len(stages), dtype=bool).T
        self._is_behind = ~self._is_ahead
        self._remaining_s = (lengths[None, :] - starts[:, None]) * step_s
        self._tokens_to_finish = lengths - starts
        self._rows = np.arange(len(stages))

    def compute(self, hazards: np.ndarray, token_costs: np.ndarray, setup_costs: np.ndarray) -> Index:
        """The index at the beginning of each stage, as an `Index` with one more row: nothing beats level 0.

        `hazards[s]` is the probability that a request that reaches stage s finishes in it. `token_costs[s]` is the
        machine time of a token there (s), `setup_costs[s, state]` that before the first token.
        """
        stages, is_ahead, is_behind, rows = self._stages, self._is_ahead, self._is_behind, self._rows
        log_survival = np.zeros(len(stages))
        np.add.accumulate(np.log1p(-np.minimum(hazards[:-1], 1 - 1e-12)), out=log_survival[1:])
        reaches = np.exp(np.minimum(log_survival[None, :] - log_survival[:, None], 0.0))
        reaches *= is_ahead
        relief = reaches * (hazards * self._relief)
        tokens = hazards * self._tokens_to_finish + (1 - hazards) * stages.tokens_through
        total_relief = np.add.accumulate(relief, axis=1)
        total_cost = np.add.accumulate(reaches * (tokens * token_costs), axis=1)
        total_lead = np.add.accumulate(relief * self._remaining_s, axis=1)
        total_cost[is_behind] = np.inf
        num_states = setup_costs.shape[1]
        best_ratios = np.empty((len(stages), num_states))
        leads_s = np.empty((len(stages) + 1, num_states))
        leads_s[FIRST_OF_ALL] = self._step_s
        for state in range(num_states):
            ratios = total_relief / (total_cost + setup_costs[:, state, None])
            best = ratios.argmax(axis=1)
            best_ratios[:, state] = ratios[rows, best]
            leads_s[FIRST_OF_ALL + 1 :, state] = total_lead[rows, best] / total_relief[rows, best]
        log_weights = np.zeros_like(leads_s)
        log_weights[FIRST_OF_ALL + 1 :] = np.log(best_ratios)
        return Index(log_weights, leads_s)

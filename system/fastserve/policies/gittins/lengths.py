"""What finished requests tell about the lengths of others: hazards by progress, learned online."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np


class Stages:
    """Progress in steps: stage s begins when `starts[s]` output tokens are generated, and ends when stage s + 1 begins.

    Up to `exact` every token is a stage; then stages grow by a constant ratio, so that a few dozen reach any length.
    """

    def __init__(self, exact: int = 4, ratio: float = 1.5, longest: int = 1 << 17) -> None:
        starts = [0]
        while starts[-1] < longest:
            starts.append(max(starts[-1] + 1, round(starts[-1] * ratio) if starts[-1] >= exact else 0))
        self.starts = starts
        """Tokens. The last stage has no end; it counts as long as the tokens before it."""
        self.ends = [*starts[1:], 2 * starts[-1]]
        begin, end = np.array(starts, dtype=float), np.array(self.ends, dtype=float)
        self.tokens_through = end - begin
        """Tokens computed in a stage by a request that passes it."""
        self.final_lengths = (begin + 1 + end) / 2
        """Mean output tokens of a request that finishes in a stage, if each token is equally likely to be its last."""

    def __len__(self) -> int:
        return len(self.starts)

    def stage_of_finished(self, num_output_tokens: int) -> int:
        """The stage in which a request of so many output tokens finished."""
        return min(bisect_left(self.ends, num_output_tokens), len(self.starts) - 1)


class LengthHistory:
    """Hazards: of the requests that reached a stage, the share that finished in it, for each kind of request.

    Counting the requests that passed and that finished each stage is the actuarial estimate of survival: requests that
    still run count as far as they have come. So a burst, in which short requests finish first, causes no bias.
    The later an outcome, the more it counts: after `memory` more have finished, an old one weighs 1/e.

    A kind's hazard is drawn towards that of all kinds, and that towards a prior, each worth so many requests. The prior
    has no scale: a request that has come far is likely to go as far again (a Pareto tail with a median of `typical`
    tokens). For this case least attained service is right, which FastServe approximates.
    """

    def __init__(
        self,
        stages: Stages,
        memory: float,
        *,
        worth_of_all: float = 5.0,
        worth_of_prior: float = 1.0,
        typical: float = 256.0,
    ) -> None:
        self.stages = stages
        self.num_finished = 0
        self._growth = 1 + 1 / memory
        self._weight = 1.0
        """Of an outcome of now."""
        self._worth_of_all = worth_of_all
        self._worth_of_prior = worth_of_prior
        ends, starts = np.array(stages.ends, dtype=float), np.array(stages.starts, dtype=float)
        self._prior = 1 - (starts + typical) / (ends + typical)
        self._finished: list[np.ndarray] = []
        self._passed: list[np.ndarray] = []
        self._all_finished = np.zeros(len(stages))
        self._all_passed = np.zeros(len(stages))

    def add_kind(self) -> None:
        """Add a kind."""
        self._finished.append(np.zeros(len(self.stages)))
        self._passed.append(np.zeros(len(self.stages)))

    def passed(self, kind: int, stage: int) -> None:
        """A request has come to the end of a stage and goes on."""
        self._passed[kind][stage] += self._weight
        self._all_passed[stage] += self._weight

    def finished(self, kind: int, stage: int) -> None:
        """A request has finished in a stage."""
        self._finished[kind][stage] += self._weight
        self._all_finished[stage] += self._weight
        self.num_finished += 1
        self._weight *= self._growth
        if self._weight > 1e100:
            self._rescale()

    def hazards(self, kind: int) -> np.ndarray:
        """The probability to finish in each stage, for a request that has reached it; 1 in the last."""
        of_prior = self._worth_of_prior * self._weight
        of_all = self._worth_of_all * self._weight
        together = self._all_finished + self._all_passed
        common = (self._all_finished + of_prior * self._prior) / (together + of_prior)
        reached = self._finished[kind] + self._passed[kind]
        hazards: np.ndarray = (self._finished[kind] + of_all * common) / (reached + of_all)
        hazards[-1] = 1.0
        return hazards

    def _rescale(self) -> None:
        for counts in (*self._finished, *self._passed, self._all_finished, self._all_passed):
            counts /= self._weight
        self._weight = 1.0


def kind_of_prompt(num_prompt_tokens: int) -> int:
    """The kind of a prompt: prompts of similar length share one; each doubling of the length has two."""
    return int(2 * math.log2(num_prompt_tokens))


def prompt_of_kind(kind: int) -> int:
    """A prompt length in the middle of a kind's."""
    return round(2 ** ((kind + 0.5) / 2))

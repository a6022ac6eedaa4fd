"""A sampled token depends on the request alone; the distribution is the one asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from fastserve.runtime.worker.extras import LogitChanges, RowExtras
from fastserve.runtime.worker.sampler import sample

VOCAB = 12


@dataclass
class Params:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = 0
    min_p: float = 0.0


def draws(logits: torch.Tensor, params: Params, count: int = 4000) -> torch.Tensor:
    """Frequencies of tokens over `count` positions."""
    tokens = sample(logits.expand(count, -1), [params] * count, range(count))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def logits_of(seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def test_zero_temperature_is_greedy() -> None:
    logits = logits_of(rows=5)
    params = [Params(temperature=0.0, seed=seed) for seed in range(5)]
    assert sample(logits, params, [3] * 5).tolist() == logits.argmax(-1).tolist()


def test_frequencies_follow_the_temperature() -> None:
    logits = logits_of()
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits / temperature).softmax(-1)[0]
        assert torch.allclose(draws(logits, Params(temperature=temperature)), expected, atol=0.03)


def test_tiny_temperature_is_finite_and_greedy() -> None:
    logits = logits_of() * 1000
    assert draws(logits, Params(temperature=1e-6))[logits.argmax()] == 1


def test_top_k_keeps_the_likeliest() -> None:
    logits = logits_of()
    frequencies = draws(logits, Params(top_k=3))
    kept = logits[0].topk(3).indices
    assert set(frequencies.nonzero().flatten().tolist()) == set(kept.tolist())
    assert torch.allclose(frequencies[kept], logits[0, kept].softmax(-1), atol=0.03)


@pytest.mark.parametrize("top_k", [None, 0, -1, VOCAB, 10**6])
def test_top_k_off_keeps_all(top_k: int | None) -> None:
    assert draws(torch.zeros(1, VOCAB), Params(top_k=top_k)).min() > 0


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert draws(logits, Params(top_p=0.6)).nonzero().flatten().tolist() == [0, 1]
    assert draws(logits, Params(top_p=0.85)).nonzero().flatten().tolist() == [0, 1, 2]
    assert draws(logits, Params(top_p=1e-9)).nonzero().flatten().tolist() == [0]


def test_token_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    logits = logits_of(rows=6, vocab=500)
    params = [Params(seed=s, temperature=t) for s, t in ((1, 1.0), (2, 0.7), (1, 0.0), (3, 2.0), (1, 1.0), (9, 0.9))]
    positions = [4, 4, 5, 900, 5, 0]
    together = sample(logits, params, positions).tolist()
    alone = [sample(logits[i : i + 1], [params[i]], [positions[i]]).item() for i in range(6)]
    backwards = sample(logits.flip(0), params[::-1], positions[::-1]).tolist()[::-1]
    assert together == alone == backwards


def test_seeds_and_positions_draw_independently() -> None:
    flat = torch.zeros(64, 1000)
    by_position = sample(flat, [Params(seed=1)] * 64, range(64)).tolist()
    by_seed = sample(flat, [Params(seed=s) for s in range(64)], [7] * 64).tolist()
    assert len(set(by_position)) > 50
    assert len(set(by_seed)) > 50


def test_no_seed_draws_anew() -> None:
    flat = torch.zeros(1, 100_000)
    assert len({sample(flat, [Params(seed=None)], [0]).item() for _ in range(20)}) > 10


def test_min_p_keeps_a_share_of_the_likeliest() -> None:
    logits = logits_of()
    probabilities = logits.softmax(-1)[0]
    for min_p in (0.05, 0.3, 1.0):
        frequencies = draws(logits, Params(min_p=min_p))
        kept = probabilities >= min_p * probabilities.max()
        assert set(frequencies.nonzero().flatten().tolist()) == set(kept.nonzero().flatten().tolist())
        assert torch.allclose(frequencies, probabilities * kept / probabilities[kept].sum(), atol=0.03)


def test_min_p_is_of_the_tempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    # exp(-1) is 0.37 of the likeliest, exp(-1 / 4) is 0.78.
    assert (draws(logits, Params(min_p=0.5)) > 0).sum() == 1
    assert (draws(logits, Params(min_p=0.5, temperature=4.0)) > 0).sum() == 3


CHANGES = {
    "allowed": (
        LogitChanges(allowed=(3, 7, 9)),
        lambda x: [v if t in (3, 7, 9) else -math.inf for t, v in enumerate(x)],
    ),
    "forbidden": (
        LogitChanges(forbidden=(4, 4, 5)),
        lambda x: [-math.inf if t in (4, 5) else v for t, v in enumerate(x)],
    ),
    "bias": (
        LogitChanges(bias=((2, 1.5), (6, -3.0))),
        lambda x: [v + {2: 1.5, 6: -3.0}.get(t, 0) for t, v in enumerate(x)],
    ),
    "repetition": (
        LogitChanges(repetition_penalty=1.7, counts={0: 0, 1: 2, 11: 1}),
        lambda x: [(v / 1.7 if v > 0 else v * 1.7) if t in (0, 1, 11) else v for t, v in enumerate(x)],
    ),
    "presence and frequency": (
        LogitChanges(presence_penalty=0.5, frequency_penalty=-0.25, counts={0: 0, 1: 2, 11: 1}),
        lambda x: [v - {1: 0.5 - 0.5, 11: 0.5 - 0.25}.get(t, 0) for t, v in enumerate(x)],
    ),
    "all, in vLLM's order": (
        LogitChanges((1, 2, 3), (3,), ((2, 4.0),), 2.0, 0.5, 1.0, {2: 3, 5: 1}),
        lambda x: [-math.inf, x[1], (x[2] + 4) * (0.5 if x[2] + 4 > 0 else 2) - 2.5] + [-math.inf] * (VOCAB - 3),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_logits(name: str) -> None:
    changes, expected = CHANGES[name]
    logits = logits_of(seed=3)
    wanted = torch.tensor([expected(logits[0].double().tolist())], dtype=torch.float64)
    count = 4000
    tokens = sample(
        logits.expand(count, -1),
        [Params()] * count,
        range(count),
        None,
        dict.fromkeys(range(count), RowExtras(changes)),
    )
    frequencies = torch.bincount(tokens, minlength=VOCAB) / count
    assert torch.allclose(frequencies.double(), wanted.softmax(-1)[0], atol=0.03)
    assert not frequencies[wanted[0] == -math.inf].any()
    greedy = sample(logits, [Params(temperature=0.0)], [3], None, {0: RowExtras(changes)})
    assert greedy.tolist() == wanted.argmax(-1).tolist()


def test_changes_of_one_row_leave_the_others_alone() -> None:
    logits = logits_of(rows=6)
    params = [Params(temperature=temperature, seed=row) for row, temperature in enumerate((0.0, 1.0) * 3)]
    plain = sample(logits, params, range(6))
    changed = {row: RowExtras(LogitChanges(forbidden=(int(plain[row]),))) for row in (0, 1)}
    tokens = sample(logits, params, range(6), None, changed)
    assert (tokens[:2] != plain[:2]).all()
    assert (tokens[2:] == plain[2:]).all()
    alone = [sample(logits[row : row + 1], [params[row]], [row], None, {0: changed[row]}).item() for row in (0, 1)]
    assert tokens[:2].tolist() == alone

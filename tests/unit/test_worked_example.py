"""Skip-join MLFQ against naive MLFQ, FCFS and SRPT on four jobs, in the manner of figure 7 of the FastServe paper.

One place in the batch, no want of memory, no promotion. On the latency model of support.engines a first iteration takes
10 ms and 1 ms a prompt token, every later one 10 ms. Quanta of the queues Q0, Q1, ...: 10, 20, 40, 80, 160 ms.

    job  arrives  prompt  first iteration  output        all it takes   remaining steps of 10 ms (SRPT)
    A       0       60        70 ms        12 tokens    70 + 110 = 180        7 + 11 = 18
    B       0       30        40 ms         3 tokens    40 +  20 =  60        4 +  2 =  6
    C       0       10        20 ms         2 tokens    20 +  10 =  30        2 +  1 =  3
    D      85        5        15 ms         1 token     15                    2 (15 ms rounded up)

However they are ordered, the last ends at 180 + 60 + 30 + 15 = 285 ms.
"""

import pytest

from support.engines import arrival, make_engine
from support.watch import Watch, finish_ms, watch

QUANTA = {"quantum_base_s": 0.010, "num_levels": 5, "alpha_s": "none"}


def serve(policy: str, options: dict | None = None) -> tuple[Watch, dict[str, float]]:
    engine = make_engine(policy, options, max_batch_size=1)
    kept = watch(engine)
    jobs = [arrival("A", 0, 60, 12), arrival("B", 0, 30, 3), arrival("C", 0, 10, 2), arrival("D", 0.085, 5, 1)]
    return kept, finish_ms(engine.run(jobs))


def steps(kept: Watch) -> list[tuple[str, int, float]]:
    """(job, level it stood in, end in ms) of each iteration."""
    return [(ran.names[0], ran.levels[0], ran.end) for ran in kept.iterations]


def mean_completion_ms(finished: dict[str, float]) -> float:
    return sum(finished.values()) / 4 - 85 / 4  # Only D did not arrive at 0.


def decodes(name: str, level: int, first_end: int, count: int) -> list[tuple[str, int, float]]:
    return [(name, level, first_end + 10.0 * i) for i in range(count)]


def test_skip_join_mlfq() -> None:
    kept, finished = serve("fastserve", QUANTA)
    # The first quantum that covers the first iteration: A 70 <= 80, Q3. B 40 <= 40, Q2. C 20 <= 20, Q1. D 15 <= 20, Q1.
    assert steps(kept) == [
        ("C", 1, 20),  # Q1 is the highest queue that is not empty. 20 of 20 ms used: C goes down to Q2, behind B.
        ("B", 2, 60),  # 40 of 40 ms used: down to Q3, behind A.
        ("C", 2, 70),  # Its second token: C is done.
        ("A", 3, 140),  # 70 of 80 ms used: A stays. D came at 85, into Q1, and waits: an iteration is never broken off.
        ("D", 1, 155),  # D is done.
        ("A", 3, 165),  # A is still before B. 80 of 80 ms used: down to Q4 (160 ms).
        ("B", 3, 175),
        ("B", 3, 185),  # B is done.
        *decodes("A", 4, 195, 10),  # 100 of 160 ms: A is done with its 12th token.
    ]
    assert finished == {"A": 285, "B": 185, "C": 70, "D": 155}
    assert mean_completion_ms(finished) == pytest.approx((285 + 185 + 70 + (155 - 85)) / 4)  # 152.5


def test_naive_mlfq() -> None:
    kept, finished = serve("mlfq", QUANTA)
    # Everyone joins Q0, whose 10 ms no first iteration fits: each overruns it and goes down to Q1, since what it needs
    # next, 10 ms, fits the 20 there.
    assert steps(kept) == [
        ("A", 0, 70),  # The longest prompt first, and nobody can stop it.
        ("B", 0, 110),  # D joins Q0 at 85, behind C.
        ("C", 0, 130),
        ("D", 0, 145),  # D is done.
        *decodes("A", 1, 155, 2),  # 20 of 20 ms used: A goes down to Q2.
        *decodes("B", 1, 175, 2),  # B is done with its third token.
        ("C", 1, 195),  # C is done.
        *decodes("A", 2, 205, 4),  # 40 of 40 ms used.
        *decodes("A", 3, 245, 5),  # Its 8th to 12th token.
    ]
    assert finished == {"A": 285, "B": 185, "C": 195, "D": 145}
    assert mean_completion_ms(finished) == pytest.approx((285 + 185 + 195 + (145 - 85)) / 4)  # 181.25


def test_fcfs() -> None:
    kept, finished = serve("fastserve-fcfs")
    assert steps(kept) == [
        *[("A", 0, 70), *decodes("A", 0, 80, 11)],  # A's 180 ms hold up all the others.
        *[("B", 0, 220), *decodes("B", 0, 230, 2)],
        *[("C", 0, 260), ("C", 0, 270)],
        ("D", 0, 285),
    ]
    assert finished == {"A": 180, "B": 240, "C": 270, "D": 285}
    assert mean_completion_ms(finished) == pytest.approx((180 + 240 + 270 + (285 - 85)) / 4)  # 222.5


def test_srpt() -> None:
    kept, finished = serve("srpt")
    # Its levels are remaining steps.
    assert steps(kept) == [
        *[("C", 3, 20), ("C", 1, 30)],
        *[("B", 6, 70), ("B", 2, 80), ("B", 1, 90)],
        ("D", 2, 105),  # Came at 85, amid B's last token; before A, which needs 18.
        *[("A", 18, 175), *[("A", 11 - i, 185 + 10 * i) for i in range(11)]],
    ]
    assert finished == {"A": 285, "B": 90, "C": 30, "D": 105}
    assert mean_completion_ms(finished) == pytest.approx((285 + 90 + 30 + (105 - 85)) / 4)  # 106.25


def test_the_means_are_in_the_papers_order() -> None:
    runs = [("srpt", None), ("fastserve", QUANTA), ("mlfq", QUANTA), ("fastserve-fcfs", None)]
    means = [mean_completion_ms(serve(policy, options)[1]) for policy, options in runs]
    assert means == pytest.approx([106.25, 152.5, 181.25, 222.5])


def test_skip_join_mlfq_with_promotion() -> None:
    kept, finished = serve("fastserve", {**QUANTA, "alpha_s": 0.1})
    # As above up to 165 ms. A began at 70, before its 100 ms were over. B last ran until 60 and is due at 160: at 155
    # it is not yet, at 165 it goes to Q0 and runs there: 10 of 10 ms used, and its last token comes from Q1.
    # A stops at 165 and runs again at 185, not for want of promotion but because nobody else is left.
    assert steps(kept)[:5] == [("C", 1, 20), ("B", 2, 60), ("C", 2, 70), ("A", 3, 140), ("D", 1, 155)]
    assert steps(kept)[5:] == [("A", 3, 165), ("B", 0, 175), ("B", 1, 185), *decodes("A", 4, 195, 10)]
    assert finished == {"A": 285, "B": 185, "C": 70, "D": 155}

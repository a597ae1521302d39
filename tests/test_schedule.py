"""The learning rate over a whole job's steps: by hand, and what is true of every schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.task_schedule import lr_factor

SCHEDULES = st.sampled_from(["constant", "linear", "cosine", "step"])


@given(
    st.integers(0, 500), st.integers(0, 300), SCHEDULES, st.integers(1, 400),
    st.lists(st.integers(1, 500), max_size=3), st.floats(0.001, 1),
)  # fmt: skip
def test_a_learning_rate_rises_then_never_rises_again(
    step: int, warmup: int, schedule: str, total: int, milestones: list[int], gamma: float
) -> None:
    now, then = (
        lr_factor(s, schedule=schedule, warmup=warmup, total=total, milestones=milestones, gamma=gamma)
        for s in (step, step + 1)
    )
    assert 0 <= now <= 1
    assert (then > now) if step + 1 < warmup else (then <= now or step < warmup)
    assert schedule != "constant" or step < warmup or now == 1
    if schedule in ("linear", "cosine"):
        assert lr_factor(max(total, warmup + 1), schedule=schedule, warmup=warmup, total=total) == 0


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.05, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.05, 0.5, 1.0, 1.0, 0.5, 0.01]),
        ("cosine", [0.05, 0.5, 1.0, 1.0, 0.5, 0.000247]),
        ("step", [0.05, 0.5, 1.0, 1.0, 0.1, 0.01]),  # at 70 and at 100
    ],
)
def test_a_schedule_is_what_is_computed_by_hand(schedule: str, wanted: list[float]) -> None:
    factors = [
        lr_factor(step, schedule=schedule, warmup=20, total=120, milestones=(70, 100))
        for step in (0, 9, 19, 20, 70, 119)
    ]
    assert factors == pytest.approx(wanted, abs=1e-6)


def test_a_milestone_inside_the_warm_up_counts_from_its_end_on() -> None:
    assert lr_factor(9, schedule="step", warmup=10, total=50, milestones=[5], gamma=0.5) == 1.0
    assert lr_factor(10, schedule="step", warmup=10, total=50, milestones=[5], gamma=0.5) == 0.5

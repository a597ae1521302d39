"""What is waited for is said once when it changes, and then once a minute."""

import logging

import pytest

from worker.waiting import Waiting


class Clock:
    """Monotonic seconds, as the test wants them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_wait_is_said_once_and_then_every_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lydian.worker")
    clock = Clock()
    waiting = Waiting(clock)
    for second in range(150):
        clock.now = float(second)
        waiting.say("waiting for work")
    assert caplog.messages == [
        "waiting for work",
        "waiting for work (for 60 s now)",
        "waiting for work (for 120 s now)",
    ]


def test_another_wait_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lydian.worker")
    waiting = Waiting(Clock())
    for what in ("work", "work", "room", "work"):
        waiting.say(what)
    assert caplog.messages == ["work", "room", "work"]


def test_the_same_wait_is_news_again_after_it_was_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lydian.worker")
    waiting = Waiting(Clock())
    waiting.say("work")
    waiting.over()
    waiting.say("work")
    assert caplog.messages == ["work", "work"]


def test_a_wait_that_is_trouble_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Waiting(Clock()).say("the coordinator does not answer", level=logging.WARNING)
    assert [record.levelname for record in caplog.records] == ["WARNING"]

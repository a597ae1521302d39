"""What time it is for tokens, when clocks are set, stand still, or were wrong at the start."""

from hypothesis import given
from hypothesis import strategies as st

from server.calendar import Calendar, shown

DAY = 86_400.0


class Clocks:
    """A machine's two clocks."""

    def __init__(self, wall: float = 1000 * DAY) -> None:
        self.wall, self.clock = wall, 5.0

    def run(self, seconds: float) -> None:
        self.wall, self.clock = self.wall + seconds, self.clock + seconds

    def calendar(self, reached: float | None = None) -> Calendar:
        return Calendar(lambda: self.wall, lambda: self.clock, reached)


def test_it_runs_with_the_clock() -> None:
    clocks = Clocks()
    calendar = clocks.calendar()
    clocks.run(90.0)
    assert calendar.now() == 1000 * DAY + 90.0


def test_a_clock_that_leaps_ahead_while_it_runs_is_not_followed_and_set_right_it_is_as_before() -> None:
    clocks = Clocks()
    calendar = clocks.calendar()
    clocks.wall += 10 * DAY
    clocks.run(60.0)
    assert calendar.now() == 1000 * DAY + 60.0
    clocks.wall -= 10 * DAY
    assert calendar.now() == 1000 * DAY + 60.0


def test_a_clock_that_was_ahead_at_the_start_spoils_nothing_once_it_is_set_right() -> None:
    clocks = Clocks(1010 * DAY)
    calendar = clocks.calendar(reached=1000 * DAY)
    assert calendar.now() == 1010 * DAY
    clocks.wall = 1000 * DAY
    clocks.run(60.0)
    assert calendar.now() == 1000 * DAY + 60.0
    assert calendar.reached() == 1000 * DAY + 60.0, "what the wrong clock said is never kept"


def test_a_clock_that_is_set_back_brings_nothing_to_life_again() -> None:
    clocks = Clocks()
    calendar = clocks.calendar()
    clocks.run(60.0)
    clocks.wall -= 10 * DAY
    assert calendar.now() == 1000 * DAY + 60.0
    later = Clocks(wall=0.0).calendar(calendar.reached())  # a start without a battery for its clock
    assert later.now() == 1000 * DAY + 60.0


def test_the_time_that_it_did_not_run_has_passed_all_the_same() -> None:
    before = Clocks().calendar().reached()
    assert Clocks(1007 * DAY).calendar(before).now() == 1007 * DAY


@given(st.lists(st.tuples(st.sampled_from(["run", "leap"]), st.floats(-1e6, 1e6)), max_size=30))
def test_in_one_process_it_is_never_behind_the_time_that_ran_nor_ahead_of_it(events: list[tuple[str, float]]) -> None:
    clocks = Clocks()
    calendar, ran = clocks.calendar(), 0.0
    for kind, seconds in events:
        if kind == "leap":
            clocks.wall += seconds
        else:
            clocks.run(abs(seconds))
            ran += abs(seconds)
        assert abs(calendar.now() - (1000 * DAY + ran)) < 1e-3


def test_a_time_is_shown_to_the_second() -> None:
    assert shown(1_700_000_000.9) == "2023-11-14T22:13:20Z"

"""`lydian logs --follow`: which lines are new, of two looks at the end of a log."""

from hypothesis import given
from hypothesis import strategies as st

from client.following import CUT, KEPT_ATTEMPTS, Line, Tails, new_lines
from common.messages import Output
from worker.said import LINES, last_said

TEXTS = st.text("ab", min_size=1, max_size=3)


def output(said: str, worker: str = "w1", where: str = "round 1, shard 0, attempt 1") -> Output:
    return Output(worker=worker, where=where, said=said)


def texts(lines: list[Line]) -> list[str]:
    return [line.line for line in lines]


def test_the_first_look_shows_all_that_is_there_and_the_next_what_came_since() -> None:
    tails = Tails()
    assert texts(tails.take([output("one\ntwo")])) == ["one", "two"]
    assert texts(tails.take([output("one\ntwo")])) == []
    assert texts(tails.take([output("one\ntwo\nthree")])) == ["three"]


def test_a_line_that_was_written_over_or_went_on_is_shown_again_and_no_other() -> None:
    assert new_lines(["epoch 1", " 10 %"], ["epoch 1", " 80 %", "epoch 2"]) == [" 80 %", "epoch 2"]
    assert new_lines(["epoch 1", "lo"], ["epoch 1", "loss 2"]) == ["loss 2"]
    assert new_lines([" 10 %"], [" 80 %"]) == [" 80 %"]


def test_lines_that_nobody_saw_are_marked() -> None:
    assert new_lines(["1", "2"], ["8", "9"]) == [CUT, "8", "9"]


def test_a_first_line_that_was_cut_off_is_known_by_its_end() -> None:
    assert new_lines(["a long line", "2"], [f"{CUT}ng line", "2", "3"]) == ["3"]


def test_workers_and_attempts_have_their_own_lines() -> None:
    tails = Tails()
    tails.take([output("one"), output("one", "w2")])
    again = [output("one\ntwo"), output("one", "w2", "round 1, shard 0, attempt 2")]
    assert [(line.worker, line.line) for line in tails.take(again)] == [("w1", "two"), ("w2", "one")]


def test_an_attempt_that_was_not_spoken_of_for_a_while_goes_on_where_it_was() -> None:
    tails = Tails()
    tails.take([output("one")])
    tails.take([])
    assert texts(tails.take([output("one\ntwo")])) == ["two"]


def test_of_many_attempts_the_oldest_are_forgotten() -> None:
    tails = Tails()
    for number in range(KEPT_ATTEMPTS + 1):
        tails.take([output("one", where=f"round {number}")])
    assert texts(tails.take([output("one", where="round 1"), output("one", where="round 0")])) == ["one"]


@given(st.lists(st.lists(TEXTS, max_size=LINES // 2), max_size=8))
def test_numbered_lines_of_a_log_that_grows_slowly_are_each_shown_once(steps: list[list[str]]) -> None:
    log, shown, tails = "", [], Tails()
    wrote = []
    for step in steps:
        for text in step:
            wrote.append(f"{len(wrote)} {text}")
            log += wrote[-1] + "\n"
        if log:
            shown += texts(tails.take([output(last_said(log.encode()))]))
    assert shown == wrote


@given(st.lists(TEXTS, max_size=30), st.lists(TEXTS, max_size=30))
def test_new_lines_are_the_end_of_what_is_there_and_nothing_is_new_twice(before: list[str], now: list[str]) -> None:
    found = new_lines(before, now)
    without_mark = found[1:] if found[:1] == [CUT] else found
    assert without_mark == now[len(now) - len(without_mark) :]
    assert new_lines(now, now) == []

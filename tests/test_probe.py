"""Measuring the line to a real coordinator: who may, how much at once, and what workers tell of it."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from common.api import CoordinatorApi
from common.errors import ForbiddenError, LydianError, UnavailableError
from common.link import LARGEST
from common.messages import Link, TokenRequest
from server.probe import AT_ONCE, BLOCK, Probes
from tests.acceptance.kit import LocalFleet, wait_for
from worker.line import AGAIN_S, OLD_S, Line


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    with LocalFleet(tmp_path_factory.mktemp("probed")) as running:
        yield running


def call(fleet: LocalFleet, method: str, path: str, token: str | None = "admin", **options: Any) -> httpx2.Response:
    token = fleet.admin_token if token == "admin" else token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx2.request(method, f"{fleet.url}{path}", headers=headers, **options)


def test_a_token_of_any_scope_may_measure_and_none_may_not(fleet: LocalFleet) -> None:
    join = (fleet.state / "join.token").read_text().strip()
    for token in (join, fleet.admin_token):
        with CoordinatorApi(fleet.url, token) as api:
            link = api.measure_link()
        assert link.down > 0
        assert link.up > 0
        assert link.latency_s > 0
    assert call(fleet, "GET", "/v1/probe?bytes=1", None).status_code == 401
    assert call(fleet, "PUT", "/v1/probe", None, content=b"x").status_code == 401


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, LARGEST])
def test_as_many_bytes_come_as_were_asked_for_and_as_many_are_counted_as_were_sent(
    fleet: LocalFleet, size: int
) -> None:
    got = call(fleet, "GET", f"/v1/probe?bytes={size}")
    assert (got.status_code, len(got.content)) == (200, size)
    assert call(fleet, "PUT", "/v1/probe", content=bytes(size)).json() == {"bytes": size}


def test_a_probe_is_no_larger_than_is_allowed(fleet: LocalFleet) -> None:
    assert call(fleet, "GET", f"/v1/probe?bytes={LARGEST + 1}").status_code == 400
    assert call(fleet, "GET", "/v1/probe?bytes=-1").status_code == 400
    refused = call(fleet, "PUT", "/v1/probe", content=bytes(LARGEST + 1))
    assert (refused.status_code, refused.json()["code"]) == (413, "too_large")


def test_a_probe_leaves_nothing_on_the_disk(fleet: LocalFleet) -> None:
    def sizes() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in fleet.state.rglob("*")}

    before = sizes()
    call(fleet, "PUT", "/v1/probe", content=bytes(LARGEST))
    changed = dict(sizes().items() - before.items())  # the journal's: a token's last use is kept now and then
    assert all(name.startswith("journal.") for name in changed)
    assert sum(size - before.get(name, 0) for name, size in changed.items()) < LARGEST // 10


def test_a_caller_has_one_probe_at_a_time_and_gets_its_turn_back_when_it_breaks_off(fleet: LocalFleet) -> None:
    go_on, began = threading.Event(), threading.Event()
    other = fleet.api.new_token(TokenRequest()).token

    def slowly() -> Iterator[bytes]:
        yield b"x"
        began.set()
        go_on.wait(60)
        raise ConnectionAbortedError("the test breaks it off")

    def hold() -> None:
        with pytest.raises(ConnectionAbortedError):
            call(fleet, "PUT", "/v1/probe", content=slowly())

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert began.wait(60)
        wait_for("the turn to be taken", lambda: call(fleet, "GET", "/v1/probe?bytes=0").status_code == 503)
        with pytest.raises(UnavailableError) as refused:
            fleet.api.measure_link()
        assert refused.value.code == "probe_busy"
        assert call(fleet, "GET", "/v1/probe?bytes=9", other).status_code == 200
    finally:
        go_on.set()
        holder.join()
    wait_for("the turn to be given back", lambda: call(fleet, "GET", "/v1/probe?bytes=0").status_code == 200)


def test_few_callers_measure_at_once() -> None:
    probes = Probes()
    turns = [probes.turn(f"caller {number}") for number in range(AT_ONCE)]
    for turn in turns:
        turn.__enter__()
    with pytest.raises(UnavailableError), probes.turn("one more"):
        pass
    turns[0].__exit__(None, None, None)
    with probes.turn("one more"):
        pass


def test_a_worker_measures_before_its_first_work_and_its_line_is_shown(fleet: LocalFleet) -> None:
    fleet.start_workers(1)
    link = wait_for("the line to be told", lambda: fleet.api.workers()[0].link)
    assert link.down > 0
    assert "the line to the coordinator: " in fleet.workers["w1"].said()


# ---------------------------------------------------------------- when a worker measures


class Api:
    """What measuring comes to, in turn."""

    def __init__(self, *ends: Link | LydianError) -> None:
        self.ends = list(ends)

    def measure_link(self) -> Link:
        end = self.ends.pop(0)
        if isinstance(end, LydianError):
            raise end
        return end


LINK = Link(down=1e6, up=2e6, latency_s=0.01)


def test_a_line_is_measured_at_the_start_and_again_when_it_is_old() -> None:
    now = [0.0]
    line = Line(Api(LINK, LINK), lambda: now[0])  # type: ignore[arg-type]
    assert line.is_due
    line.measure()
    now[0] = OLD_S - 1
    assert not line.is_due
    now[0] = OLD_S
    assert line.is_due


@pytest.mark.parametrize("error", [UnavailableError("away"), ForbiddenError("no")])
def test_a_line_that_cannot_be_measured_keeps_what_was_known_and_is_tried_again_later(error: LydianError) -> None:
    now = [0.0]
    line = Line(Api(LINK, error), lambda: now[0])  # type: ignore[arg-type]
    line.measure()
    now[0] = OLD_S
    line.measure()
    assert line.link == LINK
    assert not line.is_due
    now[0] += AGAIN_S
    assert line.is_due

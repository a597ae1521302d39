"""What stands before every call: names, numbers, and the headers of every answer, whatever the method and path."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.tailscale import TailscaleStatus
from server.headers import EVERYWHERE
from tests.test_access_matrix import RULES, SHELL, send, target
from tests.trust_kit import HOST, JSON, METHODS, Fleet, Served

PATHS = ("/healthz", "/version", "/metrics", "/openapi.json", "/", "/docs", "/no/such", "/v1/jobs", "/v1/updates/x")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    running = Fleet(tmp_path_factory.mktemp("gate") / "state")
    yield running
    running.close()


class Clock:
    """A clock that a test moves."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Clock]]:
    """An application with small limits, whose clock stands still."""
    clock = Clock()
    monkeypatch.setattr("server.coordinator.time.monotonic", clock)
    limits = {"calls_per_s": 1, "calls_burst": 5, "stranger_calls_per_s": 1, "stranger_calls_burst": 3}
    running = Served(tmp_path / "state", **limits)
    running.coordinator.quotas._clock = running.coordinator.quotas.refusals._clock = clock
    yield running, clock
    running.close()


# ---------------------------------------------------------------- names


def test_a_foreign_host_is_refused_on_every_method_and_path_whoever_calls(fleet: Fleet) -> None:
    wrong = list[str]()
    for path in PATHS:
        for method in METHODS:
            for token in (None, fleet.admin):
                answer = fleet.call(method, path, token, hosts=("rebound.example:8470",))
                said = (answer.status, answer.json()["code"])  # HEAD too: the server leaves its body out
                if said != (403, "host_not_allowed") or b"--allow-host" not in answer.body:
                    wrong.append(f"{method} {path}: {said}")
    assert wrong == []


def test_a_foreign_origin_is_refused_on_every_method_and_path_and_our_own_is_not(fleet: Fleet) -> None:
    wrong = list[str]()
    for path in PATHS:
        for method in METHODS:
            foreign = fleet.call(method, path, fleet.admin, headers={"Origin": "http://evil.example"})
            own = fleet.call(method, path, fleet.admin, headers={"Origin": f"http://{HOST}"})
            plain = fleet.call(method, path, fleet.admin)
            if (foreign.status, foreign.json()["code"]) != (403, "origin_not_allowed") or own.status != plain.status:
                wrong.append(f"{method} {path}: {foreign.status}, {own.status}, {plain.status}")
    assert wrong == []


def test_no_answer_lets_a_foreign_page_read_it_and_none_sets_a_cookie(fleet: Fleet) -> None:
    for method in ("GET", "OPTIONS"):
        asked = {"Origin": f"http://{HOST}", "Access-Control-Request-Method": "POST"}
        answer = fleet.call(method, "/v1/jobs", fleet.admin, headers=asked)
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "set-cookie"]


def test_a_body_that_comes_with_a_foreign_host_is_not_read_and_the_connection_closed(fleet: Fleet) -> None:
    answer = fleet.call("POST", "/v1/jobs", fleet.admin, b"{ this is not JSON", JSON, hosts=("evil.example",))
    assert (answer.status, answer.code, answer.headers["connection"]) == (403, "host_not_allowed", "close")
    assert "connection" not in fleet.call("GET", "/v1/jobs", fleet.admin, hosts=("evil.example",)).headers


def test_names_of_the_tailnet_count_as_soon_as_they_are_known_and_while_tailscaled_is_away(tmp_path: Path) -> None:
    served = Served(tmp_path / "state", allow_host=("tunnel.example",))

    def status(host: str) -> int:
        return served.call("GET", "/healthz", hosts=(host,)).status

    try:
        names = ("coordinator.tailnet.test", "coordinator:8470", "100.64.0.9", "[fd7a::9]:8470")
        assert status("tunnel.example:443") == 200
        assert [status(name) for name in names] == [403] * 4
        known = TailscaleStatus("Running", addresses=("100.64.0.9", "fd7a::9"), name="coordinator.tailnet.test")
        served.coordinator.tailnet.status = known
        assert [status(name) for name in names] == [200] * 4
        served.coordinator.tailnet.status = None
        assert [status(name) for name in names] == [200] * 4
        served.coordinator.tailnet.status = TailscaleStatus("Running", addresses=("100.64.0.10",), name=None)
        assert [status(name) for name in (*names, "100.64.0.10", "tunnel.example")] == [403] * 4 + [200] * 2
    finally:
        served.close()


def test_a_host_that_was_let_in_once_is_still_refused_with_a_foreign_origin_and_beside_a_second_host(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gate.LET_IN", 3)
    for number in range(5):  # as many spellings as anybody likes
        assert fleet.call("GET", "/no/such", hosts=(f"127.0.0.1:{1 + number}",)).status == 404
    assert fleet.call("GET", "/healthz", headers={"Origin": "http://evil.example"}).status == 403
    assert fleet.call("GET", "/healthz", headers={"Origin": f"http://{HOST}"}).status == 200
    assert fleet.call("GET", "/healthz", hosts=(HOST, HOST)).status == 400
    assert fleet.call("GET", "/healthz", hosts=(HOST, "192.0.2.7")).status == 400
    assert fleet.call("GET", "/healthz", hosts=()).status == 400


# ---------------------------------------------------------------- headers


def test_every_answer_of_every_call_has_the_headers_and_only_what_is_named_by_its_digest_may_be_kept(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path / "state")
    try:
        wrong = list[str]()
        for route in RULES:
            for token in (None, fleet.one.token, fleet.admin):
                headers = send(fleet, route, token).headers
                lacking = [name.decode() for name, _ in EVERYWHERE if name.decode() not in headers]
                wrong += [f"{route}: lacks {lacking}"] if lacking else []
                kept = "no-store" not in headers["cache-control"]
                blob = "{digest}" in route[1] or route[1].endswith("/model")
                shell = route in SHELL and headers["cache-control"] == "no-cache"  # nobody's, and asked for again
                if kept and not shell and not (blob and token is not None):
                    wrong.append(f"{route}: {headers['cache-control']}")
        refused = fleet.call("GET", "/healthz", hosts=("evil.example",)).headers
        wrong += [f"refusal: {name!r}" for name, value in EVERYWHERE if refused.get(name.decode()) != value.decode()]
        assert wrong == []
        assert (
            fleet.call("GET", target(fleet, ("GET", "/v1/models/{digest}"), there=True), fleet.admin).headers[
                "cache-control"
            ]
            == "private, max-age=31536000, immutable"
        )
    finally:
        fleet.close()


def test_a_fault_of_ours_is_answered_like_any_error_and_says_nothing_of_itself(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a secret of the inside")

    monkeypatch.setattr("server.routes.public.exposition", broken)
    answers = list[Any]()
    with pytest.raises(ZeroDivisionError):  # passed on to the server, which logs it
        fleet.call("GET", "/metrics", fleet.admin, said=answers)
    (answer,) = answers
    assert (answer.status, answer.code) == (500, "internal")
    assert b"secret" not in answer.body
    assert {name.decode() for name, _ in EVERYWHERE} <= answer.headers.keys()


def test_there_is_no_page_of_the_frameworks_own_and_the_document_wants_a_token(fleet: Fleet) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert fleet.call("GET", path, fleet.admin).status == 404
    assert fleet.call("GET", "/openapi.json").status == 401


# ---------------------------------------------------------------- numbers


def test_a_caller_that_calls_too_often_is_told_when_it_may_again_and_others_are_not_held_up(
    narrow: tuple[Served, Clock],
) -> None:
    served, clock = narrow
    answers = [served.call("GET", "/v1/jobs", served.admin) for _ in range(6)]
    assert [answer.status for answer in answers] == [200] * 5 + [429]
    assert (answers[-1].code, answers[-1].headers["retry-after"]) == ("too_many_calls", "1")
    assert "1 a second are answered, and 5 at once" in answers[-1].json()["sentence"]
    assert served.call("POST", "/v1/workers", served.join, b"{}", JSON).status == 400  # another token, same address
    assert served.call("GET", "/healthz").status == 200
    clock.now += 1
    assert [served.call("GET", "/v1/jobs", served.admin).status for _ in range(2)] == [200, 429]


def test_strangers_are_counted_by_address_and_by_network_whatever_they_show_and_whichever_call_it_is(
    narrow: tuple[Served, Clock],
) -> None:
    served, _ = narrow
    forged = {"X-Forwarded-For": "198.51.100.1", "Forwarded": "for=198.51.100.2"}
    for path, token in (("/healthz", None), ("/v1/jobs", "lyd_admin_0123456789ab_" + "x" * 43), ("/no/such", None)):
        assert served.call("GET", path, token, client="2001:db8::1").status in (200, 401, 404)
    for path in ("/healthz", "/v1/jobs", "/no/such"):
        answer = served.call("GET", path, headers=forged, client="2001:db8::ffff")
        assert (answer.status, answer.code) == (429, "too_many_calls")
    assert served.call("GET", "/healthz", client="2001:db8:0:1::1").status == 200
    assert served.call("GET", "/v1/jobs", served.admin, client="2001:db8::1").status == 200


def test_a_call_that_is_refused_by_its_host_counts_for_nobody(narrow: tuple[Served, Clock]) -> None:
    served, _ = narrow
    for _ in range(10):
        assert served.call("GET", "/v1/jobs", served.admin, hosts=("evil.example",)).status == 403
    assert served.call("GET", "/v1/jobs", served.admin).status == 200


def test_refusals_are_counted_by_reason_and_logged_once_and_then_once_a_minute(
    narrow: tuple[Served, Clock], caplog: pytest.LogCaptureFixture
) -> None:
    served, clock = narrow
    caplog.set_level(logging.WARNING, "lydian.limits")
    for _ in range(9):
        served.call("GET", "/v1/jobs", hosts=("evil.example",))
        served.call("GET", "/v1/jobs", served.join)
    assert len(caplog.messages) == 2
    clock.now += 60
    served.call("GET", "/v1/jobs", hosts=("evil.example",))
    assert len(caplog.messages) == 3
    assert caplog.messages[-1].endswith("(and 8 times more of this kind)")
    assert "'evil.example'" in caplog.messages[-1]
    metrics = served.call("GET", "/metrics", served.admin).body.decode()
    assert 'lydian_refusals_total{reason="host"} 10.0' in metrics
    assert 'lydian_refusals_total{reason="calls"} 4.0' in metrics
    assert 'lydian_refusals_total{reason="origin"} 0.0' in metrics


def test_a_web_socket_is_closed_before_anything_is_asked(fleet: Fleet) -> None:
    sent = list[Any]()

    async def call() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def put(message: Any) -> None:
            sent.append(message)

        await fleet.app({"type": "websocket", "path": "/", "headers": []}, receive, put)

    fleet.run(call())
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_an_answer_without_a_body_of_json_is_still_json_for_a_person(narrow: tuple[Served, Clock]) -> None:
    served, _ = narrow
    answer = served.call("GET", "/healthz", hosts=())
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body)["code"] == "unclear_host"

"""Secure rounds on the real application: wherever it is killed and whoever drops out, the plain sum, or a new start."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from common.fixed import Fixed
from common.masked import mask_update
from common.messages import (
    Abandon,
    Assignment,
    Group,
    Heartbeat,
    Holding,
    JobRequest,
    JobView,
    ModelFacts,
    PollAnswer,
    PollRequest,
    Progress,
    Receipt,
    Roster,
    SecureShares,
    Submission,
    Unmask,
)
from common.secure import Secrets, digest_of
from common.weights import Notes, file_digest, load, save
from tests.api_house import TTL_S, House
from tests.rounds_kit import registration, spec

pytest.importorskip("cryptography")

FIXED = Fixed(64.0, 38)
SAMPLES = 40
EVERY = 0


def weights(number: int) -> dict[str, Any]:
    random = np.random.default_rng(number)
    return {"w": random.normal(size=(3, 5)).astype(np.float32), "count": np.array(7, np.int64)}


@dataclass
class Player:
    """A worker that is played, with real keys and masks."""

    name: str
    id: str
    token: str
    given: Assignment | None = None
    secrets: Secrets | None = None
    roster: Roster | None = None
    group: Group | None = None
    kept: tuple[Holding, ...] = ()
    gone: bool = False

    @property
    def work(self) -> Assignment:
        assert self.given is not None
        return self.given


@dataclass
class Stage:
    """A house, its workers and one secure job."""

    house: House
    folder: Path
    players: dict[str, Player] = field(default_factory=dict)
    job: str = ""
    steps: int = 0
    kill_at: int = -1

    # calls ------------------------------------------------------------------------

    def call(self, method: str, path: str, token: str, body: Any = None, **headers: str) -> httpx2.Response:
        task = self.begin(method, path, token, body, **headers)
        while not task.done() and self.house.threads.waiting:
            self.house.threads.let_go(0)
            self.house.loop.quiet()
        assert task.done(), f"{path} waits"
        return task.result()

    def begin(self, method: str, path: str, token: str, body: Any = None, **h: str) -> asyncio.Task[httpx2.Response]:
        return self.house.begin(method, path, token, body, **h)

    def finish(self, task: asyncio.Task[httpx2.Response]) -> httpx2.Response:
        self.house.loop.quiet()
        assert task.done(), "the call waits"
        return task.result()

    def step(self) -> None:
        """A place where the coordinator may be killed."""
        self.steps += 1
        if self.kill_at in (self.steps, EVERY):
            self.house.close()
            self.house.open()
            for player in self.players.values():
                if player.given is not None and not player.gone and not player.kept:
                    self.beat(player)

    # the cast -------------------------------------------------------------------------

    def join(self, *names: str) -> None:
        token = self.call("POST", "/v1/tokens", self.house.admin, b'{"scope": "join"}',
                          **{"Content-Type": "application/json"}).json()["token"]  # fmt: skip
        for name in names:
            welcome = self.call("POST", "/v1/workers", token, registration(name)).json()
            self.players[name] = Player(name, welcome["worker_id"], welcome["credential"])

    def submit(self, **keys: Any) -> None:
        wanted = {"data": {"shards": "auto"}, "round": {"min_workers": 3}, "rounds": 1, "seed": 1, **keys}
        request = JobRequest(spec=spec(**{"secure": {"enabled": True}, **wanted}), key="k")
        answer = self.call("POST", "/v1/jobs", self.house.admin, request)
        assert answer.status_code in (200, 201), answer.text
        self.job = answer.json()["id"]

    def poll(self, player: Player, *, wait_s: float = 0.0) -> PollAnswer | None:
        request = PollRequest(
            start_id="s1", claim_key=f"{player.name}{self.steps}", wait_s=wait_s, holding=player.kept,
            loaded=(self.job,),
        )  # fmt: skip
        answer = self.call("POST", f"/v1/workers/{player.id}/poll", player.token, request)
        return PollAnswer.model_validate_json(answer.content) if answer.status_code == 200 else None

    def beat(self, player: Player) -> str:
        work = player.work
        beat = Heartbeat(start_id="s1", assignment=work.id, attempt=work.attempt, progress=Progress(doing="training"))
        return str(self.call("POST", f"/v1/workers/{player.id}/heartbeat", player.token, beat).json()["order"])

    def hand_in(self, player: Player, path: Path, **fields: Any) -> httpx2.Response:
        work, data = player.work, path.read_bytes()
        span = f"bytes 0-{len(data) - 1}/{len(data)}"
        sent = self.call("PUT", f"/v1/updates/{work.id}?attempt={work.attempt}", player.token, data,
                         **{"Content-Range": span, "Content-Type": "application/octet-stream"})  # fmt: skip
        assert sent.status_code == 204, sent.text
        result = Submission(attempt=work.attempt, digest=file_digest(path), **fields)
        return self.call("POST", f"/v1/updates/{work.id}/submit", player.token, result)

    def init(self) -> None:
        first = next(iter(self.players.values()))
        answer = self.poll(first)
        assert answer is not None
        first.given = answer.assignment
        save(self.folder / "base", weights(0), Notes())
        count = len(self.players)
        bounds = tuple(SAMPLES * at // count for at in range(count + 1))
        facts = ModelFacts(parameters=15, train_samples=SAMPLES, test_samples=0, bounds=bounds)
        assert self.hand_in(first, self.folder / "base", facts=facts).status_code == 200
        first.given = None

    # the trips --------------------------------------------------------------------------

    def claim(self, *names: str) -> None:
        for name in names or self.there:
            player = self.players[name]
            answer = self.poll(player)
            assert answer is not None
            assert answer.assignment is not None
            player.given = answer.assignment
            player.secrets = Secrets(hashlib.sha256(f"{name} {player.work.attempt}".encode()).digest())
            player.roster = player.group = None
            self.step()

    @property
    def there(self) -> list[str]:
        return [name for name, player in self.players.items() if not player.gone]

    def keys(self, *names: str) -> list[asyncio.Task[httpx2.Response]]:
        def one(player: Player) -> asyncio.Task[httpx2.Response]:
            assert player.secrets is not None
            work = player.work
            return self.begin("POST", f"/v1/updates/{work.id}/keys", player.token, player.secrets.keys(work.attempt))

        return self._trip(names or tuple(self.there), one)

    def shares(self, *names: str) -> list[asyncio.Task[httpx2.Response]]:
        def one(player: Player) -> asyncio.Task[httpx2.Response]:
            assert player.secrets is not None
            assert player.roster is not None
            work = player.work
            sealed = player.secrets.shares(player.roster, work.shard)
            body = SecureShares(attempt=work.attempt, roster=digest_of(player.roster), sealed=sealed)
            return self.begin("POST", f"/v1/updates/{work.id}/shares", player.token, body)

        return self._trip(names or tuple(self.there), one)

    def _trip(
        self, names: tuple[str, ...], send: Callable[[Player], asyncio.Task[httpx2.Response]]
    ) -> list[asyncio.Task[httpx2.Response]]:
        """Send from each; a coordinator that was killed meanwhile is sent to again by all."""
        for name in names:
            send(self.players[name])
            self.step()
        return [send(self.players[name]) for name in names]

    def agree(self, *names: str) -> None:
        """Keys and shares of all that are there."""
        chosen = names or tuple(self.there)
        for name, task in zip(chosen, self.keys(*chosen), strict=True):
            answer = self.finish(task)
            assert answer.status_code == 200, answer.text
            self.players[name].roster = Roster.model_validate_json(answer.content)
        for name, task in zip(chosen, self.shares(*chosen), strict=True):
            answer = self.finish(task)
            assert answer.status_code == 200, answer.text
            self.players[name].group = Group.model_validate_json(answer.content)

    def train(self, *names: str) -> None:
        for name in names or self.there:
            player = self.players[name]
            self.upload(player)
            self.step()

    def upload(self, player: Player) -> Receipt:
        assert player.secrets is not None
        assert player.roster is not None
        assert player.group is not None
        work, samples = player.work, self.samples(player)
        trained, update = self.folder / f"trained-{player.name}", self.folder / f"update-{player.name}"
        save(trained, weights(1 + work.shard), Notes())
        masks = player.secrets.masks(player.roster, work.shard, player.group.shards)
        mask_update(self.folder / "base", trained, update, FIXED, samples, masks)
        answer = self.hand_in(player, update, samples=samples, steps=1)
        assert answer.status_code == 200, answer.text
        player.kept = (Holding(assignment=work.id, attempt=work.attempt, digest=file_digest(update)),)
        return Receipt.model_validate_json(answer.content)

    def samples(self, player: Player) -> int:
        span = player.work.samples
        assert span is not None
        return span.stop - span.start

    def asked(self, player: Player) -> Unmask | None:
        answer = self.poll(player)
        return answer.unmask[0] if answer is not None and answer.unmask else None

    def open_shares(self, *names: str) -> None:
        for name in names or self.there:
            player = self.players[name]
            if (one := self.asked(player)) is None:
                continue
            assert player.secrets is not None
            assert player.roster is not None
            assert player.group is not None
            work = player.work
            reveal = player.secrets.reveal(
                work.attempt, player.roster, work.shard, player.group.shards, one.survivors, one.sealed
            )
            for _ in range(2):
                answer = self.call("POST", f"/v1/updates/{work.id}/reveal", player.token, reveal)
                assert answer.status_code in (204, 410), answer.text
            self.step()

    def leave(self, name: str) -> None:
        player = self.players[name]
        player.gone = True
        assert self.call("POST", f"/v1/workers/{player.id}/leave?start_id=s1", player.token).status_code == 204

    def settle(self) -> None:
        """Let the coordinator go as far as it can."""
        self.house.loop.quiet()
        while self.house.threads.waiting:
            self.house.threads.let_go(0)
            self.house.loop.quiet()

    # what came of it ------------------------------------------------------------------

    @property
    def view(self) -> JobView:
        return JobView.model_validate_json(self.call("GET", f"/v1/jobs/{self.job}", self.house.admin).content)

    def plain(self, *names: str) -> Any:
        base = weights(0)["w"]
        numbers, total = np.zeros(base.shape, np.int64), 0
        for name in names:
            player, samples = self.players[name], self.samples(self.players[name])
            change = weights(1 + player.work.shard)["w"].astype(np.float64) - base.astype(np.float64)
            numbers += np.rint(change * 2.0**FIXED.fraction).astype(np.int64) * samples
            total += samples
        mean = numbers.astype(np.float64) / float(total) * 2.0**-FIXED.fraction
        return (base.astype(np.float64) + mean).astype(np.float32)

    def check(self, *names: str) -> None:
        self.settle()
        view = self.view
        assert view.state == "finished", view.reason
        assert view.model is not None
        found = load(self.house.blob(view.model.digest))
        assert found["w"].tobytes() == self.plain(*names).tobytes()
        assert found["count"] == 7
        assert self.house.coordinator.journal.sum_of(self.job, 1, 0) == []  # no key and no share is kept


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    house = House(tmp_path / "state")
    yield Stage(house, tmp_path)
    house.demolish()


def opened(stage: Stage, *names: str, **keys: Any) -> Stage:
    stage.join(*names)
    stage.submit(round={"min_workers": len(names)}, **keys)
    stage.init()
    return stage


def whole_round(stage: Stage) -> None:
    stage.claim()
    stage.agree()
    stage.train("a", "b", "c")
    stage.leave("d")
    stage.open_shares()


@pytest.mark.parametrize("kill_at", [-1, EVERY, 6, 14])
def test_a_coordinator_killed_after_a_message_or_after_each_comes_to_the_plain_sum(stage: Stage, kill_at: int) -> None:
    opened(stage, "a", "b", "c", "d")
    stage.kill_at = kill_at
    whole_round(stage)
    assert stage.steps == 18
    stage.check("a", "b", "c")


def test_who_is_awaited_is_said_at_each_step(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim("a", "b")
    first = stage.keys("a")[0]
    assert not first.done()
    assert "1 keys are in; awaiting shard 1, 2" in stage.view.reason
    stage.claim("c")
    stage.agree()
    assert "0 of 3 masked updates are in; awaiting shard 0, 1, 2" in stage.view.reason
    stage.train()
    assert "0 of 3 workers have opened their shares; awaiting shard 0, 1, 2" in stage.view.reason
    stage.open_shares()
    stage.check("a", "b", "c")


def test_a_shard_of_a_worker_that_left_before_its_keys_may_be_taken_by_one_that_comes(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    stage.leave("c")
    stage.join("d")
    stage.claim("d")
    assert (stage.players["d"].work.shard, stage.players["d"].work.attempt) == (stage.players["c"].work.shard, 2)
    stage.agree()
    stage.train()
    stage.open_shares()
    stage.check("a", "b", "d")


def test_a_shard_that_was_lost_after_the_roster_was_fixed_is_handed_to_nobody(stage: Stage) -> None:
    opened(stage, "a", "b", "c", "d")
    stage.claim()
    stage.agree()
    stage.leave("d")
    stage.join("e")
    answer = stage.poll(stage.players["e"])
    assert answer is None or answer.assignment is None
    stage.players["e"].gone = True
    stage.train()
    stage.open_shares()
    stage.check("a", "b", "c")


def test_a_worker_gets_no_second_shard_of_one_sum(stage: Stage) -> None:
    opened(stage, "a", "b", "c", "d")
    stage.claim("a")
    a = stage.players["a"]
    stage.call("POST", f"/v1/updates/{a.work.id}/abandon", a.token,
               Abandon(attempt=1, code="released", sentence="for a moment"))  # fmt: skip
    answer = stage.poll(a)
    assert answer is None or answer.assignment is None


def test_below_the_threshold_the_round_is_begun_anew_with_fresh_keys_and_nothing_old_counts(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    stage.agree()
    stage.train("a")
    old = stage.players["a"].work
    stage.leave("c")
    assert "begun anew: 2 of 3 workers" not in stage.view.reason
    b = stage.players["b"]
    stage.call("POST", f"/v1/updates/{b.work.id}/abandon", b.token,
               Abandon(attempt=1, code="released", sentence="for a moment"))  # fmt: skip
    reason = stage.view.reason
    assert "is begun anew: 1 of 3 workers handed in, and 3 are needed; waiting for 3 workers" in reason
    stage.join("d")
    stage.house.loop.now += 1.0  # until the coordinator looks again
    stage.settle()
    kept, stage.players["a"].kept = stage.players["a"].kept, ()
    assert kept
    stage.claim()
    assert stage.players["a"].work.attempt > old.attempt or stage.players["a"].work.shard != old.shard
    assert {stage.players[name].work.shard for name in ("a", "b", "d")} == {0, 1, 2}
    stage.agree()
    assert stage.players["a"].roster is not None
    assert stage.players["a"].roster.seal == 1
    stage.train()
    stage.open_shares()
    stage.check("a", "b", "d")


def test_survivors_that_leave_before_they_opened_their_shares_begin_the_round_anew(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    stage.agree()
    stage.train()
    stage.join("d")
    stage.leave("c")
    stage.house.loop.now += 1.0
    stage.settle()
    facts = [stored.fact for stored in stage.house.coordinator.journal.facts(types=("opened_anew",))]
    assert len(facts) == 1
    assert "2 of 3 workers opened their shares or still can, and 3 are needed" in facts[0].reason  # type: ignore[union-attr]
    for name in ("a", "b"):
        stage.players[name].kept = ()
    stage.claim()
    stage.agree()
    stage.train()
    stage.open_shares()
    stage.check("a", "b", "d")


def test_a_survivor_that_has_lost_what_it_needs_is_not_waited_for(stage: Stage) -> None:
    opened(stage, "a", "b", "c", "d")
    stage.claim()
    stage.agree()
    stage.train()
    for name in ("a", "b"):
        stage.players[name].kept = ()
        assert stage.asked(stage.players[name]) is None
    stage.house.loop.now += 1.0
    stage.settle()
    facts = [stored.fact for stored in stage.house.coordinator.journal.facts(types=("opened_anew",))]
    assert len(facts) == 1


def test_a_worker_that_is_silent_for_a_lease_time_is_dropped_from_the_sum(stage: Stage) -> None:
    opened(stage, "a", "b", "c", "d")
    stage.claim()
    stage.agree()
    stage.train("a", "b", "c")
    for _ in range(TTL_S + 2):
        stage.house.loop.now += 1.0
        stage.settle()
        for name in ("a", "b", "c"):
            stage.open_shares(name)
    stage.check("a", "b", "c")


def test_more_workers_than_can_sum_together_end_the_job_in_words(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sealing.MEMBERS", 2)
    opened(stage, "a", "b", "c")
    view = stage.view
    assert (view.state, view.reason) == ("failed", "3 workers would sum securely, and at most 2 can")


def test_an_update_that_is_not_in_the_sum_is_superseded(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    save(stage.folder / "plain", weights(1), Notes())
    answer = stage.hand_in(stage.players["a"], stage.folder / "plain", samples=1)
    assert (answer.status_code, answer.json()["code"]) == (409, "superseded")
    assert "is not in the sum" in answer.json()["sentence"]


def test_a_plain_model_in_place_of_a_masked_update_is_refused(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    stage.agree()
    save(stage.folder / "plain", weights(1), Notes())
    answer = stage.hand_in(stage.players["a"], stage.folder / "plain", samples=1)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_encoding")


def test_a_worker_opens_the_shares_of_its_own_updates_alone(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    stage.agree()
    stage.train()
    a, b = stage.players["a"], stage.players["b"]
    one = stage.asked(a)
    assert one is not None
    assert a.secrets is not None
    assert a.roster is not None
    reveal = a.secrets.reveal(1, a.roster, a.work.shard, one.survivors, one.survivors, one.sealed)
    answer = stage.call("POST", f"/v1/updates/{a.work.id}/reveal", b.token, reveal)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_attempt")
    late = stage.call("POST", f"/v1/updates/{a.work.id.replace('.1.', '.2.')}/reveal", a.token, reveal)
    assert late.status_code in (404, 410)


def test_keys_of_a_job_that_sums_nothing_are_refused(stage: Stage) -> None:
    opened(stage, "a", "b", "c", secure={"enabled": False})
    stage.claim("a")
    a = stage.players["a"]
    assert a.secrets is not None
    answer = stage.call("POST", f"/v1/updates/{a.work.id}/keys", a.token, a.secrets.keys(1))
    assert answer.status_code == 410
    assert "in no sum that can be joined" in answer.json()["sentence"]


def test_who_waits_is_told_nothing_when_the_time_of_a_poll_is_over(stage: Stage) -> None:
    opened(stage, "a", "b", "c")
    stage.claim()
    waiting = stage.keys("a")[0]
    for _ in range(30):
        stage.house.loop.now += 1.0
        stage.house.loop.quiet()
    assert stage.finish(waiting).status_code in (204, 404, 409, 410)


def test_a_worker_without_the_package_is_told_how_to_get_it(stage: Stage) -> None:
    stage.join("a", "b")
    token = stage.call("POST", "/v1/tokens", stage.house.admin, b'{"scope": "join"}',
                       **{"Content-Type": "application/json"}).json()["token"]  # fmt: skip
    stage.call("POST", "/v1/workers", token, registration("old", no_masks="it lacks cryptography: pip install x"))
    stage.submit()
    assert "2 can serve it" in stage.view.reason or "2 of 3 live can" in stage.view.reason
    assert "old cannot mask its updates: it lacks cryptography: pip install x" in stage.view.reason


def test_a_coordinator_without_the_package_takes_no_secure_job(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sealing.unavailable", lambda: "it lacks cryptography: pip install x")
    request = JobRequest(
        spec=spec(secure={"enabled": True}, data={"shards": "auto"}, round={"min_workers": 3}), key="k"
    )
    answer = stage.call("POST", "/v1/jobs", stage.house.admin, request)
    assert answer.status_code == 422
    assert "pip install x" in answer.json()["sentence"]

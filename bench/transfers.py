"""Upload and download alone: the calls that an agent makes (`common.api`), one by one, to a real coordinator."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from bench.fleet import Fleet, running
from bench.limits import MEGABYTE, Limits, timed
from bench.played import Weights, facts, registration
from bench.rounds import TASK, job
from bench.scenario import (
    Column,
    Outcome,
    Row,
    Say,
    Scenario,
    Wish,
    number,
    rate,
    seconds,
    share,
    shortage,
)
from common.api import CoordinatorApi
from common.messages import Assignment, PollRequest, Submission

SETTINGS = {"LYDIAN_TTL_S": "3600"}


def measure(wish: Wish, limits: Limits, say: Say) -> Outcome:
    """One row for each size."""
    rows, skipped = list[Row](), list[str]()
    for size_mb in wish.pick(tiny=(1,), quick=(1, 10, 100), full=(1, 10, 100, 400, 1600)):
        lacking = shortage(memory=3 * size_mb * MEGABYTE, disk=10 * size_mb * MEGABYTE)
        if lacking is not None:
            skipped.append(f"{size_mb:,} MB: {lacking}")
            continue
        rounds = wish.rounds or wish.pick(tiny=1, quick=3, full=3 if size_mb > 100 else 10)
        say(f"{size_mb:,} MB, {rounds} times")
        rows.append(case(size_mb, rounds, wish, limits))
    return Outcome(tuple(rows), tuple(skipped))


def case(size_mb: int, rounds: int, wish: Wish, limits: Limits, **settings: str) -> Row:
    """A job of one shard, worked by hand: download, upload and hand in, each with a clock."""
    down, up, taken = list[float](), list[float](), list[float]()
    with running(**SETTINGS, **settings) as fleet, _joined(fleet) as (api, worker):
        weights = Weights.made(fleet.folder / "weights", size_mb)
        fleet.submit(job(size_mb, 1, rounds, {}, wish.seed), TASK.read_text())
        work = _poll(api, worker)
        api.upload(work.id, work.attempt, weights.path)
        first = Submission(attempt=work.attempt, digest=weights.digest, facts=facts(work.shards))
        api.submit(work.id, first)
        for _ in range(rounds + 1):
            work = _poll(api, worker)
            target, base = fleet.folder / f"{work.round}.model", work.base
            assert base is not None
            down.append(timed(api.download_model, base.digest, target, size=base.size))
            target.unlink()
            up.append(timed(api.upload, work.id, work.attempt, weights.path))
            result = Submission(attempt=work.attempt, digest=weights.digest, samples=1)
            taken.append(timed(api.submit, work.id, result))
    down_s, up_s, submit_s = (statistics.median(times[1:]) for times in (down, up, taken))
    total = size_mb * MEGABYTE
    return {
        "megabytes": size_mb,
        "times": rounds,
        "download_s": down_s,
        "download": total / down_s,
        "download_part": total / down_s / limits.loopback,
        "upload_s": up_s,
        "upload": total / up_s,
        "upload_part": total / up_s / limits.loopback,
        "submit_s": submit_s,
        "check": total / submit_s,
    }


@contextmanager
def _joined(fleet: Fleet) -> Iterator[tuple[CoordinatorApi, str]]:
    """A worker that is played by hand, and its id."""
    with CoordinatorApi(fleet.url, fleet.join_token) as api:
        welcome = api.register(registration("by-hand"))
        assert welcome.credential is not None
        api.use_token(welcome.credential)
        yield api, welcome.worker_id


def _poll(api: CoordinatorApi, worker: str) -> Assignment:
    while True:
        answer = api.poll(worker, PollRequest(start_id="s1", claim_key=uuid4().hex, wait_s=25.0))
        if answer is not None and answer.assignment is not None:
            return answer.assignment


SCENARIO = Scenario(
    name="transfers",
    title="Upload and download alone",
    about=(
        "One worker played by hand with the calls that an agent makes, through a real coordinator; the median of so "
        "many times, the first left out. A download is verified and in its file when it ends; shares are of one "
        "loopback stream. *Hand in* is the call that makes an update count: the coordinator reads it once more, whole."
    ),
    measure=measure,
    columns=(
        Column("model", "megabytes", lambda mb: f"{mb:,} MB"),
        Column("times", "times", number),
        Column("download", "download_s", seconds),
        Column("", "download", rate),
        Column("of loopback", "download_part", share),
        Column("upload", "upload_s", seconds),
        Column(" ", "upload", rate),
        Column("of loopback ", "upload_part", share),
        Column("hand in", "submit_s", seconds),
        Column("checked", "check", rate),
    ),
)

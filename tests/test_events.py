"""Streams: every fact once and in order, whoever is slow, comes back or goes away."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import Late
from server import events
from server.events import KEEPALIVE, REST, Hub, Item, Lagged, Subscription, Touched, follow, sse
from server.store import Journal, StoredFact

pytestmark = pytest.mark.anyio


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal.open(tmp_path / "journal.sqlite")) as opened:
        yield opened


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    """One for all examples of a property: making a journal takes longer than an example."""
    with closing(Journal.open(tmp_path_factory.mktemp("lasting") / "journal.sqlite")) as opened:
        yield opened


def fact(number: int, job: str = "a") -> StoredFact:
    return StoredFact(number, "2025-01-01T00:00:00.000Z", job, Late(round=number, shard=0, attempt=1, worker="w"))


def keep(journal: Journal, hub: Hub, job: str = "a") -> StoredFact:
    """What the coordinator does: into the journal first, then to whoever listens."""
    (stored,) = journal.append(job, [Late(round=1, shard=0, attempt=1, worker="w")])
    hub.publish(stored)
    return stored


async def until_closed(subscription: Subscription) -> list[Item]:
    return [item async for item in subscription]


async def everything(subscription: Subscription) -> list[Item]:
    """All that has come so far and, since it is closed by this, will ever come."""
    subscription.close()
    return await until_closed(subscription)


# ---------------------------------------------------------------- the hub


async def test_facts_come_in_order_and_only_of_the_job_asked_for() -> None:
    hub = Hub()
    one, every = hub.subscribe("a"), hub.subscribe(None)
    for number, job in enumerate("aba", start=1):
        hub.publish(fact(number, job))
    assert await everything(one) == [fact(1), fact(3)]
    assert await everything(every) == [fact(1), fact(2, "b"), fact(3)]


async def test_nothing_of_before_the_subscription_comes() -> None:
    hub = Hub()
    hub.publish(fact(1))
    assert await everything(hub.subscribe("a")) == []


async def test_many_touches_are_one_and_come_after_the_facts() -> None:
    hub = Hub()
    one, every = hub.subscribe("a"), hub.subscribe(None)
    for job in "abaa":
        hub.touch(job)
    hub.publish(fact(1))
    assert await everything(one) == [fact(1), Touched("a")]
    assert await everything(every) == [fact(1), Touched("a"), Touched("b")]


async def test_a_reader_that_lags_is_told_once_and_gets_what_comes_afterwards() -> None:
    hub = Hub(queue=3)
    subscription = hub.subscribe("a")
    for number in range(1, 10):
        hub.publish(fact(number))
    assert await anext(subscription) == Lagged()
    hub.publish(fact(10))
    assert await everything(subscription) == [fact(10)]


async def test_a_queue_that_is_just_full_has_lost_nothing() -> None:
    hub = Hub(queue=3)
    subscription = hub.subscribe("a")
    for number in (1, 2, 3):
        hub.publish(fact(number))
    assert await everything(subscription) == [fact(1), fact(2), fact(3)]


async def test_a_reader_is_woken_by_what_comes() -> None:
    hub = Hub()
    subscription = hub.subscribe("a")
    happenings: list[tuple[Callable[[], None], Item]] = [
        (lambda: hub.publish(fact(1)), fact(1)),
        (lambda: hub.touch("a"), Touched("a")),
    ]
    for happen, item in happenings:
        waiting = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        assert not waiting.done()
        happen()
        assert await waiting == item


async def test_giving_up_the_wait_loses_nothing() -> None:
    hub = Hub()
    subscription = hub.subscribe("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await anext(subscription)
    hub.publish(fact(1))
    assert await anext(subscription) == fact(1)


async def test_a_closed_hub_ends_those_who_wait_and_those_who_come() -> None:
    hub = Hub()
    waiting = asyncio.ensure_future(until_closed(hub.subscribe("a")))
    await asyncio.sleep(0)
    hub.publish(fact(1))
    hub.close()
    assert await waiting == [fact(1)]
    assert await until_closed(hub.subscribe("a")) == []


# ---------------------------------------------------------------- a stream


def ids(chunks: list[bytes]) -> list[int]:
    return [int(chunk.split(b"\n")[0][4:]) for chunk in chunks if chunk.startswith(b"id: ")]


def data(chunk: bytes) -> dict[str, object]:
    (line,) = [line for line in chunk.decode().split("\n") if line.startswith("data: ")]
    read = json.loads(line[6:])
    assert isinstance(read, dict)
    return read


async def test_a_stream_begins_with_the_past_then_tells_where_things_stand_then_what_happens(journal: Journal) -> None:
    hub = Hub()
    keep(journal, hub)
    keep(journal, hub, "b")
    keep(journal, hub)
    stream = follow(hub, journal, "a", 1, lambda: '{"type":"now","reason":"waiting"}')
    past, now = await anext(stream), await anext(stream)
    assert (ids([past]), data(past)["job"], data(past)["type"]) == ([3], "a", "late")
    assert now == b'data: {"type":"now","reason":"waiting"}\n\n'
    keep(journal, hub, "b")
    new = keep(journal, hub)
    assert await anext(stream) == sse(new.json(), id=5)
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_situation_is_told_again_only_when_it_reads_differently(journal: Journal) -> None:
    hub, present, asked = Hub(), "{}", asyncio.Event()

    def situation() -> str:
        asked.set()
        return present

    stream = follow(hub, journal, "a", 0, situation)
    assert await anext(stream) == b"data: {}\n\n"
    waiting = asyncio.ensure_future(anext(stream))
    for _ in range(2):
        asked.clear()
        hub.touch("a")
        await asked.wait()
        await asyncio.sleep(0)
        assert not waiting.done()
    present = '{"new":1}'
    hub.touch("a")
    assert await waiting == b'data: {"new":1}\n\n'
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_situation_that_takes_long_to_find_is_found_seldom_and_the_last_one_is_told(journal: Journal) -> None:
    hub, number, spans = Hub(), 0, list[tuple[float, float]]()

    def situation() -> str:
        began = time.monotonic()
        while (ended := time.monotonic()) < began + 0.0005:  # as long as that of a hundred workers
            pass
        spans.append((began, ended))
        return f'{{"number":{number}}}'

    async def read() -> None:
        async for chunk in follow(hub, journal, "a", 0, situation):
            if data(chunk)["number"] == 200:
                hub.close()

    reading = asyncio.ensure_future(read())
    for at in range(1, 201):
        number = at
        hub.touch("a")
        await asyncio.sleep(0)
    await reading
    for (began, ended), (next_began, _) in pairwise(spans):
        assert next_began - ended >= REST * (ended - began)


async def test_a_stream_ends_when_nothing_more_will_happen_and_all_was_sent(journal: Journal) -> None:
    hub = Hub()
    over = False
    stream = follow(hub, journal, "a", 0, lambda: None if over else "{}")
    assert await anext(stream) == b"data: {}\n\n"
    keep(journal, hub)
    keep(journal, hub)
    hub.touch("a")
    over = True
    keep(journal, hub)
    assert ids([chunk async for chunk in stream]) == [1, 2, 3]
    assert [chunk async for chunk in follow(hub, journal, "a", 3, lambda: None)] == []


async def test_what_happens_while_the_past_is_read_comes_once(journal: Journal) -> None:
    hub, over = Hub(), False
    keep(journal, hub)
    stream = follow(hub, journal, "a", 0, lambda: None if over else "{}")
    chunks = [await anext(stream)]
    keep(journal, hub)  # is in the queue, and is found in the journal too
    chunks += [await anext(stream), await anext(stream)]
    over = True
    hub.touch("a")
    chunks += [chunk async for chunk in stream]
    assert ids(chunks) == [1, 2]


async def test_a_stream_ends_with_the_hub(journal: Journal) -> None:
    hub = Hub()
    keep(journal, hub)
    hub.close()
    assert ids([chunk async for chunk in follow(hub, journal, "a", 0, lambda: "{}")]) == [1]


async def test_a_stream_that_goes_away_leaves_nothing_in_the_hub(journal: Journal) -> None:
    hub = Hub()
    stream = follow(hub, journal, "a", 0, lambda: "{}")
    await anext(stream)
    assert len(hub._subscriptions) == 1
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert hub._subscriptions == set()


async def test_silence_is_broken_by_a_comment_and_used_to_look_again(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_S", 0.01)
    hub, situations = Hub(), iter(["{}", "{}", '{"late":1}'])
    stream = follow(hub, journal, "a", 0, lambda: next(situations))
    assert await anext(stream) == b"data: {}\n\n"
    assert await anext(stream) == KEEPALIVE
    journal.append("a", [Late(round=1, shard=0, attempt=1, worker="w")])  # and nobody published it
    assert ids([await anext(stream)]) == [1]
    assert await anext(stream) == KEEPALIVE
    assert await anext(stream) == b'data: {"late":1}\n\n'
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_long_past_lets_others_have_their_turn(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAGE", 10)
    journal.append("a", [fact(number).fact for number in range(1, 101)])
    turns, over = 0, False

    async def other() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.ensure_future(other())
    chunks = [chunk async for chunk in follow(Hub(), journal, "a", 0, lambda: None)]
    over = True
    await beside
    assert ids(chunks) == list(range(1, 101))
    assert turns >= 10


class Reader:
    """One who watches job `a`: reads as many events as it is allowed to, and comes back after its last id."""

    def __init__(self, stream: Callable[[int], AsyncIterator[bytes]]) -> None:
        self.seen: list[int] = []
        self._stream = stream
        self._allowed = asyncio.Semaphore(0)
        self._task = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        async for chunk in self._stream(self.seen[-1] if self.seen else 0):
            self.seen += ids([chunk])
            await self._allowed.acquire()

    async def reads(self, events_more: int) -> None:
        for _ in range(events_more):
            self._allowed.release()
        for _ in range(10):
            await asyncio.sleep(0)

    async def comes_back(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._task = asyncio.ensure_future(self._read())

    async def ends(self) -> None:
        await self.reads(1000)
        await self._task


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("happens"), st.integers(1, 4)),
        st.tuples(st.just("elsewhere"), st.integers(1, 4)),
        st.tuples(st.just("touch"), st.just(1)),
        st.tuples(st.just("reads"), st.integers(1, 4)),
        st.tuples(st.just("comes back"), st.just(1)),
    ),
    max_size=12,
)


@given(STEPS, st.integers(1, 3))
def test_no_reader_ever_misses_a_fact_or_gets_one_twice_or_out_of_order(
    lasting: Journal, steps: list[tuple[str, int]], queue: int
) -> None:
    async def play() -> None:
        hub, over, number, kept = Hub(queue), False, 0, list[int]()
        begin = max((stored.id for stored in lasting.facts()), default=0)  # what other examples left counts as seen

        def situation() -> str | None:
            nonlocal number
            number += 1
            return None if over else f"{number}"

        reader = Reader(lambda last: follow(hub, lasting, "a", max(begin, last), situation))
        for step, times in steps:
            if step == "reads":
                await reader.reads(times)
            elif step == "comes back":
                await reader.comes_back()
            elif step == "touch":
                hub.touch("a")
            else:
                job = "a" if step == "happens" else "b"
                new = [keep(lasting, hub, job).id for _ in range(times)]
                kept += new if job == "a" else []
        over = True
        hub.touch("a")
        await reader.ends()
        assert reader.seen == kept
        assert hub._subscriptions == set()

    asyncio.run(play())


# ---------------------------------------------------------------- the wire


def test_an_event_has_its_id_type_and_data_and_ends_with_an_empty_line() -> None:
    assert sse("{}", event="round", id=7) == b"id: 7\nevent: round\ndata: {}\n\n"
    assert sse("{}") == b"data: {}\n\n"
    assert sse("") == b"data: \n\n"
    assert sse('{\n"a":1}') == b'data: {\ndata: "a":1}\n\n'


def test_the_type_of_an_event_cannot_smuggle_in_another() -> None:
    with pytest.raises(ValueError, match="one line"):
        sse("{}", event="round\nid: 9")


@given(st.text() | st.text("a\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029", max_size=5))
def test_any_text_in_json_reaches_a_client_that_reads_by_lines(text: str) -> None:
    answer = httpx2.Response(200, content=sse(json.dumps(text, ensure_ascii=False), id=1))
    lines = [line for line in answer.iter_lines() if line.startswith("data:")]
    assert [json.loads(line[5:]) for line in lines] == [text]

"""What all open pages share: the state is looked at and rendered once, however many look, and only while someone does.

    /ui/live ──versions──▶ page: "this part reads differently now" ──GET, If-None-Match──▶ Board.part ──▶ HTML

A part is kept for ten times as long as it took to make: pages cost at most about a tenth of a core a part, on a small
fleet they follow at once. A job's past is read page by page, so that others have their turn in between.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from common.messages import OVER
from server import views
from server.coordinator import Coordinator
from server.pages import timeline, words, workers
from server.pages.history import History
from server.pages.markup import render
from server.rounds import Job

Part = Literal["head", "actions", "now", "output", "timeline", "rounds", "shares", "log"]
JOB_PARTS: tuple[Part, ...] = ("head", "actions", "now", "output", "timeline", "rounds", "shares", "log")
PAST: frozenset[Part] = frozenset({"timeline", "rounds", "shares", "log"})  # parts that are made of the job's past

T = TypeVar("T")

KEPT_HISTORIES = 8  # jobs
KEPT_RENDERINGS = 200
FACTS_A_TURN = 200  # before others have theirs
JOBS_PAGE = 30  # rows
SHOWN_WORKERS = 40  # of those at work for a job
QUOTED_WORKERS = 8  # whose task's output is shown
COSTS = 10  # a rendering is kept for so many times the seconds that it took


@dataclass(frozen=True)
class Rendering:
    """A part as it reads now."""

    body: str
    version: str  # two that are equal read the same


@dataclass
class _Past:
    history: History = field(default_factory=History)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class Board:
    """The pages of one coordinator."""

    coordinator: Coordinator
    clock: Callable[[], float] = time.perf_counter
    _kept: OrderedDict[tuple[object, ...], tuple[float, object]] = field(default_factory=OrderedDict)
    _pasts: OrderedDict[str, _Past] = field(default_factory=OrderedDict)

    # ------------------------------------------------------------ the overview

    def fleet(self, find: str, state: str, sort: str, page: int) -> Rendering:
        """The table of workers, as asked for."""

        def make() -> Rendering:
            shown = workers.choose(self._rows()[0], find=find, state=state, sort=sort, page=page)
            return _rendering(render("part_fleet.html", shown=shown, marks=workers.MARKS, state=state, find=find))

        return self._once(("fleet", find, state, sort, page), make)

    def _rows(self) -> tuple[list[workers.Row], str]:
        def make() -> tuple[list[workers.Row], str]:
            known = list(self.coordinator.fleet.workers.values())
            rows = [workers.row_of(view) for view in views.worker_views(self.coordinator, known)]
            return rows, _digest(repr(rows))

        return self._once(("rows",), make)

    def jobs(self, page: int) -> Rendering:
        """The table of jobs: those that go on first, then the newest."""

        def make() -> Rendering:
            known = list(self.coordinator.jobs.values())
            ordered = [job for job in known if not job.over] + [job for job in reversed(known) if job.over]
            pages = max(1, -(-len(ordered) // JOBS_PAGE))
            at = min(max(page, 1), pages)
            shown = [views.job_view(self.coordinator, job) for job in ordered[(at - 1) * JOBS_PAGE : at * JOBS_PAGE]]
            going = sum(not job.over for job in known)
            body = render("part_jobs.html", jobs=shown, page=at, pages=pages, all=len(known), going=going, over=OVER)
            return _rendering(body)

        return self._once(("jobs", page), make)

    # ------------------------------------------------------------ one job

    async def part(self, job: Job, name: Part, round_index: int | None = None) -> Rendering:
        """A part of a job's page; of the timeline, one round (None: the newest)."""
        past = await self.past(job.id) if name in PAST else History()
        return self._once((job.id, name, round_index), lambda: self._part(job.id, name, past, round_index))

    def _part(self, job_id: str, name: Part, past: History, round_index: int | None) -> Rendering:
        job = self.coordinator.jobs[job_id]
        match name:
            case "head":
                view, now = views.job_view(self.coordinator, job), views.now_of(self.coordinator, job)
                body = render("part_head.html", job=view, now=now, over=job.over)
            case "actions":
                models = sorted(self.coordinator.models.get(job_id, {}))
                by = self.coordinator.submitted_by[job_id]
                body = render("part_actions.html", job=job, state=job.phase.state, models=models, submitted_by=by)
            case "now":
                present = views.now_of(self.coordinator, job)
                more = max(0, len(present.workers) - SHOWN_WORKERS)
                rows = [(one, workers.progress_words(one.progress), workers.part_of(one.progress))
                        for one in present.workers[:SHOWN_WORKERS]]  # fmt: skip
                body = render("part_now.html", rows=rows, more=more, over=job.over)
            case "output":
                body = self._output(job)
            case "timeline":
                body = render("part_timeline.html", picture=self._picture(past, round_index), past=past, id=job_id)
            case "rounds":
                body = render("part_rounds.html", past=past, metrics=_metrics(past))
            case "shares":
                body = render("part_shares.html", past=past, ranked=past.ranked()[:SHOWN_WORKERS])
            case "log":
                body = render("part_log.html", events=list(reversed(past.events)))
        return _rendering(body)

    def _output(self, job: Job) -> str:
        """What the task writes on those at work for a job, as their last heartbeats had it."""
        said = views.outputs(self.coordinator, job)
        quoted, more = said[:QUOTED_WORKERS], max(0, len(said) - QUOTED_WORKERS)
        return render("part_output.html", quoted=quoted, more=more, nothing=words.silence(job.spec, over=job.over))

    def _picture(self, past: History, round_index: int | None) -> timeline.Picture | None:
        """The round that was asked for, else the newest in which anything was handed out."""
        used = [number for number, detail in past.details.items() if detail.attempts]
        chosen = round_index if round_index in past.details else max(used, default=None)
        if chosen is None:
            return None
        known = self.coordinator.fleet.workers.values()
        names = {worker.id: worker.name for worker in known}
        links = {worker.id: worker.link for worker in known}
        return timeline.draw(past.details[chosen], names, links, time.time())

    async def past(self, job_id: str) -> History:
        """A job's history, with everything that has happened."""
        kept = self._pasts.setdefault(job_id, _Past())
        self._pasts.move_to_end(job_id)
        while len(self._pasts) > KEPT_HISTORIES:
            self._pasts.popitem(last=False)
        async with kept.lock:  # who comes while it is read waits for the same reading
            journal, history = self.coordinator.journal, kept.history
            while page := list(journal.facts(after=history.last_id, job=job_id, limit=FACTS_A_TURN)):
                for stored in page:
                    history.take(stored.id, stored.at, stored.fact)
                if len(page) < FACTS_A_TURN:
                    break
                await asyncio.sleep(0)
        return kept.history

    # ------------------------------------------------------------ what changed

    async def versions(self, job_id: str | None) -> dict[str, str]:
        """Part -> version, of the overview (None) or of a job's page."""
        if job_id is None:
            return {"fleet": self._rows()[1], "jobs": self.jobs(1).version}
        job = self.coordinator.job(job_id)
        past = await self.past(job_id)
        versions = {"curves": f"{past.rounds}.{max(past.evaluated, default=0)}"}
        for name in JOB_PARTS:
            versions[name] = (await self.part(job, name)).version
        return versions

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """What `make` gives, or gave a moment ago."""
        began = self.clock()
        if (kept := self._kept.get(key)) is not None and began < kept[0]:
            return kept[1]  # type: ignore[return-value]  # kept under the same key by the same caller
        made = make()
        ended = self.clock()
        self._kept[key] = (ended + COSTS * (ended - began), made)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_RENDERINGS:
            self._kept.popitem(last=False)
        return made


def _metrics(past: History) -> list[str]:
    """The metrics of evaluations that have a column, accuracy first; those of single classes have none."""
    found = {name for one in past.evaluated.values() for name in one.metrics if "/" not in name}
    return sorted(found, key=lambda name: (name != "accuracy", name))[:4]


def _rendering(body: str) -> Rendering:
    return Rendering(body, _digest(body))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=9).hexdigest()

"""`lydian track`: read a job from its beginning, and tell its points to every tracker that was named.

api.events ──▶ Teller ──▶ Point ──▶ tracker.take, and tracker.settle when the coordinator has told all
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import typer

from client import shown
from client.calling import Ending
from client.tracking.points import Teller, run_of
from client.tracking.trackers import Tracker, Wish, named, tracker
from client.watching import read_event
from common.api import CoordinatorApi
from common.messages import OVER

Event = Mapping[str, Any]


def run_track(api: CoordinatorApi, job: str, wishes: Sequence[Wish], *, follow: bool) -> Ending:
    """Track a job up to now, or with `follow` until it is over.

    Raises:
        LydianError: a tracker failed, or is another job's; and whatever the coordinator answers.
    """
    view = api.job(job)
    made = [(one, tracker(one, run_of(view))) for one in wishes]
    events = api.events(view.id, on_wait=lambda said: typer.echo(shown.one_line(said), err=True))
    try:
        with ExitStack() as stack:
            for one, opened in made:
                stack.enter_context(named(one, opened))
                stack.enter_context(opened)
            last = tell(events, made, follow=follow)
    except KeyboardInterrupt:
        typer.echo(f"{view.id} goes on; the same command goes on with it", err=True)
        return Ending.INTERRUPTED
    typer.echo(f"tracked {view.id} up to round {last}", err=True)
    for _, opened in made:
        typer.echo(opened.place)
    return Ending.FINE


def tell(events: Iterable[Event], made: Sequence[tuple[Wish, Tracker]], *, follow: bool) -> int:
    """Tell events as points until they end; without `follow`, until the coordinator has told what has happened.

    Returns:
        The last round that was told.
    """
    teller, last = Teller(), 0
    for event in events:
        if "id" not in event:  # `now`: every fact has been told
            _each(made, lambda one: one.settle())
            if not follow:
                break
            continue
        fact = read_event(event)
        point = None if fact is None else teller.take(event["id"], str(event.get("at", "")), fact)
        if point is not None:
            last = point.round
            _each(made, lambda one, point=point: one.take(point))  # type: ignore[misc]
        if event["type"] == "job" and event["state"] in OVER:
            break
    return last


def _each(made: Iterable[tuple[Wish, Tracker]], do: Callable[[Tracker], None]) -> None:
    for wish, one in made:
        with named(wish, one):
            do(one)

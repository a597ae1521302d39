"""The beat of one assignment: tells the coordinator how it goes, and stops the child when it is told to. A thread.

It decides what becomes of the child, never what becomes of a result: once there is one, handing it in is worth a try
whatever the beats were answered.
"""

import logging
import threading
from collections.abc import Callable
from typing import Self

from common.api import CoordinatorApi
from common.errors import LydianError
from common.messages import Heartbeat, Progress
from worker import plan
from worker.child import Child, TaskStopped
from worker.said import last_said, log_since, log_size
from worker.senses import gauge
from worker.waiting import Waiting

log = logging.getLogger("lydian.worker")

WHY_LIMIT = 500  # characters of a reason, as the messages take them
STOP_GRACE_S = 10.0  # for the child to stop at its next step, before it is killed
LAST_BEAT_S = 2.0  # for a beat that is under way, which must not come after what is said of its work next


class Watch:
    """What is to be known of work under way: where it stands, whether it is to be dropped, and which child does it."""

    def __init__(self) -> None:
        """Nothing is ordered yet."""
        self.progress = Progress(doing="loading")
        self.order_reason = ""
        self.ordered = threading.Event()  # the work is to be dropped, or put aside
        self.aside = ""  # why it is put aside: it may be gone on with later; empty: it is not
        self._child: Child | None = None
        self._hears = False  # what the task writes may be shown to who follows the job
        self._log_from = 0  # bytes of the child's log that are of earlier work
        self._acting = threading.Lock()  # an answer that comes late must not stop what the child does next

    def see(self, progress: Progress) -> None:
        """The child reported."""
        self.progress = progress

    def put_aside(self, why: str) -> None:
        """End the child at once, and keep what it left. Any thread may call this; again is harmless."""
        self.aside = self.aside or why
        self.ordered.set()
        self._act(Child.kill)

    def use(self, child: Child, *, hears: bool = False) -> None:
        """This child does the work from now on.

        Args:
            child: which.
            hears: what it writes goes along with the beats.

        Raises:
            TaskStopped: the work was to be dropped before.
        """
        with self._acting:
            self._child, self._hears, self._log_from = child, hears, log_size(child.log_path)
        if self.ordered.is_set():
            raise TaskStopped(self.order_reason or self.aside or "the work is to be dropped")

    def _act(self, action: Callable[[Child], None]) -> None:
        with self._acting:
            if self._child is not None:
                action(self._child)


class Heart(Watch, threading.Thread):
    """Beats while an assignment is under way. A context manager: inside, it beats."""

    def __init__(
        self, api: CoordinatorApi, worker: str, start_id: str, assignment: str, attempt: int, period_s: float
    ) -> None:
        """Beats every `period_s` seconds, the first time after one period."""
        threading.Thread.__init__(self, name="heart", daemon=True)
        Watch.__init__(self)
        self.worker, self.assignment, self.attempt = worker, assignment, attempt
        self.on_first_beat: Callable[[], None] = lambda: None  # the work is not that short, so worth being kept
        self.on_pause: Callable[[], None] = lambda: None  # an operator wants the worker out of the way
        self.held = ""  # why the child stands still; empty: it does not
        self.order = "continue"
        self.fatal: LydianError | None = None  # the coordinator will take nothing from this process any more
        self._api, self._start_id, self._period_s = api, start_id, period_s
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._acting:
            self._child = None
        self._ended.set()
        self.join(LAST_BEAT_S)

    def let_go(self) -> None:
        """Stop the work at once: the time to finish it is up. Any thread may call this."""
        self.ordered.set()
        self._act(Child.kill)

    def run(self) -> None:
        """Beat until the assignment is over, or is ordered to be."""
        waiting, first, resends = Waiting(), True, 0
        while not self._ended.wait(self._period_s):
            if first:
                first = False
                self.on_first_beat()
            try:
                answer = self._api.heartbeat(self.worker, self._beat())
            except LydianError as error:
                then = plan.after(error, resends=resends)
                resends += then.action == "resend"
                if then.action in ("wait", "resend"):
                    waiting.say(f"heartbeat: {error}; the work goes on", level=logging.WARNING)
                    continue
                if plan.is_rival(error) or then.action == "stop":
                    self.fatal = error
                self._obey("superseded", str(error))
                return
            waiting.over()
            resends = 0
            if answer.order in ("cancelled", "superseded"):
                self._obey(answer.order, answer.reason)
                return
            self.order = answer.order
            if answer.order == "pause":
                self.on_pause()

    def _beat(self) -> Heartbeat:
        return Heartbeat(
            start_id=self._start_id,
            assignment=self.assignment,
            attempt=self.attempt,
            progress=self._gauged(),
            held=self.held[:WHY_LIMIT],
            said=self._said(),
        )

    def _gauged(self) -> Progress:
        """Where the work stands, with the device's memory, temperature and power now."""
        child = self._child
        device = child.build.device if child is not None and child.build is not None else "cpu"
        return self.progress.model_copy(update=gauge(device)._asdict())

    def _said(self) -> str:
        """What the task wrote last, of this work."""
        child = self._child
        return last_said(log_since(child.log_path, self._log_from)) if child is not None and self._hears else ""

    def _obey(self, order: str, reason: str) -> None:
        self.order, self.order_reason = order, reason
        self.ordered.set()
        self._act(Child.stop)
        if not self._ended.wait(STOP_GRACE_S):  # a step longer than that, or a loop of its own that never looks
            self._act(Child.kill)

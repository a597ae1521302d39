"""Having an assignment done: its base fetched, the child asked, and what came out spooled.

The child and the job that it has loaded are kept between two assignments. Nothing here talks to the coordinator but for
what the agent lends: fetching something, patiently.
"""

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.api import CoordinatorApi
from common.codecs import codec
from common.deltas import apply_step, encode_update, kept_size
from common.drift import weight_of
from common.errors import BadJobError, BadUpdateError, LydianError
from common.messages import Assignment, ModelFacts, Preparation, Progress, Submission, TaskRef
from common.sharding import Partition, order_of
from common.slots import Carried, write_correction, write_slot
from common.tasks import BUILTIN
from common.weights import file_digest, read_layout
from worker import plan
from worker.child import Child, TaskFailure, TaskStopped
from worker.heart import Heart, Watch
from worker.options import Options
from worker.sealing import Sealing, mask
from worker.secret import noise_seed
from worker.spool import Durability, Place, Sizes, Spool, Trained, Untrained

log = logging.getLogger("lydian.worker")

Fetch = Callable[[Callable[[], int], Watch], int]
"""Make a call that downloads until it has, and return the bytes it brought."""


FAREWELL_S = 30.0  # without a sign of life, for what a script does after its last round
BY_LABEL = ("dirichlet", "labels")  # partitions
BY_COLUMN = (*BY_LABEL, "natural")  # that need a number a sample: its class, or its id


def encodes(assignment: Assignment) -> bool:
    """Whether the update travels encoded, and not as the whole model that the child writes."""
    return assignment.spec.aggregation.update != "fp32" or assignment.spec.secure.enabled


def is_private(assignment: Assignment) -> bool:
    """Whether noise is drawn here."""
    return assignment.spec.privacy.level == "example"


def written_to(begun: Untrained) -> Path:
    """Where the child writes what it has trained."""
    return begun.place.trained if encodes(begun.assignment) else begun.place.update


class NoRoom(Exception):  # noqa: N818 - the work goes back, and the worker waits for room
    """The disk has no room for the work."""

    def __init__(self, sentence: str, room: int) -> None:
        super().__init__(sentence)
        self.room = room  # bytes


class Trainer:
    """Has the child carry out assignments, one at a time."""

    def __init__(self, api: CoordinatorApi, spool: Spool, options: Options, log_folder: Path, fetch: Fetch) -> None:
        """Starts nothing yet."""
        self._api, self._spool, self._options, self._fetch = api, spool, options, fetch
        self._log_path = log_folder / "child.log"
        self._child: Child | None = None
        self._opened: str | None = None  # the job whose task the child has loaded
        self._script = False  # whether that is a script, which runs until the job is over
        self._ran: set[str] = set()  # digests of the tasks, other than built-in ones, whose code has run in the child
        self._samples: dict[str, int] = {}  # job -> samples in its training set, for the job in the child
        self._cuts: dict[str, Partition] = {}  # job -> its training set in order, likewise
        self._came = ("", 0)  # the model that came with its assignment, and its bytes, until they are counted
        self._computes = ("", "", "")  # job, precision and reason that the log has been told of

    # ------------------------------------------------------------ the child

    @property
    def loaded(self) -> tuple[str, ...]:
        """The job whose data and model are in memory, if there is one."""
        return (self._opened,) if self._opened is not None else ()

    def ready(self) -> Child:
        """A child that has torch loaded, or loads it; started now if there is none.

        Raises:
            OSError: it cannot be started, or its log not be written.
        """
        if self._child is None or not self._child.alive:
            self.close()
            self._child = Child.start(
                device=self._options.device,
                threads=self._options.threads,
                log_path=self._log_path,
                gpu_memory=self._options.gpu_memory,
                cage=self._options.cage,
            )
        return self._child

    def take_model(self, digest: str, data: bytes | memoryview) -> None:
        """Keep a base model that came with its assignment.

        Raises:
            OSError: the disk does not take it.
        """
        self._spool.put_model(digest, data)
        self._came = (digest, len(data))

    def kill(self) -> None:
        """End the child at once, whatever it does. Any thread may call this; `close` has still to be called."""
        if (child := self._child) is not None:
            child.kill()

    def hold(self) -> None:
        """Have the child stand still. Any thread may call this."""
        if (child := self._child) is not None:
            child.hold()

    def go_on(self) -> None:
        """Undo `hold`. Any thread may call this."""
        if (child := self._child) is not None:
            child.go_on()

    def use(self, device: str) -> None:
        """From now on train on this device: the next child is started there."""
        self.close()
        self._options = replace(self._options, device=device)

    def close(self) -> None:
        """End the child, and forget the job that it had loaded."""
        if self._child is not None:
            self._child.kill()
        self._child = None
        self._ran.clear()
        self._forget_job()

    def forget(self) -> None:
        """Forget the job that is loaded. The child is kept, with its torch, if it has run only built-in tasks."""
        if self._child is None or self._ran:
            self._let_script_end()
            self.close()
            return
        try:
            self._ask(self._child, {"do": "close"}, Watch())
        except (TaskFailure, TaskStopped):
            self.close()
        self._forget_job()

    def _let_script_end(self) -> None:
        """Have a script leave its loop of rounds and do what it does after it; what fails there is in the log alone."""
        if self._script and self._child is not None and self._child.alive:
            try:
                self._child.ask({"do": "close"}, on_progress=lambda _: None, stall_s=FAREWELL_S)
            except (TaskFailure, TaskStopped) as ended:
                log.warning("%s: after its last round: %s", self._opened, ended)

    def _forget_job(self) -> None:
        self._opened, self._script = None, False
        self._samples.clear()
        self._cuts.clear()

    def prepare(self, asked: Preparation, watch: Watch) -> None:
        """Have the child load a job's task and data, so that the first assignment of the job finds them there.

        Raises:
            TaskFailure: the worker's owner does not allow the task, or it failed; the assignment will say so again.
            TaskStopped: the child was stopped or killed.
            OSError: the disk takes nothing.
        """
        self.check_trust(asked.task)
        self._described(self._child_for(asked, watch), asked, watch)

    def _child_for(self, work: Assignment | Preparation, watch: Watch) -> Child:
        """The child with the task of this job loaded: once a job, not once a round."""
        if self._opened == work.job and self._child is not None and self._child.alive:
            watch.use(self._child, hears=not work.spec.hides_data)
            return self._child
        if self._opened is not None or self._ran - {work.task.digest}:
            self.forget()
        child = self.ready()
        watch.use(child, hears=not work.spec.hides_data)
        watch.progress = Progress(doing="loading")
        path, defaults = self._task_of(work.task, watch)
        if work.task.digest is not None:
            self._ran.add(work.task.digest)
        config = plan.child_config(work.spec, defaults, self._options.data)
        terms = plan.client_terms(work.spec)
        allowed = {} if work.task.digest is None else {"allowed": work.task.digest}
        self._script = work.spec.script
        self._ask(child, {"do": "open", "task": str(path), "config": config, "terms": terms, **allowed}, watch)
        self._opened = work.job
        return child

    def _task_of(self, task: TaskRef, watch: Watch) -> tuple[Path, dict[str, Any]]:
        """The task's file, and the defaults of its configuration."""
        if task.digest is None:
            builtin = BUILTIN[task.name]
            return builtin.file, dict(builtin.config)
        digest, path = task.digest, self._spool.task(task.digest, task.name)
        if not path.exists() or file_digest(path) != digest:
            self._fetch(lambda: self._api.download_task(digest, path, stop=watch.ordered), watch)
        return path, {}

    def _ask(self, child: Child, command: dict[str, Any], watch: Watch) -> dict[str, Any]:
        try:
            return child.ask(command, on_progress=watch.see, stall_s=self._options.stall_s)
        except TaskFailure:
            if self._script:  # it may have ended in the middle: the next work begins it anew
                self.close()
            raise

    # ------------------------------------------------------------ the work

    def check_trust(self, task: TaskRef) -> None:
        """Make sure that the worker's owner allows this task.

        Raises:
            TaskFailure: the owner does not (not_trusted), or this version has no such task (unknown_task).
        """
        options = self._options
        try:
            signers = options.signers.now() if options.trust == "signed" else ()
        except LydianError as error:  # the owner's list was spoilt since the start
            raise TaskFailure("not_trusted", f"{options.name} runs no task file: {error}", "") from error
        refused = plan.refusal(task, builtin=BUILTIN, trust=options.trust, trusted=options.trusted, signers=signers)
        if refused is not None:
            raise TaskFailure(refused.code, refused.sentence, "")

    def carry_out(self, begun: Untrained, durability: Durability, heart: Heart) -> Trained:
        """Download, train, and spool what came out. A train update is on its way to the disk when this returns.

        Raises:
            TaskFailure: the task failed, or the child.
            TaskStopped: the child was stopped or killed.
            NoRoom: the disk has no room for the base or the update.
            OSError: the disk takes nothing.
        """
        assignment = begun.assignment
        self._make_sure_of_room(assignment)
        sealing = self._sealing(begun, heart)
        base, received = self._base(assignment, heart)
        carried, more = self._carried(begun, heart)
        child = self._child_for(assignment, heart)
        if assignment.kind == "init":
            return self._spool.finish(begun, self._init(child, begun, base, heart))
        if carried is not None and (carried.slot or carried.total):
            write_correction(Path(base), carried, begun.place.correction)
        done = self._ask(child, self._command(child, begun, base, heart), heart)
        digest = None
        if assignment.kind == "train":
            if not encodes(assignment):  # else it is not the update yet
                durability.begin_bytes()  # beside the hashing
            digest = (
                self._digest(begun, base) if sealing is None else mask(begun, base, done["samples"], sealing.result())
            )
        if carried is not None:
            self._leave_slot(begun, base, carried, done.get("rate_sum"))
        submission = Submission(
            attempt=assignment.attempt,
            digest=digest,
            samples=done["samples"],
            steps=done.get("steps", 0),
            seconds=done["seconds"],
            metrics=done["metrics"],
            bytes_down=received + more,
            resumed_at=done.get("resumed_at", 0),
            private=done.get("private"),
            rate_sum=done.get("rate_sum"),
        )
        trained = self._spool.finish(begun, submission)
        if assignment.kind == "train":
            durability.begin_result()  # beside the upload
            self._learn(begun, child, done)
        return trained

    def _sealing(self, begun: Untrained, heart: Heart) -> Sealing | None:
        """Begin to agree on masks, beside the training; None: the update is to have none."""
        if begun.assignment.kind != "train" or not begun.assignment.spec.secure.enabled:
            return None
        sealing = Sealing(self._api, self._spool, begun, self._fetch, heart, heart.worker)
        sealing.start()
        return sealing

    def _make_sure_of_room(self, assignment: Assignment) -> None:
        digest = assignment.base.digest if assignment.base else ""
        needed = plan.room_needed(assignment, fetched=self._spool.fetched(digest) if digest else 0)
        free = self._spool.make_room(needed, keep=digest)
        if free < needed:
            sentence = f"{self._options.name} has {free} bytes free in {self._spool.folder}, and this needs {needed}"
            raise NoRoom(sentence, needed)

    def _base(self, assignment: Assignment, heart: Heart) -> tuple[str, int]:
        """The base model as a local file. Returns its path and the bytes that were downloaded for it."""
        base = assignment.base
        if base is None:
            return "", 0
        (came, received), self._came = self._came, ("", 0)
        path, received = self._spool.model(base.digest), received if came == base.digest else 0
        if not self._spool.has_model(base.digest):
            heart.progress = Progress(doing="downloading")
            received += self._walk(assignment, heart)
        if not self._spool.has_model(base.digest):
            try:
                received += self._fetch(
                    lambda: self._api.download_model(base.digest, path, size=base.size, stop=heart.ordered), heart
                )
            except OSError:
                self._spool.forget_part(base.digest)  # its room may be what is missing
                raise
            self._spool.took_model(base.digest)
        return str(path), received

    def _walk(self, assignment: Assignment, heart: Heart) -> int:
        """Come to the base by steps from a model that is here, if there is such a way. Returns the bytes downloaded.

        Where a step does not lead to the model that it should, the whole model is fetched: nothing is trained on a
        model that is not the coordinator's, byte by byte.
        """
        received, aggregation = 0, assignment.spec.aggregation
        for step in plan.way(assignment.steps, self._spool.has_model):
            file, target = self._spool.step(step.digest), self._spool.model(step.model)
            received += self._fetch(
                partial(self._api.download_model, step.digest, file, size=step.size, stop=heart.ordered), heart
            )
            made = target.with_suffix(".made")
            try:
                found = apply_step(self._spool.model(step.base), file, made, codec(aggregation.update))
            except BadUpdateError as error:
                log.warning("the step %s… cannot be taken, so the model is fetched whole: %s", step.digest[:12], error)
                return received
            finally:
                file.unlink()
            if found != step.model:
                log.warning("the step %s… leads to %s… and not to %s…, so the model is fetched whole",
                            step.digest[:12], found[:12], step.model[:12])  # fmt: skip
                made.unlink()
                return received
            made.replace(target)
            self._spool.took_model(step.model)
        return received

    # ------------------------------------------------------------ train.drift

    def _carried(self, begun: Untrained, heart: Heart) -> tuple[Carried | None, int]:
        """What the shard begins with, as local files, and the bytes that were downloaded for it; None: nothing, ever.

        The coordinator's files are the truth: one that is here is used only if its digest is the one that is wanted.
        """
        slots, train, place = begun.assignment.slots, begun.assignment.spec.train, begun.place
        if slots is None or train.drift == "none":
            return None, 0
        wanted = ((slots.own, self._spool.slot(place)), (slots.total, self._spool.slot_total(place)))
        received = sum(self._fetch_slot(place, digest, path, slots.size, heart) for digest, path in wanted if digest)
        own, total = (path if digest else None for digest, path in wanted)
        return Carried(train.drift, slots.shards, own, total), received

    def _fetch_slot(self, place: Place, digest: str, path: Path, size: int, heart: Heart) -> int:
        """Have the file of this digest at a path. Returns the bytes downloaded."""
        if path.exists() and file_digest(path) == digest:
            return 0
        path.parent.mkdir(exist_ok=True)
        heart.progress = Progress(doing="downloading")
        # In the attempt's own folder, since what a broken call leaves there can be of no other digest.
        here = place.folder / f"{digest}.slot"
        received = self._fetch(lambda: self._api.download_model(digest, here, size=size, stop=heart.ordered), heart)
        here.replace(path)
        return received

    def _leave_slot(self, begun: Untrained, base: str, carried: Carried, rate_sum: float | None) -> None:
        """Make what the shard carries should the update count, as the coordinator will: it need not be downloaded then.

        Nothing but a download hangs on it.
        """
        train, aggregation, place = begun.assignment.spec.train, begun.assignment.spec.aggregation, begun.place
        chosen = codec(aggregation.update) if encodes(begun.assignment) else None
        try:
            weight = weight_of(train, rate_sum)
            write_slot(Path(base), place.update, chosen, carried, weight, place.slot, durable=False)
        except (OSError, BadUpdateError) as error:
            if isinstance(error, OSError) and error.errno == errno.EIO:
                raise
            log.warning("%s: its slot is downloaded when it is needed: %s", place.assignment, error)

    def _digest(self, begun: Untrained, base: str) -> str:
        """Encode what was trained, where the job wants that. Returns the digest of the update."""
        aggregation, place = begun.assignment.spec.aggregation, begun.place
        if not encodes(begun.assignment):
            return file_digest(place.update)
        chosen = codec(aggregation.update)
        feedback = chosen.feedback if aggregation.feedback is None else aggregation.feedback
        error = self._spool.error(place) if feedback else None
        if error is not None and error.exists() and error.stat().st_size != kept_size(read_layout(Path(base))):
            log.warning("%s: what earlier updates left out is of another model, and is dropped", place.assignment)
            error.unlink()
        pending = place.pending if feedback else None
        encoded = encode_update(Path(base), place.trained, place.update, chosen, error=error, pending=pending)
        place.trained.unlink()
        return encoded.digest

    def _command(self, child: Child, begun: Untrained, base: str, heart: Heart) -> dict[str, Any]:
        assignment, place = begun.assignment, begun.place
        sizes = self._sizes(begun, child)
        if assignment.kind == "evaluate":
            size = plan.batch_size(assignment.spec, found=sizes.batch_size)
            own = self._spool.newest_personal(place) if assignment.spec.train.personal else None
            command = {"do": "evaluate", "base": base, "batch_size": size, **plan.measuring(assignment.spec)}
            return {**command, **({"personal_from": str(own)} if own else {})}
        indices = self._indices(child, begun, heart)
        if assignment.spec.script:
            return plan.script_command(assignment, base=base, indices=indices, out=str(written_to(begun)))
        if assignment.spec.train.batch_size == "auto" and not sizes.batch_size:
            sizes = self._probe(begun, child, plan.probe_command(assignment, base=base, indices=indices), heart)
        before = assignment.optimizer_of, assignment.state_shard
        return plan.train_command(
            assignment,
            base=base,
            indices=indices,
            out=str(written_to(begun)),
            checkpoint=str(place.checkpoint),
            checkpoint_every_s=self._options.checkpoint_every_s,
            optimizer=str(place.optimizer),
            optimizer_from=str(self._spool.optimizer(place, *before)),
            personal=str(place.personal),
            personal_from=str(self._spool.personal(place, *before)),
            found=sizes.batch_size,
            fits=sizes.fits,
            noise_seed=noise_seed(self._spool.folder, assignment) if is_private(assignment) else "",
            correction=str(place.correction) if place.correction.exists() else "",
        )

    # ------------------------------------------------------------ what this machine's memory takes

    def _sizes(self, begun: Untrained, child: Child) -> Sizes:
        """What is known of a job's sizes on the device that trains."""
        device = f"{child.hello.device} {child.hello.name}".strip()
        return self._spool.sizes(begun.assignment.job, begun.place.coordinator, device)

    def _probe(self, begun: Untrained, child: Child, command: dict[str, Any], heart: Heart) -> Sizes:
        """Have the child find the batch for its device, and remember it for the job: once, not once a start."""
        heart.progress = Progress(doing="measuring")
        found, job = self._ask(child, command, heart), begun.assignment.job
        rate = found["samples_per_s"]
        speed = "" if rate is None else f" ({rate:,.0f} samples/s)"
        log.info("%s: %d samples a step%s: %s", job, found["batch_size"], speed, found["why"])
        update = {"batch_size": found["batch_size"], "samples_per_s": rate}
        sizes = self._sizes(begun, child).model_copy(update=update)
        self._spool.remember_sizes(job, begun.place.coordinator, sizes)
        return sizes

    def _learn(self, begun: Untrained, child: Child, done: dict[str, Any]) -> None:
        """Note what a training came to know of this machine: what fits, and what it computed in."""
        job, sizes = begun.assignment.job, self._sizes(begun, child)
        fits = done.get("fits") or 0
        if fits != sizes.fits:
            log.warning("%s: memory takes %d samples at once, so a batch is trained in pieces, with the same gradients",
                        job, fits)  # fmt: skip
            self._spool.remember_sizes(job, begun.place.coordinator, sizes.model_copy(update={"fits": fits}))
        computes = (job, done.get("precision", "fp32"), done.get("precision_reason", ""))
        if begun.assignment.spec.train.precision != "fp32" and computes != self._computes:
            log.info("%s is trained in %s: %s", *computes)
            self._computes = computes

    def _init(self, child: Child, begun: Untrained, base: str, heart: Heart) -> Submission:
        assignment, out = begun.assignment, begun.place.update
        command = {"do": "init", "seed": plan.init_seed(assignment.spec), "out": str(out), "labels": None}
        command |= plan.measuring(assignment.spec) | ({"base": base} if base else {})
        done = self._ask(child, command, heart)
        bounds: tuple[int, ...] = ()
        if assignment.spec.data.partition != "local":
            bounds = self._cut(child, assignment, heart).bounds
        facts = ModelFacts(
            parameters=done["parameters"],
            train_samples=done["train_samples"],
            test_samples=done["test_samples"],
            bounds=bounds,
        )
        return Submission(attempt=assignment.attempt, digest=file_digest(out), facts=facts)

    # ------------------------------------------------------------ the shard

    def _indices(self, child: Child, begun: Untrained, heart: Heart) -> str | None:
        """The file with the samples of the shard; None: all of this worker's own data."""
        assignment = begun.assignment
        if assignment.samples is None:
            return None
        cut = self._cut(child, assignment, heart)
        if cut.order.size != assignment.train_samples:
            raise TaskFailure(
                "no_data",
                f"{self._options.name} has {cut.order.size} training samples for {assignment.task.name}, "
                f"{assignment.train_samples} where the model was built: every machine needs the same data set",
                "",
            )
        chosen = cut.order[assignment.samples.start : assignment.samples.stop]
        return str(self._spool.write_indices(begun, chosen))

    def _cut(self, child: Child, assignment: Assignment, heart: Heart) -> Partition:
        """The training set in the job's order: the same on every worker, so that nobody ships lists."""
        known = self._cuts.get(assignment.job)
        if known is not None:
            return known
        data, total = assignment.spec.data, self._described(child, assignment, heart)
        by_column = data.partition in BY_COLUMN
        labels = np.load(self._spool.labels(assignment.job), allow_pickle=False) if by_column else None
        try:
            cut = order_of(
                data.partition,
                total=total,
                shards=plan.shards_to_cut(assignment),
                seed=assignment.spec.seed,
                alpha=data.alpha,
                labels_per_shard=data.labels_per_shard,
                labels=labels,
            )
        except BadJobError as error:
            raise TaskFailure("bad_task", f"{error}. {error.advice}", "") from error
        self._cuts[assignment.job] = cut
        return cut

    def _described(self, child: Child, work: Assignment | Preparation, watch: Watch) -> int:
        """The samples in the training set. Where shards are cut by label or id, those are in the spool after it."""
        if work.job not in self._samples:
            data = work.spec.data
            labels = str(self._spool.labels(work.job)) if data.partition in BY_COLUMN else None
            done = self._ask(child, {"do": "describe", "labels": labels, "by": data.by}, watch)
            self._samples[work.job] = done["train_samples"]
        return self._samples[work.job]

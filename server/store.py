"""The journal: every decision about every job, every token and every worker, in one SQLite file.

The journal is the truth; the coordinator's state is rebuilt from it. What `append` has returned stays, through kill -9
and power cuts: write-ahead log with synchronous=FULL, one transaction a decision. It knows what facts look like and
nothing of what they mean; the one rule it keeps itself is that no shard of a round has two accepted updates.

To be used from one thread, the event loop's. Nothing is held open between calls: an iterator over facts reads page by
page, so that a slow reader neither blocks a writer nor keeps the log from being folded back.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pydantic import ValidationError

from common import __version__
from common.audit import AuditEntry, AuditHead, BrokenRecordError, Checker, FactText
from common.errors import ConflictError, DiskFullError, LydianError, NotFoundError, UnavailableError
from common.facts import FACT, Fact, HandedBack, OpenedAnew
from common.messages import Kind, Order, Registration, TailnetNode
from server import audit
from server.ballast import Ballast

SCHEMA = 6  # of the file, in PRAGMA user_version
BUSY_TIMEOUT_S = 5.0  # for a backup or a person's sqlite3 that holds the file
PAGE = 200  # facts read at a time
MOST_WAITING = 1000  # rows of the audit record that wait for a transaction
UNDONE = ("lost", "norm_outlier")  # codes by which an accepted update counts no more

T = TypeVar("T")

# `written_by` is read from files of newer schemas, to say which version wrote them: it stays as it is in every schema.
_TABLES = """
CREATE TABLE written_by (
    schema INTEGER NOT NULL,
    version TEXT NOT NULL,
    at TEXT NOT NULL
);
CREATE TABLE facts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    at TEXT NOT NULL,
    type TEXT NOT NULL,
    round INTEGER,
    shard INTEGER,
    stands INTEGER NOT NULL DEFAULT 1, -- 0: an accepted update whose bytes were lost, and its shard opened again
    body TEXT NOT NULL
);
CREATE INDEX facts_by_job ON facts (job, id);
CREATE UNIQUE INDEX accepted_once ON facts (job, round, shard) WHERE type = 'accepted' AND stands = 1;
CREATE INDEX evaluations ON facts (job, round) WHERE type = 'evaluation';
CREATE INDEX attempts ON facts (job, round, shard) WHERE type IN ('handed_out', 'handed_back', 'late');
CREATE TABLE workers (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    registration TEXT NOT NULL,
    created_at TEXT NOT NULL,
    set_aside_reason TEXT,
    strikes INTEGER NOT NULL DEFAULT 0,
    node TEXT, -- the machine that the credential is good from: a TailnetNode as JSON
    ordered TEXT NOT NULL DEFAULT 'work' -- an operator's order: messages.Order
);
CREATE TABLE sums (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    round INTEGER NOT NULL,
    seal INTEGER NOT NULL,
    body TEXT NOT NULL -- keys and shares of the open round's secure sum (server.securing), deleted with the sum
);
CREATE INDEX sums_by_job ON sums (job, round, seal);
CREATE TABLE tokens (
    id TEXT PRIMARY KEY,
    scope TEXT NOT NULL,
    secret_hash TEXT NOT NULL,
    worker TEXT REFERENCES workers (id),
    created_at TEXT NOT NULL,
    revoked_at TEXT,
    name TEXT NOT NULL DEFAULT '',
    expires REAL, -- seconds since 1970 by server.calendar, NULL: never
    uses INTEGER, -- join: how many workers it lets in, NULL: any number
    labels TEXT NOT NULL DEFAULT '[]', -- JSON, of the workers that it lets in, or of the one whose it is
    joined_by TEXT, -- work: the join token that let it in
    claim TEXT, -- work: who joined, as that machine says it again
    next_hash TEXT, -- of a second secret, which takes the first one's place when it is used
    overlap_until REAL, -- as expires: until when the first one counts beside it, NULL: until the second is used
    renew INTEGER NOT NULL DEFAULT 0 -- work: its worker is to fetch a second secret
);
CREATE TABLE token_seen (
    id TEXT PRIMARY KEY, -- of a token
    at TEXT NOT NULL,
    address TEXT NOT NULL
);
CREATE TABLE calendar (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    reached REAL NOT NULL -- what server.calendar has reached
);
"""


def _count_strikes(database: sqlite3.Connection) -> None:
    database.execute("ALTER TABLE workers ADD COLUMN strikes INTEGER NOT NULL DEFAULT 0")


def _pin_nodes_and_keep_orders(database: sqlite3.Connection) -> None:
    database.execute("ALTER TABLE workers ADD COLUMN node TEXT")
    database.execute("ALTER TABLE workers ADD COLUMN ordered TEXT NOT NULL DEFAULT 'work'")


def _keep_sums(database: sqlite3.Connection) -> None:
    database.execute(
        "CREATE TABLE IF NOT EXISTS sums (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL,"
        " round INTEGER NOT NULL, seal INTEGER NOT NULL, body TEXT NOT NULL)"
    )
    database.execute("CREATE INDEX IF NOT EXISTS sums_by_job ON sums (job, round, seal)")


def _let_tokens_age(database: sqlite3.Connection) -> None:
    present = {row[1] for row in database.execute("PRAGMA table_info(tokens)")}
    for column in (
        "name TEXT NOT NULL DEFAULT ''", "expires REAL", "uses INTEGER", "labels TEXT NOT NULL DEFAULT '[]'",
        "joined_by TEXT", "claim TEXT", "next_hash TEXT", "overlap_until REAL", "renew INTEGER NOT NULL DEFAULT 0",
    ):  # fmt: skip
        if column.split()[0] not in present:
            database.execute(f"ALTER TABLE tokens ADD COLUMN {column}")
    database.execute(
        "CREATE TABLE IF NOT EXISTS token_seen (id TEXT PRIMARY KEY, at TEXT NOT NULL, address TEXT NOT NULL)"
    )
    database.execute(
        "CREATE TABLE IF NOT EXISTS calendar (id INTEGER PRIMARY KEY CHECK (id = 1), reached REAL NOT NULL)"
    )
    database.execute(
        "CREATE INDEX IF NOT EXISTS attempts ON facts (job, round, shard)"
        " WHERE type IN ('handed_out', 'handed_back', 'late')"
    )


# schema -> the step from it to the next one
MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: _count_strikes,
    2: _pin_nodes_and_keep_orders,
    3: _keep_sums,
    4: lambda database: audit.begin(database, _now()),
    5: _let_tokens_age,
}

# Literal types, so that SQLite can use the partial indexes. Initialised is early among its job's facts: it needs none.
_RESULTS: dict[Kind, str] = {
    "init": "type = 'initialised'",
    "train": "type = 'accepted' AND stands = 1 AND round = :round AND shard = :shard",
    "evaluate": "type = 'evaluation' AND round = :round",
}


class DiskBrokenError(LydianError):
    """The disk did not do what it was told. Whether a commit is on it is not known: only a new start can tell."""

    code = "disk_broken"
    advice = "Look into the system's log for the disk; the coordinator ends, and its next start checks every file."


@dataclass(frozen=True)
class StoredFact:
    """A fact with its place in the journal."""

    id: int
    at: str  # UTC, ISO 8601; for people, decides nothing
    job: str
    fact: Fact

    def json(self) -> str:
        """The fact as one line of JSON with `id`, `at` and `job` in front: what is streamed to those who watch."""
        # Spliced: json.dumps would write NaN, which is not JSON, and FACT.dump_json null, which was not measured.
        head = json.dumps({"id": self.id, "at": self.at, "job": self.job}, separators=(",", ":"))
        return f"{head[:-1]},{self.fact.model_dump_json()[1:]}"


@dataclass(frozen=True)
class StoredToken:
    """A token as it is kept: never the secret, only its hash."""

    id: str
    scope: str
    secret_hash: str  # SHA-256, in hex
    worker: str | None
    created_at: str = ""
    revoked_at: str | None = None
    name: str = ""
    expires: float | None = None  # seconds since 1970 by server.calendar; None: never
    uses: int | None = None  # join: how many workers it lets in; None: any number
    labels: tuple[str, ...] = ()
    joined_by: str | None = None  # work: the join token that let it in
    claim: str | None = None  # work: who joined, as that machine says it again
    next_hash: str | None = None  # of a second secret, which takes the first one's place when it is used
    overlap_until: float | None = None  # until when the first one counts beside it; None: until the second is used
    renew: bool = False  # work: its worker is to fetch a second secret


@dataclass(frozen=True)
class Seen:
    """When a token was used last, and from where."""

    at: str  # UTC, ISO 8601; for people
    address: str


@dataclass(frozen=True)
class StoredWorker:
    """A worker that has joined."""

    id: str
    registration: Registration
    created_at: str
    set_aside_reason: str | None
    strikes: int  # results refused since it was last readmitted
    ordered: Order


class Journal:
    """One journal file, open. Made by `Journal.open`."""

    def __init__(self, path: Path, database: sqlite3.Connection, ballast: Ballast) -> None:
        self.path = path
        self.ballast = ballast
        self._database = database
        self._waiting: list[tuple[str, audit.Event]] = []  # what goes with the next transaction, and when it happened

    @classmethod
    def open(cls, path: Path, ballast_bytes: int = 0) -> Self:
        """Open a journal, make it when there is none, and bring an older one to this version's schema.

        An older file is copied to `NAME.schema-N.backup` beside it first. On a full disk the ballast is given up.

        Args:
            path: the file.
            ballast_bytes: room beside it that is the journal's alone (server.ballast).

        Raises:
            LydianError: a newer version wrote the file (`journal_too_new`, the file is untouched), or it is no journal
                or damaged (`journal_damaged`), or the file system cannot keep it (`journal_unfit_disk`).
            DiskFullError: there is no room for it.
        """
        ballast = Ballast(path.with_name("ballast"), ballast_bytes)
        try:
            database = cls._connect(path)
        except DiskFullError:
            if not ballast.release():
                raise
            database = cls._connect(path)
        return cls(path, database, ballast)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        with _sentences(path):
            found = _check_before_touching(path)
            if found is None:
                path.touch(mode=0o600)  # SQLite gives its -wal and -shm the same
            database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            try:
                _prepare(database, path)
                if found is None:
                    _create(database, path)
                elif found < SCHEMA:
                    _migrate(database, path, found)
            except BaseException:
                database.close()
                raise
        return database

    @classmethod
    @contextmanager
    def reading(cls, path: Path) -> Iterator[Self]:
        """A journal as it is at this moment, read-only, beside a coordinator that runs or without one.

        Raises:
            LydianError: there is none (`no_journal`), another version wrote it, or it is damaged.
        """
        with _sentences(path):
            found = _check_before_touching(path)
            if found is None:
                raise LydianError(
                    f"there is no journal {path}",
                    code="no_journal",
                    advice="Name the coordinator's state folder with --state-dir.",
                )
            if found < SCHEMA:
                raise LydianError(
                    f"{path} has schema {found}, and its record of what happened begins with schema {SCHEMA}",
                    code="journal_too_old",
                    advice="Start this version's coordinator on it once.",
                )
            database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
            with closing(database):
                database.execute("BEGIN")  # one state of it, whatever is written meanwhile
                yield cls(path, database, Ballast(path.with_name("ballast"), 0))

    def close(self) -> None:
        """Close the file. Twice is once."""
        self._database.close()

    def backup(self, target: Path) -> None:
        """Copy the journal as it is now to `target`, whole and consistent."""
        with _sentences(self.path):
            _backup(self._database, target)

    # ------------------------------------------------------------ facts

    def append(self, job: str, facts: Sequence[Fact]) -> list[StoredFact]:
        """Keep facts of one job, all or none. When this returns, they are on the disk.

        Raises:
            ConflictError: the shard has an accepted update already (`accepted_before`); nothing was kept.
            DiskFullError: no room; nothing was kept.
        """
        return self.append_all([(job, fact) for fact in facts])

    def append_all(self, facts: Iterable[tuple[str, Fact]]) -> list[StoredFact]:
        """Keep facts of several jobs, (job, fact) each, all or none; see `append`."""
        at, given, caller = _now(), list(facts), audit.CALLER.get()
        return self._write(
            lambda: [StoredFact(self._insert(job, at, fact, caller), at, job, fact) for job, fact in given]
        )

    def _insert(self, job: str, at: str, fact: Fact, caller: audit.Caller) -> int:
        place: tuple[int | None, int | None] = getattr(fact, "round", None), getattr(fact, "shard", None)
        values = (job, at, fact.type, *place, fact.model_dump_json())
        if isinstance(fact, HandedBack) and fact.code in UNDONE:
            opened = "UPDATE facts SET stands = 0 WHERE type = 'accepted' AND job = ? AND round = ? AND shard = ?"
            self._database.execute(opened, (job, *place))
        if isinstance(fact, OpenedAnew):
            opened = "UPDATE facts SET stands = 0 WHERE type = 'accepted' AND job = ? AND round = ?"
            self._database.execute(opened, (job, fact.round))
        statement = "INSERT INTO facts (job, at, type, round, shard, body) VALUES (?, ?, ?, ?, ?, ?)"
        try:
            row_id = self._database.execute(statement, values).lastrowid
        except sqlite3.IntegrityError as error:
            raise ConflictError(
                f"shard {place[1]} of round {place[0]} of {job} has an accepted update already", code="accepted_before"
            ) from error
        assert row_id is not None  # noqa: S101 - an INSERT has one
        text = FactText.model_construct(
            id=row_id, at=at, job=job, type=fact.type, round=place[0], shard=place[1], body=values[-1]
        )
        audit.add_fact(self._database, audit.actor_of(fact, caller), text)
        return row_id

    def facts(
        self,
        after: int = 0,
        job: str | None = None,
        types: Collection[str] | None = None,
        limit: int | None = None,
    ) -> Iterator[StoredFact]:
        """The facts with an id above `after`, in the order they were kept.

        Reads as it goes: facts that are appended meanwhile are found too.

        Args:
            after: an id; 0 for all.
            job: only of this job.
            types: only of these types (`fact.type`).
            limit: at most so many.

        Raises:
            LydianError: a row cannot be read (`journal_damaged`, with its id).
        """
        conditions, values = ["id > :after"], dict[str, object]()
        if job is not None:
            conditions.append("job = :job")
            values["job"] = job
        if types is not None:
            names = {f"type{number}": name for number, name in enumerate(sorted(set(types)))}
            conditions.append(f"type IN ({', '.join(f':{name}' for name in names)})")
            values |= names
        left = limit
        while left is None or left > 0:
            size = PAGE if left is None else min(left, PAGE)
            values |= {"after": after, "page": size}
            page = self._select(f"{' AND '.join(conditions)} ORDER BY id LIMIT :page", values)
            yield from page
            if len(page) < size:
                return
            after, left = page[-1].id, None if left is None else left - len(page)

    def results(self, job: str, kind: Kind, round_index: int, shard: int) -> list[StoredFact]:
        """The facts by which results of one task were taken: Initialised, Accepted or Evaluated, by its kind."""
        values = {"job": job, "round": round_index, "shard": shard}
        return self._select(f"job = :job AND {_RESULTS[kind]} ORDER BY id", values)

    def attempts(self, job: str, kind: Kind, round_index: int, shard: int) -> list[StoredFact]:
        """What became of the attempts at one task, in order: handed out, handed back, or too late."""
        condition = "job = :job AND round = :round AND shard = :shard AND type IN ('handed_out', 'handed_back', 'late')"
        found = self._select(f"{condition} ORDER BY id", {"job": job, "round": round_index, "shard": shard})
        return [stored for stored in found if getattr(stored.fact, "kind", "train") == kind]

    def _select(self, condition: str, values: dict[str, object]) -> list[StoredFact]:
        statement = f"SELECT id, at, job, body FROM facts WHERE {condition}"  # noqa: S608 - our own words, no values
        with _sentences(self.path):
            rows = self._database.execute(statement, values).fetchall()
        return [self._read(*row) for row in rows]

    def _read(self, row_id: int, at: str, job: str, body: str) -> StoredFact:
        try:
            return StoredFact(row_id, at, job, FACT.validate_json(body))
        except ValidationError as error:
            raise self._damaged(f"row {row_id} of facts", error) from error

    # ------------------------------------------------------------ the audit record

    def record(self, action: str, thing: str, result: str = "ok", detail: str = "") -> None:
        """Write down what is no fact of a job, as done by whoever makes the call that is being answered.

        Inside a change that is being written (`_write`) it is part of that transaction; else it is one of its own.

        Args:
            action: what happened, as `token.issued`.
            thing: the id of what it happened to. Never a secret, and neither is `detail`.
            result: what came of it.
            detail: a sentence, where there is more to say.
        """
        event = audit.Event(audit.CALLER.get(), action, thing, result, detail)
        if self._database.in_transaction:
            audit.add_event(self._database, _now(), event)
        else:
            self._write(lambda: audit.add_event(self._database, _now(), event))

    def record_soon(self, event: audit.Event) -> bool:
        """Write an event down with whatever is written next: it costs no commit, and a power cut may take it.

        Returns whether it is; where nothing could be written for long, no more wait.
        """
        waits = len(self._waiting) < MOST_WAITING
        if waits:
            self._waiting.append((_now(), event))
        return waits

    def record_waiting(self) -> None:
        """Write down what waits for a next transaction."""
        if self._waiting:
            self._write(lambda: None)

    def audit_check(self, checker: Checker) -> AuditHead:
        """Walk the whole record, and what it speaks of; returns its newest row.

        Raises:
            BrokenRecordError: it is not what was written.
        """
        with _sentences(self.path):
            for entry in audit.every(self._database):
                checker.take(entry)
            checker.end()
            beyond = audit.unrecorded(self._database)
        if beyond is not None:
            raise BrokenRecordError(f"fact {beyond} is in the journal, and no row of the audit record speaks of it")
        return AuditHead(seq=checker.seq, hash=checker.hash)

    def audit_page(self, after: int, limit: int) -> tuple[list[AuditEntry], AuditHead]:
        """The rows of the audit record after row `after`, at most so many, and the newest row's place and hash."""
        with _sentences(self.path):
            return audit.page(self._database, after, limit), audit.head(self._database)

    # ------------------------------------------------------------ secure sums

    def sum_append(self, job: str, round_index: int, seal: int, bodies: Sequence[str]) -> None:
        """Keep what came of a secure sum, all or none. When this returns, it is on the disk."""
        rows = [(job, round_index, seal, body) for body in bodies]
        statement = "INSERT INTO sums (job, round, seal, body) VALUES (?, ?, ?, ?)"
        self._write(lambda: self._database.executemany(statement, rows))

    def sum_of(self, job: str, round_index: int, seal: int) -> list[str]:
        """What was kept of a secure sum, in the order in which it came."""
        statement = "SELECT body FROM sums WHERE job = ? AND round = ? AND seal = ? ORDER BY id"
        with _sentences(self.path):
            return [body for (body,) in self._database.execute(statement, (job, round_index, seal)).fetchall()]

    def sum_forget(self, job: str) -> None:
        """Delete all keys and shares of a job's secure sums."""
        self._write(lambda: self._database.execute("DELETE FROM sums WHERE job = ?", (job,)))

    # ------------------------------------------------------------ workers

    def worker_put(self, worker_id: str, registration: Registration, *, told: bool = True) -> None:
        """Keep what a worker says about itself; its first day and whether it is set aside stay as they are.

        Args:
            worker_id: the worker's.
            registration: what it says.
            told: whether it is written down that it returned; that it joined always is.
        """
        values = (worker_id, registration.name, registration.model_dump_json(exclude={"holding"}), _now())
        statement = (
            "INSERT INTO workers (id, name, registration, created_at) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET name = excluded.name, registration = excluded.registration"
        )

        def put() -> None:
            known = self._database.execute("SELECT 1 FROM workers WHERE id = ?", (worker_id,)).fetchone()
            self._database.execute(statement, values)
            about = f"{registration.name} on {registration.hardware.hostname}, version {registration.version}"
            if told or not known:
                self.record("worker.returned" if known else "worker.joined", worker_id, detail=about)

        self._write(put)

    def worker_judged(self, worker_id: str, strikes: int, set_aside_reason: str | None) -> None:
        """Keep how often a worker's results were refused, and why it is given no more work; None: it is given some.

        Raises:
            NotFoundError: there is no such worker.
        """
        action = "worker.set_aside" if set_aside_reason else "worker.struck" if strikes else "worker.readmitted"
        detail = set_aside_reason or (f"{strikes} results were refused" if strikes else "")
        statement = "UPDATE workers SET strikes = ?, set_aside_reason = ? WHERE id = ?"
        self._set_of_worker(worker_id, statement, (strikes, set_aside_reason), action, detail)

    def worker_pinned(self, worker_id: str, node: TailnetNode | None) -> None:
        """Keep the machine that a worker's credential is good from; None: any.

        Raises:
            NotFoundError: there is no such worker.
        """
        statement, action = "UPDATE workers SET node = ? WHERE id = ?", "worker.pinned" if node else "worker.unpinned"
        detail = f"to {node.name}, {node.stable_id}" if node else ""
        self._set_of_worker(worker_id, statement, (node.model_dump_json() if node else None,), action, detail)

    def pins(self) -> dict[str, TailnetNode]:
        """Worker id -> the machine that its credential is good from, for those that have one."""
        with _sentences(self.path):
            rows = self._database.execute("SELECT id, node FROM workers WHERE node IS NOT NULL").fetchall()
        try:
            return {worker_id: TailnetNode.model_validate_json(text) for worker_id, text in rows}
        except ValidationError as error:
            raise self._damaged("a node of workers", error) from error

    def worker_ordered(self, worker_id: str, order: Order) -> None:
        """Keep what an operator ordered a worker to do.

        Raises:
            NotFoundError: there is no such worker.
        """
        action = {"work": "worker.resumed", "drain": "worker.drained", "pause": "worker.paused"}[order]
        self._set_of_worker(worker_id, "UPDATE workers SET ordered = ? WHERE id = ?", (order,), action)

    def _set_of_worker(
        self, worker_id: str, statement: str, values: tuple[int | str | None, ...], action: str, detail: str = ""
    ) -> None:
        def change() -> None:
            if self._database.execute(statement, (*values, worker_id)).rowcount == 0:
                raise NotFoundError(f"there is no worker {worker_id!r}", code="unknown_worker")
            self.record(action, worker_id, detail=detail)

        self._write(change)

    def workers(self) -> list[StoredWorker]:
        """All workers that ever joined, in that order."""
        with _sentences(self.path):
            columns = "id, registration, created_at, set_aside_reason, strikes, ordered"
            statement = f"SELECT {columns} FROM workers ORDER BY rowid"  # noqa: S608 - our own words, no values
            rows = self._database.execute(statement).fetchall()
        return [StoredWorker(row[0], self._registration(row[0], row[1]), *row[2:]) for row in rows]

    def _registration(self, worker_id: str, text: str) -> Registration:
        try:
            return Registration.model_validate_json(text)
        except ValidationError as error:
            raise self._damaged(f"the row {worker_id!r} of workers", error) from error

    # ------------------------------------------------------------ tokens

    def token_add(self, token: StoredToken) -> StoredToken:
        """Keep a token by the hash of its secret, and return it as it is kept; its first day is now.

        Raises:
            ConflictError: the id is taken (`token_id_taken`).
            NotFoundError: there is no such worker.
        """
        kept = replace(token, created_at=_now())
        row = _row(kept)
        columns, values = ", ".join(row), ", ".join(f":{name}" for name in row)
        statement = f"INSERT INTO tokens ({columns}) VALUES ({values})"  # noqa: S608 - names of StoredToken's fields

        def add() -> None:
            try:
                self._database.execute(statement, row)
            except sqlite3.IntegrityError as error:
                if error.sqlite_errorname == "SQLITE_CONSTRAINT_FOREIGNKEY":
                    raise NotFoundError(f"there is no worker {token.worker!r}", code="unknown_worker") from error
                raise ConflictError(f"there is a token {token.id!r} already", code="token_id_taken") from error
            about = f"scope {token.scope}" + (f", for worker {token.worker}" if token.worker else "")
            self.record("token.issued", token.id, detail=about)

        self._write(add)
        return kept

    def token_put(self, token: StoredToken) -> None:
        """Keep what has become of a token: its secrets, and until when they count. A revoked one stays revoked.

        Raises:
            NotFoundError: there is no such token.
        """
        row = _row(token)
        changed = ", ".join(f"{name} = :{name}" for name in row if name not in ("id", "created_at", "revoked_at"))
        statement = f"UPDATE tokens SET {changed} WHERE id = :id"  # noqa: S608 - names of StoredToken's fields
        first = "its first secret counts no more" if token.next_hash is None else "it has a second secret"

        def put() -> None:
            if self._database.execute(statement, row).rowcount == 0:
                raise NotFoundError(f"there is no token {token.id!r}", code="unknown_token")
            self.record("token.rotated", token.id, detail="its worker is to fetch one" if token.renew else first)

        self._write(put)

    def token_revoke(self, token_id: str) -> None:
        """Let a token count no more. Revoking it again changes nothing.

        Raises:
            NotFoundError: there is no such token.
        """
        statement = "UPDATE tokens SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?"

        def revoke() -> None:
            if self._database.execute(statement, (_now(), token_id)).rowcount == 0:
                raise NotFoundError(f"there is no token {token_id!r}", code="unknown_token")
            self.record("token.revoked", token_id)

        self._write(revoke)

    def tokens(self) -> list[StoredToken]:
        """All tokens that were ever issued, revoked ones too."""
        names = [field.name for field in fields(StoredToken)]
        with _sentences(self.path):
            columns = ", ".join(names)
            statement = f"SELECT {columns} FROM tokens ORDER BY rowid"  # noqa: S608 - names of StoredToken's fields
            rows = [dict(zip(names, row, strict=True)) for row in self._database.execute(statement).fetchall()]
        return [StoredToken(**row | {"labels": tuple(json.loads(row["labels"])), "renew": bool(row["renew"])})
                for row in rows]  # fmt: skip

    def tokens_seen(self) -> dict[str, Seen]:
        """Token id -> its last use, as far as it was kept."""
        with _sentences(self.path):
            return {row[0]: Seen(*row[1:]) for row in self._database.execute("SELECT id, at, address FROM token_seen")}

    def calendar_reached(self) -> float | None:
        """What the calendar had reached when it was kept last, in seconds since 1970; None: never."""
        with _sentences(self.path):
            row = self._database.execute("SELECT reached FROM calendar").fetchone()
        return float(row[0]) if row else None

    def keep_seen(self, seen: Mapping[str, Seen], reached: float) -> None:
        """Keep last uses, and what the calendar has reached: one commit for all of them."""

        def keep() -> None:
            rows = [(token_id, last.at, last.address) for token_id, last in seen.items()]
            self._database.executemany("INSERT OR REPLACE INTO token_seen (id, at, address) VALUES (?, ?, ?)", rows)
            self._database.execute("INSERT OR REPLACE INTO calendar (id, reached) VALUES (1, ?)", (reached,))

        self._write(keep)

    # ------------------------------------------------------------ the file

    def _write(self, change: Callable[[], T]) -> T:
        """Make a change in one transaction; on a full disk with the ballast's room."""
        try:
            return self._write_once(change)
        except DiskFullError:
            if not self.ballast.release():
                raise
            return self._write_once(change)

    def _write_once(self, change: Callable[[], T]) -> T:
        waiting = self._waiting[:]
        with _sentences(self.path), _transaction(self._database):
            for at, event in waiting:
                audit.add_event(self._database, at, event)
            made = change()
        del self._waiting[: len(waiting)]
        return made

    def _damaged(self, what: str, error: ValidationError) -> LydianError:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        return LydianError(
            f"{what} in {self.path} cannot be read: {where}: {first['msg']}",
            code="journal_damaged",
            advice="Start from a backup of the journal, or with another --state-dir.",
        )


def _row(token: StoredToken) -> dict[str, object]:
    """The columns of a token."""
    return asdict(token) | {"labels": json.dumps(token.labels), "renew": int(token.renew)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing. IMMEDIATE: whoever else has the file is waited for here, not at the first write."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk makes SQLite roll back by itself
            database.execute("ROLLBACK")
        raise


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turn what SQLite says into errors that a person can act on."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # ours: a closed journal, another thread
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or type(error).__name__
        said = f"{error} ({name})"
        if name in ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"):  # the second: no room for the file beside the -wal
            raise DiskFullError(f"there is no room left for the journal {path}: {said}") from error
        if name.startswith("SQLITE_IOERR"):
            raise DiskBrokenError(f"the disk failed under the journal {path}: {said}") from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise UnavailableError(
                f"another program held the journal {path} for {BUSY_TIMEOUT_S:g} s: {said}", code="journal_busy"
            ) from error
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise LydianError(
                f"the journal {path} is damaged, or is none: {said}",
                code="journal_damaged",
                advice="Start from a backup of the journal, or with another --state-dir.",
            ) from error
        raise LydianError(
            f"the journal {path} cannot be read or written: {said}",
            code="journal_unusable",
            advice="Check the disk, and who may read and write the state folder.",
        ) from error


def _check_before_touching(path: Path) -> int | None:
    """The schema of the file; None: there is none yet. Read-only, so that a file we must not touch stays as it is."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)) as database:
        found = int(database.execute("PRAGMA user_version").fetchone()[0])
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if found == 0 and not tables:
            return None  # the process died between making the file and its tables
        if "written_by" not in tables or found == 0:
            raise LydianError(
                f"{path} is an SQLite file of something else: its tables are {', '.join(sorted(tables)) or 'none'}",
                code="journal_damaged",
                advice="Start with another --state-dir.",
            )
        if found > SCHEMA:
            (version,) = database.execute("SELECT version FROM written_by ORDER BY rowid DESC LIMIT 1").fetchone()
            raise LydianError(
                f"{path} was written by version {version}, with schema {found}; "
                f"this is version {__version__}, which knows schema {SCHEMA}",
                code="journal_too_new",
                advice=f"Start version {version} or newer, or this one with another --state-dir.",
            )
    return found


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise LydianError(
            f"{path} cannot have a write-ahead log (journal mode {mode}): is it on a network file system?",
            code="journal_unfit_disk",
            advice="Start with a --state-dir on a local disk.",
        )
    database.execute("PRAGMA synchronous = FULL")  # NORMAL loses every commit since the last checkpoint in a power cut
    database.execute("PRAGMA foreign_keys = ON")


def _create(database: sqlite3.Connection, path: Path) -> None:
    with _transaction(database):
        for statement in _TABLES.split(";"):  # executescript would commit by itself
            database.execute(statement)
        audit.begin(database, _now())
        _sign(database)
    sync(path.parent)


def _migrate(database: sqlite3.Connection, path: Path, found: int) -> None:
    """Bring an older file to SCHEMA, in one transaction, after a copy of it is safe."""
    _backup(database, path.with_name(f"{path.name}.schema-{found}.backup"))
    with _transaction(database):
        for schema in range(found, SCHEMA):
            MIGRATIONS[schema](database)
        _sign(database)


def _sign(database: sqlite3.Connection) -> None:
    database.execute("INSERT INTO written_by VALUES (?, ?, ?)", (SCHEMA, __version__, _now()))
    database.execute(f"PRAGMA user_version = {SCHEMA}")


def _backup(database: sqlite3.Connection, target: Path) -> None:
    with closing(sqlite3.connect(target)) as copy:
        database.backup(copy)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FolderLock:
    """A state folder that is this process's own until `close`, or until the process ends in whatever way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Give the folder back. Twice is once. The file stays: removing it would let two processes lock two files."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lock_folder(folder: Path) -> FolderLock:
    """Make a state folder this process's own. Two coordinators on one journal would each hand out the same work.

    Raises:
        LydianError: another process has it (`folder_locked`), or it cannot be written (`folder_unusable`).
    """
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LydianError(
            f"the state folder {folder} cannot be used: {error}",
            code="folder_unusable",
            advice="Give this user the right to write there, or start with another --state-dir.",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise LydianError(
            f"{folder} is in use by process {holder}",
            code="folder_locked",
            advice="Stop that coordinator first, or start this one with another --state-dir.",
        ) from error
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return FolderLock(descriptor)

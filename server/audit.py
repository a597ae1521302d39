"""The audit record in the journal: the table, who is written down as the one that acted, and how it is read.

Facts of jobs are in the table of facts already: their rows here hold who called and the hash, and point at the fact.
Everything else (workers, tokens, refused calls, pulled models) is a row with words of its own. Rows are written in the
transaction of what they speak of, so they cost no commit, and neither is there without the other. common.audit says
what the hashes cover.
"""

import secrets
import sqlite3
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from common.audit import COORDINATOR, FIRST, GENESIS, AuditEntry, AuditHead, FactText, row_hash
from common.facts import Fact, StateChanged, Submitted

TABLE = """
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY,
    fact INTEGER, -- the fact that it speaks of; else it is an event, and the columns from at to detail are its own
    actor TEXT NOT NULL,
    worker TEXT NOT NULL,
    peer TEXT NOT NULL,
    node TEXT NOT NULL,
    at TEXT,
    action TEXT,
    object TEXT,
    result TEXT,
    detail TEXT,
    hash BLOB NOT NULL
)
"""
LONGEST = 2000  # characters of a detail


@dataclass(frozen=True)
class Caller:
    """Who makes the call that is being answered."""

    actor: str  # scope:token id
    worker: str = ""
    peer: str = ""  # address
    node: str = ""  # of the tailnet

    @property
    def is_worker(self) -> bool:
        """Whether no person calls."""
        return self.actor.startswith(("work:", "join:"))


NOBODY = Caller(COORDINATOR)
UNKNOWN = Caller("")  # of facts from before there was a record
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
"""Set where a call's token is checked. What the coordinator decides by itself runs in a context without it."""


@dataclass(frozen=True)
class Event:
    """Something that is no fact of a job."""

    caller: Caller
    action: str  # what.happened
    object: str  # to what: an id
    result: str = "ok"
    detail: str = ""


def actor_of(fact: Fact, caller: Caller) -> Caller:
    """Who is written down for a fact that came about during a call: the caller, if it was theirs to decide.

    A worker's call may close a round, or take another worker's lease: that is the coordinator's doing.
    """
    worker = getattr(fact, "worker", None)
    if worker is not None:
        return caller if caller.worker == worker else NOBODY
    if isinstance(fact, Submitted | StateChanged):
        return NOBODY if caller.is_worker else caller
    return NOBODY


# ---------------------------------------------------------------- writing, inside a transaction


def begin(database: sqlite3.Connection, at: str) -> None:
    """Make the table, and the first row, which says whose record it is. Facts that are there already are chained."""
    database.execute(TABLE)
    if head(database).seq:
        return
    add_event(database, at, Event(NOBODY, FIRST, secrets.token_hex(16), "ok", "format 1"))
    after = 0
    statement = f"SELECT {_FACT} FROM facts WHERE id > ? ORDER BY id LIMIT 500"  # noqa: S608 - our own words, no values
    while page := database.execute(statement, (after,)).fetchall():
        for row in page:
            _add(database, UNKNOWN, fact=_fact_text(row))
        after = page[-1][0]


def add_event(database: sqlite3.Connection, at: str, event: Event) -> None:
    """One more row, of an event."""
    _add(database, event.caller, event=event, at=at)


def add_fact(database: sqlite3.Connection, caller: Caller, fact: FactText) -> None:
    """One more row, of a fact that was just kept."""
    _add(database, caller, fact=fact)


def _add(
    database: sqlite3.Connection,
    caller: Caller,
    *,
    fact: FactText | None = None,
    event: Event | None = None,
    at: str = "",
) -> None:
    last = head(database)
    entry = AuditEntry.model_construct(
        seq=last.seq + 1, actor=caller.actor, worker=caller.worker, peer=caller.peer, node=caller.node, fact=fact,
        hash="", at=at, action=event.action if event else "", object=event.object if event else "",
        result=event.result if event else "", detail=event.detail[:LONGEST] if event else "",
    )  # fmt: skip
    words = (at, entry.action, entry.object, entry.result, entry.detail) if event else (None,) * 5
    values = (
        entry.seq, fact.id if fact else None, entry.actor, entry.worker, entry.peer, entry.node, *words,
        bytes.fromhex(row_hash(last.hash, entry)),
    )  # fmt: skip
    database.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)


# ---------------------------------------------------------------- reading

_FACT = "id, at, job, type, round, shard, body"
_ROWS = (
    "SELECT audit.seq, audit.fact, audit.actor, audit.worker, audit.peer, audit.node, audit.at, audit.action,"
    " audit.object, audit.result, audit.detail, audit.hash, facts.id, facts.at, facts.job, facts.type, facts.round,"
    " facts.shard, facts.body FROM audit LEFT JOIN facts ON facts.id = audit.fact"
    " WHERE audit.seq > ? ORDER BY audit.seq LIMIT ?"
)


def head(database: sqlite3.Connection) -> AuditHead:
    """The newest row; (0, GENESIS) before the first."""
    row = database.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone()
    return AuditHead(seq=0, hash=GENESIS) if row is None else AuditHead(seq=row[0], hash=_hex(row[1]))


def page(database: sqlite3.Connection, after: int, limit: int) -> list[AuditEntry]:
    """The rows after row `after`, at most so many. Whatever stands there is shown: common.audit judges it."""
    return [_entry(row) for row in database.execute(_ROWS, (after, limit)).fetchall()]


def every(database: sqlite3.Connection, size: int = 500) -> Iterator[AuditEntry]:
    """All rows, read by pages."""
    after = -1
    while rows := page(database, after, size):
        yield from rows
        after = rows[-1].seq


def unrecorded(database: sqlite3.Connection) -> int | None:
    """Id of the first fact after the last that a row speaks of; None: there is none. Checking finds gaps before it."""
    row = database.execute("SELECT min(id) FROM facts WHERE id > (SELECT coalesce(max(fact), 0) FROM audit)").fetchone()
    return None if row[0] is None else int(row[0])


def _entry(row: tuple[object, ...]) -> AuditEntry:
    seq, fact_id, actor, worker, peer, node, at, action, thing, result, detail, found_hash, *fact = row
    text = None
    if fact_id is not None:
        gone = (fact_id, "", "", "", None, None, "")
        text = _fact_text(tuple(fact) if fact[0] is not None else gone)
    return AuditEntry(
        seq=_number(seq) or 0, actor=_text(actor), worker=_text(worker), peer=_text(peer), node=_text(node),
        at=_text(at), action=_text(action), object=_text(thing), result=_text(result), detail=_text(detail),
        fact=text, hash=_hex(found_hash),
    )  # fmt: skip


def _fact_text(row: tuple[object, ...]) -> FactText:
    fact_id, at, job, kind, round_index, shard, body = row
    return FactText(
        id=_number(fact_id) or 0, at=_text(at), job=_text(job), type=_text(kind), round=_number(round_index),
        shard=_number(shard), body=_text(body),
    )  # fmt: skip


def _text(value: object) -> str:
    """A text as it stands; anything else that somebody put there is shown, and is no text that was written."""
    return value if isinstance(value, str) else "" if value is None else f"<{type(value).__name__}> {value!r}"


def _number(value: object) -> int | None:
    return value if isinstance(value, int) or value is None else -1


def _hex(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else _text(value)

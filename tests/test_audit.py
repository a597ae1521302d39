"""The audit record: what goes into it and by whom, what a changed row comes to, and what it costs."""

import hashlib
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.auditing import Reading
from common.audit import (
    FIRST,
    GENESIS,
    Anchor,
    AuditEntry,
    AuditHead,
    AuditPage,
    BrokenRecordError,
    Checker,
    FactText,
    digest_of,
    parse_anchor,
    row_hash,
    shown,
)
from common.errors import UnavailableError
from common.facts import Fact, Late, StateChanged
from server import recorder
from server.audit import NOBODY, Caller, actor_of
from server.proof.__main__ import app
from server.store import Journal, StoredToken
from server.tally import Tally
from tests.rounds_kit import registration
from tests.trust_kit import JSON, Fleet, Served

if TYPE_CHECKING:
    from common.api import CoordinatorApi

REST = "fact, actor, worker, peer, node, at, action, object, result, detail, hash"
TASK = {"round": 1, "shard": 0, "attempt": 1, "worker": "w"}
NAMED = {"worker_name": "w"}
SAID = {**TASK, **NAMED, "sentence": "s"}
MODEL_FACTS = {"parameters": 1, "train_samples": 1, "test_samples": 0}
ROWS = 12  # of the record that is tampered with


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    running = Fleet(tmp_path / "state")
    yield running
    running.close()


def record(served: Served) -> list[AuditEntry]:
    """Every row, as the API gives them; what waits is written first."""
    served.coordinator.journal.record_waiting()
    entries, after = list[AuditEntry](), 0
    while True:
        page = served.call("GET", f"/v1/audit?after={after}&limit=7", served.admin).json()
        entries += [AuditEntry.model_validate(entry) for entry in page["entries"]]
        if page["next"] is None:
            return entries
        after = page["next"]


def check(entries: list[AuditEntry], *anchors: Anchor) -> Checker:
    checker = Checker(anchors)
    for entry in entries:
        checker.take(entry)
    checker.end()
    return checker


def said(entries: list[AuditEntry], action: str) -> list[AuditEntry]:
    return [entry for entry in entries if shown(entry).action == action]


# ---------------------------------------------------------------- the hash


def test_the_hash_is_the_one_computed_by_hand() -> None:
    entry = AuditEntry(seq=1, actor="admin:ab", action="token.issued", object="cd", result="ok", hash="")
    parts = ["0" * 64, "1", "admin:ab", "", "", "", "", "token.issued", "cd", "ok", "", "event"]
    text = b"".join(len(part).to_bytes(8, "big") + part.encode() for part in parts)
    assert row_hash("0" * 64, entry) == hashlib.sha256(text).hexdigest()


FIELDS = st.lists(st.one_of(st.none(), st.text(), st.integers(0, 99)), max_size=4)


@settings(max_examples=30, deadline=None)
@given(FIELDS, FIELDS)
def test_no_two_lists_of_fields_have_one_digest(one: list[Any], other: list[Any]) -> None:
    alike = [None if field is None else str(field) for field in one] == [
        None if field is None else str(field) for field in other
    ]
    assert (digest_of(*one) == digest_of(*other)) == alike


@pytest.mark.parametrize("text", ["", "7", "7:ab", f"0:{'a' * 64}", f"x:{'a' * 64}", f"7:{'A' * 64}"])
def test_what_is_no_anchor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="SEQ:HASH"):
        parse_anchor(text)
    assert parse_anchor(f" 7:{'a' * 64}\n") == (7, "a" * 64)


# ---------------------------------------------------------------- tampering


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A journal file with a record of ROWS rows: facts and events in turn."""
    path = tmp_path_factory.mktemp("written") / "journal.sqlite"
    with closing(Journal.open(path)) as journal:
        for number in range(1, 6):
            journal.append("j", [Late(round=number, shard=0, attempt=1, worker="w")])
            journal.record("token.issued", f"token{number}", detail="scope join")
        journal.append("j", [StateChanged(state="cancelled", reason="cancelled by a user")])
    return path.read_bytes()


def tampered(written: bytes, folder: Path, *statements: str) -> Path:
    path = folder / "journal.sqlite"
    for old in folder.glob("journal.sqlite*"):
        old.unlink()
    path.write_bytes(written)
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
    return path


def why_broken(path: Path, *anchors: Anchor) -> str:
    with Journal.reading(path) as journal:
        try:
            journal.audit_check(Checker(anchors))
        except BrokenRecordError as error:
            return str(error)
    return ""


ROW = st.integers(1, ROWS)
LETTERS = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1)
COLUMNS = ("actor", "worker", "peer", "node", "at", "action", "object", "result", "detail")


@settings(max_examples=15, deadline=None)
@given(row=ROW, column=st.sampled_from(COLUMNS), value=LETTERS)
def test_a_changed_field_of_any_row_is_found_and_the_row_named(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, row: int, column: str, value: str
) -> None:
    folder = tmp_path_factory.mktemp("changed")
    path = tampered(written, folder, f"UPDATE audit SET {column} = '{value}!' WHERE seq = {row}")
    assert f"row {row} of the audit record" in why_broken(path)


@settings(max_examples=12, deadline=None)
@given(row=ROW, how=st.sampled_from(["delete", "hash", "insert", "swap"]))
def test_a_removed_an_added_or_an_exchanged_row_is_found_and_the_first_wrong_row_named(
    written: bytes, tmp_path_factory: pytest.TempPathFactory, row: int, how: str
) -> None:
    if row == ROWS and how != "hash":
        row -= 1  # the last one: see the anchors
    statements = {
        "delete": [f"DELETE FROM audit WHERE seq = {row}"],
        "hash": [f"UPDATE audit SET hash = zeroblob(32) WHERE seq = {row}"],
        "insert": [
            f"UPDATE audit SET seq = -seq - 1 WHERE seq > {row}",
            "UPDATE audit SET seq = -seq WHERE seq < 0",
            f"INSERT INTO audit SELECT {row + 1}, {REST} FROM audit WHERE seq = {row}",
        ],
        "swap": [
            f"UPDATE audit SET seq = -1 WHERE seq = {row}",
            f"UPDATE audit SET seq = {row} WHERE seq = {row + 1}",
            f"UPDATE audit SET seq = {row + 1} WHERE seq = -1",
        ],
    }[how]
    sentence = why_broken(tampered(written, tmp_path_factory.mktemp("moved"), *statements))
    first = row + 1 if how in ("delete", "insert") else row
    assert f"row {first} " in sentence, sentence


@pytest.mark.parametrize(
    ("statement", "wanted"),
    [
        ("UPDATE facts SET body = replace(body, '\"w\"', '\"v\"') WHERE id = 2", "fact 2 of j"),
        ("UPDATE facts SET round = 9 WHERE id = 3", "fact 3 of j"),
        ("UPDATE facts SET job = 'k' WHERE id = 1", "fact 1 of k"),
        ("UPDATE facts SET body = x'00' WHERE id = 1", "fact 1 of j"),
        ("DELETE FROM facts WHERE id = 4", "fact 4 of "),
        ("INSERT INTO facts (job, at, type, body) SELECT job, at, type, body FROM facts", "fact 7 is in the"),
        ("DELETE FROM audit", "has no rows"),
    ],
)
def test_a_changed_fact_is_found_through_the_row_that_speaks_of_it(
    written: bytes, tmp_path: Path, statement: str, wanted: str
) -> None:
    assert wanted in why_broken(tampered(written, tmp_path, statement))


def test_a_tail_that_was_cut_off_or_written_anew_is_found_by_an_anchor_alone(written: bytes, tmp_path: Path) -> None:
    with Journal.reading(tampered(written, tmp_path)) as journal:
        entries, head = journal.audit_page(0, 100)
    assert (len(entries), head.seq) == (ROWS, ROWS)
    anchor = Anchor(ROWS, head.hash)
    traces = ("DELETE FROM facts WHERE id = 6", "UPDATE sqlite_sequence SET seq = 5")
    cut = tampered(written, tmp_path, f"DELETE FROM audit WHERE seq = {ROWS}", *traces)
    assert why_broken(cut) == ""
    assert f"row {ROWS} was noted: its end was cut off" in why_broken(cut, anchor)
    with closing(Journal.open(cut)) as journal:  # and another row in its place
        journal.append("j", [StateChanged(state="finished", reason="all is well")])
    assert why_broken(cut) == ""
    assert "was noted: it, or a row before it, was written anew" in why_broken(cut, anchor)
    assert why_broken(tampered(written, tmp_path), anchor, Anchor(3, entries[2].hash)) == ""


def test_the_whole_chain_is_written_anew_with_nobody_seeing_it_but_an_anchor(written: bytes, tmp_path: Path) -> None:
    with Journal.reading(tampered(written, tmp_path)) as journal:
        entries, _ = journal.audit_page(0, 100)
    forged, previous = list[AuditEntry](), Checker().hash
    for entry in entries:
        other = entry.model_copy(update={"detail": "scope admin"} if entry.seq == 3 else {})
        previous = row_hash(previous, other)
        forged.append(other.model_copy(update={"hash": previous}))
    assert check(forged).seq == ROWS
    with pytest.raises(BrokenRecordError, match="row 5 of the audit record has the hash"):
        check(forged, Anchor(5, entries[4].hash))


def test_a_record_that_begins_with_something_else_is_none() -> None:
    entry = AuditEntry(seq=1, actor="x", action="token.issued", hash="")
    with pytest.raises(BrokenRecordError, match=r"no beginning of a record: it says token\.issued"):
        Checker().take(entry.model_copy(update={"hash": row_hash(Checker().hash, entry)}))


def test_facts_of_an_older_journal_are_chained_when_it_is_moved_on(written: bytes, tmp_path: Path) -> None:
    older = ("DROP TABLE audit", "PRAGMA user_version = 4", "UPDATE written_by SET schema = 4")
    path = tampered(written, tmp_path, *older)
    with closing(Journal.open(path)) as journal:
        entries, _ = journal.audit_page(0, 100)
        assert [entry.fact.id if entry.fact else 0 for entry in entries] == [0, 1, 2, 3, 4, 5, 6]
        assert (entries[0].action, {entry.actor for entry in entries[1:]}) == (FIRST, {""})
        assert len(entries[0].object) == 32
    assert why_broken(path) == ""


# ---------------------------------------------------------------- who, and what


FACTS: dict[str, dict[str, Any]] = {
    "job.submitted": {"type": "submitted", "spec": {"task": "mine"}, "task_digest": "a" * 64, "key": "k"},
    "job.paused": {"type": "job", "state": "paused", "reason": "paused by a user"},
    "job.resumed": {"type": "job", "state": "training", "reason": "resumed by a user"},
    "task.handed_out": {"type": "handed_out", "kind": "init", **TASK},
    "task.handed_back": {"type": "handed_back", "kind": "evaluate", "code": "released", **SAID},
    "update.refused": {"type": "handed_back", "kind": "train", "code": "not_finite", **SAID},
    "model.built": {
        "type": "initialised", "attempt": 1, "worker": "w", "digest": "a" * 64, "size": 1, "facts": MODEL_FACTS,
    },
    "round.opened": {"type": "opened", "round": 1, "base": "a" * 64, "shards": [], "reason": "r"},
    "round.opened_anew": {"type": "opened_anew", "round": 1, "seal": 1, "shards": [], "reason": "r"},
    "update.accepted": {
        "type": "accepted", "digest": "a" * 64, "samples": 3, "steps": 1, "seconds": 1, "metrics": {}, "bytes_down": 1,
        "bytes_up": 1, **TASK, **NAMED,
    },
    "update.lost": {"type": "lost", "digest": "a" * 64, "reason": "r", **TASK, **NAMED},
    "update.restored": {"type": "restored", "digest": "a" * 64, **TASK, **NAMED},
    "update.late": {"type": "late", **TASK},
    "round.extended": {"type": "extended", "round": 1, "reason": "r"},
    "round.frozen": {"type": "frozen", "round": 1, "shards": [0], "reason": "r"},
    "round.closed": {
        "type": "round", "round": 1, "seconds": 1, "workers": 1, "shards": 1, "samples": 1, "bytes_down": 1,
        "bytes_up": 1, "digest": "a" * 64, "size": 1,
    },
    "model.measured": {"type": "measured", **TASK, **NAMED},
    "model.evaluated": {
        "type": "evaluation", "round": 1, "attempt": 1, "worker": "w", "metrics": {}, "samples": 1, "seconds": 1,
        "best": True,
    },
    "model.not_evaluated": {"type": "evaluation_given_up", "round": 1, "reason": "r"},
    "fact.unheard_of": {"type": "unheard_of"},
}  # fmt: skip


@pytest.mark.parametrize("action", FACTS)
def test_every_fact_has_words_in_the_record(action: str) -> None:
    body = FACTS[action]
    text = FactText(id=1, at="now", job="j", type=str(body["type"]), round=1, shard=0, body=json.dumps(body))
    words = shown(AuditEntry(seq=1, actor="a", worker="v", fact=text, hash=""))
    assert (words.action, words.job, words.at, words.object.split(" ")[0]) == (action, "j", "now", "j")
    assert words.worker == body.get("worker", "v")


def test_there_is_no_kind_of_fact_without_words() -> None:
    kinds = {str(body["type"]) for body in FACTS.values()} - {"unheard_of"}
    assert kinds == {str(kind.model_fields["type"].default) for kind in get_args(get_args(Fact)[0])}


def test_the_record_of_a_fleet_says_who_did_what_and_holds(fleet: Fleet) -> None:
    fleet.must("POST", f"/v1/workers/{fleet.two.id}/pause", fleet.admin, None)
    fleet.must("POST", f"/v1/workers/{fleet.two.id}/readmit", fleet.admin, None)
    fleet.must("POST", "/v1/tokens", fleet.admin, {"scope": "join"})
    fleet.must("POST", f"/v1/tokens/{fleet.submitter.split('_')[2]}/rotate", fleet.admin, {"overlap_s": 60})
    fleet.call("GET", f"/v1/jobs/{fleet.job}/model", fleet.admin)
    fleet.must("POST", f"/v1/jobs/{fleet.job}/cancel", fleet.admin, None)
    entries = record(fleet)
    checker = check(entries)
    assert checker.facts == sum(1 for _ in fleet.coordinator.journal.facts())
    admin = f"admin:{fleet.admin.split('_')[2]}"
    by = {shown(entry).action: (entry.actor, entry.worker, entry.peer) for entry in entries}
    for action in ("worker.paused", "worker.readmitted", "token.rotated", "job.cancelled", "model.pulled"):
        assert by[action] == (admin, "", "127.0.0.1"), action
    assert by["job.submitted"] == (f"submit:{fleet.submitter.split('_')[2]}", "", "127.0.0.1")
    join = f"join:{fleet.join.split('_')[2]}"
    assert by["worker.joined"] == (join, "", "127.0.0.1")
    one = f"work:{fleet.one.token.split('_')[2]}"
    assert by["model.built"] == (one, fleet.one.id, "127.0.0.1")
    assert by["round.opened"] == ("coordinator", "", "")  # though a worker's call brought it about
    assert len(said(entries, "token.issued")) == 8  # admin, join, two submitters', a reader's, two workers', a new one
    assert shown(said(entries, "model.built")[0]).detail == fleet.model


def test_rows_are_filtered_by_job_worker_and_action(fleet: Fleet) -> None:
    def asked(query: str) -> set[str]:
        page = fleet.call("GET", f"/v1/audit?{query}", fleet.admin).json()
        return {shown(AuditEntry.model_validate(entry)).action for entry in page["entries"]}

    assert asked("action=worker") == {"worker.joined"}
    assert asked("action=worker.joined") == {"worker.joined"}
    assert asked("action=work") == set()
    assert "token.issued" not in asked(f"job={fleet.job}")
    assert asked(f"worker={fleet.two.id}&action=task") == {"task.handed_out"}
    assert fleet.call("GET", "/v1/audit?limit=501", fleet.admin).status == 400


def test_the_first_refusal_is_told_and_a_flood_is_counted(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(30):
        fleet.call("GET", "/v1/jobs", None)
    for _ in range(3):
        fleet.call("GET", f"/v1/jobs/{fleet.job}", fleet.one.token)
    refused = said(record(fleet), "call.refused")
    assert [(entry.actor, entry.result, entry.object) for entry in refused] == [
        ("nobody", "401 no_token", "GET /v1/jobs"),
        (f"work:{fleet.one.token.split('_')[2]}", "403 forbidden", f"GET /v1/jobs/{fleet.job}"),
    ]
    now = fleet.coordinator.clock() + 601
    monkeypatch.setattr(fleet.coordinator.audit, "_clock", lambda: now)
    fleet.coordinator.audit.tick()
    counted = said(record(fleet), "call.refused")[2:]
    assert [entry.detail for entry in counted] == ["29 more such calls", "2 more such calls"]


def test_a_worker_that_returns_over_and_over_is_told_once_and_counted(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = registration("one", trust="any").model_dump(mode="json")
    for _ in range(20):
        fleet.must("POST", "/v1/workers", fleet.one.token, given)
    assert [(entry.object, entry.worker) for entry in said(record(fleet), "worker.returned")] == [(fleet.one.id,) * 2]
    now = fleet.coordinator.clock() + 601
    monkeypatch.setattr(fleet.coordinator.audit, "_clock", lambda: now)
    fleet.coordinator.audit.tick()
    told, counted = said(record(fleet), "worker.returned")
    assert (told.detail, counted.detail) == ("one on one, version 0.1.0", "19 more such returns")
    fleet.must("POST", "/v1/workers", fleet.one.token, given)
    assert len(said(record(fleet), "worker.returned")) == 3, "another window, told at once"


def test_what_waits_is_written_by_itself_after_some_seconds(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, before = fleet.coordinator.journal, fleet.coordinator.journal.audit_page(0, 1)[1].seq
    now = fleet.coordinator.clock()
    monkeypatch.setattr(fleet.coordinator.audit, "_clock", lambda: now)
    fleet.call("GET", "/v1/jobs", None)
    fleet.coordinator.audit.tick()
    assert journal.audit_page(0, 1)[1].seq == before
    now += recorder.SOON_S
    fleet.coordinator.audit.tick()
    assert journal.audit_page(0, 1)[1].seq == before + 1


def test_a_stop_writes_what_waits(tmp_path: Path) -> None:
    served = Served(tmp_path / "state")
    for _ in range(3):
        served.call("GET", "/v1/jobs", None)
    served.close()
    with Journal.reading(tmp_path / "state" / "journal.sqlite") as journal:
        entries, _ = journal.audit_page(0, 100)
    assert [entry.detail for entry in said(entries, "call.refused")][1:] == ["2 more such calls"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=200))
def test_however_often_things_happen_a_window_has_few_rows_and_none_is_lost(steps: list[tuple[int, int]]) -> None:
    tally, now, told, counted, windows = Tally[int](window_s=100.0, most=4), 0.0, 0, 0, 1
    for kind, later in steps:
        now += later
        if tally.due(now):
            counted += sum(more for _, more, _ in tally.end())
            windows += 1
        told += tally.add(kind, kind, now)
    assert told <= windows * 5
    counted += sum(more for _, more, _ in tally.end())
    assert told + counted == len(steps)
    assert tally.end() == []


def test_kinds_beyond_those_that_are_told_apart_are_one() -> None:
    tally = Tally[str](most=1)
    assert [tally.add(kind, kind, 0.0) for kind in "abcab"] == [True, True, False, False, False]
    assert tally.end() == [("a", 1, False), ("b", 2, True)]


def test_who_is_written_down_is_who_decided() -> None:
    admin, worker = Caller("admin:1"), Caller("work:2", "w")
    ended = StateChanged(state="finished", reason="")
    assert [actor_of(ended, by) for by in (admin, worker)] == [admin, NOBODY]
    late = Late(round=1, shard=0, attempt=1, worker="w")
    assert [actor_of(late, by) for by in (admin, worker, Caller("work:3", "v"))] == [NOBODY, worker, NOBODY]


# ---------------------------------------------------------------- secrets, and the commands


def test_no_secret_is_in_the_record_nor_in_what_is_printed_of_it(fleet: Fleet) -> None:
    new = str(fleet.must("POST", "/v1/tokens", fleet.admin, {"scope": "join"}).json()["token"])
    tokens = [fleet.admin, fleet.join, fleet.one.token, fleet.two.token, new]
    for token in tokens:  # in every place where a careless caller may put one
        fleet.call("GET", f"/v1/jobs/{token}", fleet.one.token)
        fleet.call("GET", f"/v1/audit?job={token}", None, headers={"Authorization": token})
        fleet.call("POST", f"/v1/workers/{token}/leave?start_id={token}", fleet.one.token)
        registered = registration(token[-40:], trust="any").model_dump(mode="json")
        fleet.call("POST", "/v1/workers", fleet.admin, json.dumps(registered | {"start_id": "s"}).encode(), JSON)
    entries = record(fleet)
    assert len(said(entries, "call.refused")) >= 4
    text = "".join(entry.model_dump_json() for entry in entries)
    text += CliRunner().invoke(app, ["audit", "--state-dir", str(fleet.folder)]).output
    text += (fleet.folder / "journal.sqlite-wal").read_bytes().decode("latin-1")
    assert [token for token in tokens if token.split("_", 3)[3].partition("@")[0] in text] == []
    assert re.search(r"lyd_(admin|join|work)_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", text) is None


def test_the_record_is_checked_beside_a_running_coordinator_and_its_head_printed(fleet: Fleet) -> None:
    run, folder = CliRunner(), ["--state-dir", str(fleet.folder)]
    head = run.invoke(app, ["head", *folder]).stdout.strip()
    checked = run.invoke(app, ["audit", "--since", head, *folder])
    assert (checked.exit_code, f"head {head}" in checked.stdout) == (0, True), checked.output
    other = run.invoke(app, ["audit", "--since", head[:-1] + ("0" if head[-1] != "0" else "1"), *folder])
    assert (other.exit_code, "written anew" in other.stderr) == (1, True)
    assert run.invoke(app, ["audit", "--since", "7", *folder]).exit_code == 2


@pytest.mark.parametrize(
    ("anchors", "proves"),
    [
        ((), "no anchor was given: that rows after row 4 were cut off, or that all was written anew, would not show."),
        ((2,), "nothing up to row 2, which was noted, was changed or cut off; rows 3 to 4 follow it; that rows after"),
        ((2, 4), "nothing up to row 4, which was noted, was changed or cut off; that rows after row 4 were cut off"),
    ],
)
def test_a_record_that_holds_says_what_that_proves_and_what_not(anchors: tuple[int, ...], proves: str) -> None:
    rows = chain(4)
    checked = check(rows, *(Anchor(seq, rows[seq - 1].hash) for seq in anchors))
    assert checked.proof().startswith(proves)


def chain(length: int) -> list[AuditEntry]:
    rows, previous = list[AuditEntry](), GENESIS
    for seq in range(1, length + 1):
        entry = AuditEntry(seq=seq, actor="x", action=FIRST if seq == 1 else "token.issued", object="o", hash="")
        previous = row_hash(previous, entry)
        rows.append(entry.model_copy(update={"hash": previous}))
    return rows


def test_a_row_that_comes_twice_and_a_fact_that_no_row_speaks_of_are_named() -> None:
    first, second = chain(2)
    with pytest.raises(BrokenRecordError, match="row 1 of the audit record follows row 2: rows came twice"):
        check([first, second, first])
    fact = FactText(id=3, at="", job="j", type="late", round=1, shard=0, body="{}")
    with pytest.raises(BrokenRecordError, match="speaks of fact 3 after fact 0: facts 1 to 2 are missing"):
        check([first, second.model_copy(update={"fact": fact})])


class Pages:
    """A coordinator's record that grows between two looks, or is away."""

    def __init__(self, *ends: int) -> None:
        self._rows, self._ends = chain(max(ends)), list(ends)
        self.end = self._ends.pop(0)

    def audit(self, after: int, **_: Any) -> AuditPage:
        if self.end == 0:
            raise UnavailableError("http://x does not answer", code="unreachable")
        rows = self._rows[after : min(after + 2, self.end)]
        following = rows[-1].seq if rows and rows[-1].seq < self.end else None
        head = AuditHead(seq=self.end, hash=self._rows[self.end - 1].hash)
        return AuditPage(entries=tuple(rows), next=following, head=head)

    def pause(self) -> None:
        if not self._ends:
            raise KeyboardInterrupt
        self.end = self._ends.pop(0)


def followed(*ends: int, at: int = 0) -> tuple[list[int], list[str]]:
    """The rows that somebody sees who follows a record of so many rows, and what is said meanwhile."""
    pages, seen, told = Pages(*ends), list[int](), list[str]()
    with suppress(KeyboardInterrupt):
        seen.extend(row.seq for row in Reading(cast("CoordinatorApi", pages), at, {}).follow(pages.pause, told.append))
    return seen, told


def test_who_follows_sees_each_row_once_and_outlives_a_coordinator_that_is_away() -> None:
    away = "http://x does not answer; waiting for it to come back"
    assert followed(3, 3, 7) == ([1, 2, 3, 4, 5, 6, 7], [])
    assert followed(5, 0, 0, 6, 0, 8, at=4) == ([5, 6, 7, 8], [away, away])


def test_who_follows_hears_of_a_record_that_has_lost_its_end() -> None:
    pages = Pages(5, 3)
    with pytest.raises(BrokenRecordError, match="ends with row 3, and row 5 was there: its end was cut off"):
        list(Reading(cast("CoordinatorApi", pages), 0, {}).follow(pages.pause, print))


# ---------------------------------------------------------------- what it costs


def commits(journal: Journal, do: Callable[[], object]) -> int:
    """Transactions that `do` writes: each is one fsync of the log, and there are no others."""
    seen = list[str]()
    journal._database.set_trace_callback(seen.append)
    do()
    journal._database.set_trace_callback(None)
    return seen.count("COMMIT")


def test_the_record_adds_no_transaction_to_any_change(tmp_path: Path) -> None:
    late = [Late(round=number, shard=0, attempt=1, worker="w") for number in range(3)]
    with closing(Journal.open(tmp_path / "journal.sqlite")) as journal:
        changes: list[Callable[[], object]] = [
            lambda: journal.append("j", late),
            lambda: journal.worker_put("w", registration()),
            lambda: journal.worker_judged("w", 1, None),
            lambda: journal.worker_ordered("w", "pause"),
            lambda: journal.token_add(StoredToken("t", "join", "h", None)),
            lambda: journal.token_put(StoredToken("t", "join", "h", None, next_hash="n")),
            lambda: journal.token_revoke("t"),
        ]
        assert [commits(journal, change) for change in changes] == [1] * len(changes)
        for _ in range(5):
            journal.record_soon(recorder.Event(NOBODY, "call.refused", "GET /"))
        assert commits(journal, lambda: journal.append("j", late)) == 1
        assert commits(journal, journal.record_waiting) == 0
        assert journal.audit_page(0, 1)[1].seq == 1 + 3 + 6 + 5 + 3


def test_a_change_that_fails_leaves_no_row_and_keeps_what_waits(tmp_path: Path) -> None:
    with closing(Journal.open(tmp_path / "journal.sqlite")) as journal:
        journal.record_soon(recorder.Event(NOBODY, "call.refused", "GET /"))
        with pytest.raises(Exception, match="there is no worker 'w'"):
            journal.worker_judged("w", 1, None)
        assert journal.audit_page(0, 1)[1].seq == 1
        journal.record_waiting()
        assert journal.audit_page(0, 1)[1].seq == 2
    assert why_broken(tmp_path / "journal.sqlite") == ""

"""The journal: what it has taken stays, whatever happens to the process; what it must refuse, it refuses whole."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConflictError, DiskFullError, LydianError, NotFoundError, UnavailableError
from common.facts import (
    Accepted,
    Evaluated,
    Fact,
    HandedBack,
    HandedOut,
    Initialised,
    Late,
    OpenedAnew,
    StateChanged,
    Submitted,
)
from common.messages import Hardware, JobSpec, ModelFacts, Registration, TailnetNode, TorchBuild
from server import store
from server.store import SCHEMA, Journal, StoredToken, lock_folder

NODE = TailnetNode(stable_id="n1CNTRL", name="gpu.tailnet.test", owner="tag:lydian-worker", os="linux")
ROOT = Path(__file__).parent.parent
DIGEST = "ab" * 32


def accepted(round_index: int = 1, shard: int = 0, attempt: int = 1, **changes: object) -> Accepted:
    values: dict[str, object] = {
        "round": round_index, "shard": shard, "attempt": attempt, "worker": "w", "worker_name": "w", "digest": DIGEST,
        "samples": 10, "steps": 2, "seconds": 0.5, "metrics": {"loss": (3.0, 10.0)}, "bytes_down": 1, "bytes_up": 2,
    }  # fmt: skip
    return Accepted.model_validate(values | changes)


def late(round_index: int) -> Late:
    return Late(round=round_index, shard=0, attempt=1, worker="w")


def evaluated(round_index: int) -> Evaluated:
    return Evaluated(round=round_index, attempt=1, worker="w", metrics={}, samples=1, seconds=1.0, best=True)


def registration(name: str = "box", start_id: str = "s1") -> Registration:
    torch = TorchBuild(version="2.14.1", device="cpu", threads=2)
    hardware = Hardware(hostname="h", system="Linux", python="3.11", cpu="x", cores=2, memory=1, torch=torch)
    return Registration(name=name, protocol=1, version="0.1.0", start_id=start_id, hardware=hardware)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with closing(Journal.open(path)) as opened:
        yield opened


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journal]:
    """One for all examples of a property: making a journal takes longer than an example."""
    with closing(Journal.open(tmp_path_factory.mktemp("lasting") / "journal.sqlite")) as opened:
        yield opened


def newest(journal: Journal) -> int:
    return max((stored.id for stored in journal.facts()), default=0)


def by_hand(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement)


# ---------------------------------------------------------------- facts


def test_facts_come_back_as_they_were_with_ids_that_rise_by_one(path: Path) -> None:
    first: list[Fact] = [Submitted(spec=JobSpec(task="digits"), key="k"), StateChanged(state="queued", reason="café")]
    with closing(Journal.open(path)) as journal:
        kept = journal.append("a", first) + journal.append("b", [late(1)])
    with closing(Journal.open(path)) as journal:
        assert list(journal.facts()) == kept
    assert [(stored.id, stored.job, stored.fact) for stored in kept] == [
        (1, "a", first[0]),
        (2, "a", first[1]),
        (3, "b", late(1)),
    ]
    assert all(stored.at.endswith("Z") for stored in kept)


def test_numbers_that_json_lacks_come_back(journal: Journal) -> None:
    journal.append("a", [accepted(metrics={"loss": (math.nan, 1.0)}, seconds=math.inf)])
    fact = next(journal.facts()).fact
    assert isinstance(fact, Accepted)
    assert math.isnan(fact.metrics["loss"][0])
    assert fact.seconds == math.inf


def test_the_streamed_line_is_the_fact_with_its_place(journal: Journal) -> None:
    fact = accepted(metrics={"loss": (math.nan, 1.0)})
    (stored,) = journal.append('odd "job"', [fact])
    line = stored.json()
    assert "\n" not in line
    assert json.loads(line) == {"id": 1, "at": stored.at, "job": 'odd "job"', **json.loads(fact.model_dump_json())}


def test_no_facts_are_kept_as_nothing(journal: Journal) -> None:
    assert journal.append("a", []) == []
    assert list(journal.facts()) == []


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 4), st.sampled_from(["late", "evaluation"])), max_size=12
    ),
    after=st.integers(0, 13),
    job=st.sampled_from([None, "a", "b"]),
    types=st.sampled_from([None, (), ("late",), ("late", "evaluation")]),
    limit=st.sampled_from([None, 0, 1, 3, 20]),
    page=st.integers(1, 5),
)
@settings(deadline=None)
def test_any_question_about_facts_is_answered_like_a_list_would(
    lasting: Journal,
    rows: list[tuple[str, int, str]],
    after: int,
    job: str | None,
    types: tuple[str, ...] | None,
    limit: int | None,
    page: int,
) -> None:
    first = newest(lasting) + after
    kept = lasting.append_all([(j, late(r) if t == "late" else evaluated(r)) for j, r, t in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PAGE", page)
        found = list(lasting.facts(first, job, types, limit))
    expected = [s for s in kept if s.id > first and job in (None, s.job) and (types is None or s.fact.type in types)]
    assert found == expected[:limit]


def test_facts_kept_while_one_reads_are_found_too(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PAGE", 2)
    journal.append("a", [late(1), late(2)])
    reading = journal.facts()
    next(reading)
    journal.append("a", [late(3)])
    assert [stored.id for stored in reading] == [2, 3]


def test_a_reader_that_stopped_halfway_does_not_keep_a_writer_waiting(journal: Journal, path: Path) -> None:
    journal.append("a", [late(number) for number in range(1, 10)])
    reading = journal.facts()
    next(reading)
    with closing(Journal.open(path)) as other:
        other.append("a", [late(10)])
        (busy, _, _) = other._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert busy == 0


# ---------------------------------------------------------------- at most once


@given(
    st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 2), st.integers(0, 1)), max_size=3), max_size=10)
)
@settings(deadline=None)
def test_no_order_of_arrivals_lets_two_updates_of_one_shard_count(
    lasting: Journal, batches: list[list[tuple[str, int, int]]]
) -> None:
    counted: set[tuple[str, int, int]] = set()
    begin = newest(lasting)
    for attempt, batch in enumerate(batches, start=1):
        fresh = len({*batch} - counted) == len(batch)
        try:
            lasting.append_all([(f"{job}{begin}", accepted(r, s, attempt)) for job, r, s in batch])
        except ConflictError:
            assert not fresh
        else:
            assert fresh
            counted |= {*batch}
    facts = [(stored.job[0], stored.fact) for stored in lasting.facts(after=begin)]
    found = [(job, fact.round, fact.shard) for job, fact in facts if isinstance(fact, Accepted)]
    assert len(found) == len({*found})
    assert {*found} == counted


def test_a_refused_fact_takes_its_whole_transaction_with_it_and_leaves_no_gap_in_the_ids(journal: Journal) -> None:
    journal.append("a", [accepted(2, 1)])
    with pytest.raises(ConflictError, match="shard 1 of round 2 of a has an accepted update already") as refused:
        journal.append("a", [late(2), accepted(2, 1, attempt=2)])
    assert refused.value.code == "accepted_before"
    (stored,) = journal.append("a", [late(3)])
    assert [s.fact for s in journal.facts()] == [accepted(2, 1), late(3)]
    assert stored.id == 2


def test_a_shard_whose_update_was_lost_can_be_accepted_once_more_and_the_lost_one_counts_no_more(
    journal: Journal,
) -> None:
    back = {"attempt": 1, "worker": "w", "worker_name": "w", "code": "lost", "sentence": "gone after a power cut"}
    journal.append("a", [accepted(1, 0), accepted(1, 1)])
    journal.append("a", [HandedBack.model_validate({"kind": "train", "round": 1, "shard": 0, **back})])
    assert journal.results("a", "train", 1, 0) == []
    journal.append("a", [accepted(1, 0, attempt=2)])
    assert [s.fact for s in journal.results("a", "train", 1, 0)] == [accepted(1, 0, attempt=2)]
    for shard in (0, 1):
        with pytest.raises(ConflictError):
            journal.append("a", [accepted(1, shard, attempt=3)])


def test_late_repeats_of_an_accepted_shard_are_recorded_as_often_as_they_come(journal: Journal) -> None:
    journal.append("a", [accepted(1, 0), late(1), late(1)])
    assert len(list(journal.facts())) == 3


def test_results_are_those_of_the_one_task(journal: Journal) -> None:
    made = Initialised(
        attempt=1, worker="w", digest=DIGEST, size=1, facts=ModelFacts(parameters=1, train_samples=1, test_samples=1)
    )
    out = HandedOut(kind="train", round=1, shard=0, attempt=1, worker="w")
    journal.append("a", [made, out, accepted(1, 0), accepted(1, 1), accepted(2, 0), evaluated(1), evaluated(2)])
    journal.append("b", [accepted(1, 0, attempt=9)])
    assert [s.fact for s in journal.results("a", "init", 0, 0)] == [made]
    assert [s.fact for s in journal.results("a", "train", 1, 1)] == [accepted(1, 1)]
    assert [s.fact for s in journal.results("a", "evaluate", 2, 0)] == [evaluated(2)]
    assert journal.results("a", "train", 3, 0) == []


# ---------------------------------------------------------------- through kill -9

APPENDS = """
import sys
from pathlib import Path
from common.facts import Late
from server.store import Journal
journal = Journal.open(Path(sys.argv[1]))
round_index = 0
while True:
    round_index += 1
    facts = [Late(round=round_index, shard=shard, attempt=1, worker="w") for shard in (0, 1)]
    for stored in journal.append("a", facts):
        sys.stdout.write(f"{stored.id}\\n")
    sys.stdout.flush()
"""


def test_what_was_returned_before_a_kill_is_there_after_and_no_half_transaction(path: Path) -> None:
    for lines_before_kill in (2, 31, 90):
        command = [sys.executable, "-c", APPENDS, str(path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            seen = [int(process.stdout.readline()) for _ in range(lines_before_kill)]
            process.send_signal(signal.SIGKILL)
            seen += [int(line) for line in process.stdout if line.endswith("\n")]
        with closing(Journal.open(path)) as journal:
            ids = [stored.id for stored in journal.facts()]
        assert seen[-1] <= ids[-1]
        assert ids == list(range(1, len(ids) + 1))
        assert len(ids) % 2 == 0


# ---------------------------------------------------------------- the file


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_journal_of_a_newer_version_is_refused_by_that_versions_name_and_left_untouched(
    journal: Journal, tmp_path: Path
) -> None:
    journal.append("a", [late(1)])
    by_hand(journal.path, "INSERT INTO written_by VALUES (99, '7.8.9', '2031-01-01T00:00:00Z')")
    by_hand(journal.path, "PRAGMA user_version = 99")
    killed = tmp_path / "killed"  # as a killed process leaves it: the newest commits are in the -wal alone
    killed.mkdir()
    for name in ("journal.sqlite", "journal.sqlite-wal"):
        shutil.copy(tmp_path / name, killed)
    before = snapshot(killed)
    with pytest.raises(
        LydianError, match=rf"written by version 7\.8\.9, with schema 99.*knows schema {SCHEMA}"
    ) as refused:
        Journal.open(killed / "journal.sqlite")
    assert refused.value.code == "journal_too_new"
    assert {name: content for name, content in snapshot(killed).items() if name in before} == before


def test_an_older_journal_is_migrated_after_a_copy_of_it_was_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Journal.open(path)) as journal:
        journal.append("a", [late(1)])
    monkeypatch.setattr(store, "SCHEMA", SCHEMA + 1)
    monkeypatch.setattr(
        store, "MIGRATIONS", {SCHEMA: lambda database: database.execute("ALTER TABLE facts ADD COLUMN who TEXT")}
    )
    with closing(Journal.open(path)) as journal:
        assert [stored.fact for stored in journal.facts()] == [late(1)]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA + 1,)
        assert database.execute("SELECT schema FROM written_by").fetchall() == [(SCHEMA,), (SCHEMA + 1,)]
        assert database.execute("SELECT who FROM facts").fetchall() == [(None,)]
    monkeypatch.setattr(store, "SCHEMA", SCHEMA)
    with closing(Journal.open(path.with_name(f"journal.sqlite.schema-{SCHEMA}.backup"))) as old:
        assert [stored.fact for stored in old.facts()] == [late(1)]


def test_a_migration_that_fails_leaves_the_old_journal_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(database: sqlite3.Connection) -> None:
        database.execute("DROP TABLE facts")
        database.execute("INSERT INTO nowhere VALUES (1)")

    with closing(Journal.open(path)) as journal:
        journal.append("a", [late(1)])
    with monkeypatch.context() as patch:
        patch.setattr(store, "SCHEMA", SCHEMA + 1)
        patch.setattr(store, "MIGRATIONS", {SCHEMA: step})
        with pytest.raises(LydianError, match="nowhere"):
            Journal.open(path)
    with closing(Journal.open(path)) as journal:
        assert [stored.fact for stored in journal.facts()] == [late(1)]


def test_a_journal_of_the_first_schema_is_read_with_nobody_having_a_strike(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration())
        journal.append("a", [late(1)])
    by_hand(path, "ALTER TABLE workers DROP COLUMN node")
    by_hand(path, "ALTER TABLE workers DROP COLUMN strikes")
    by_hand(path, "ALTER TABLE workers DROP COLUMN ordered")
    by_hand(path, "UPDATE written_by SET schema = 1")
    by_hand(path, "PRAGMA user_version = 1")
    with closing(Journal.open(path)) as journal:
        assert [worker.strikes for worker in journal.workers()] == [0]
        assert [stored.fact for stored in journal.facts()] == [late(1)]
        journal.worker_judged("w1", 2, None)
        assert [worker.strikes for worker in journal.workers()] == [2]
    assert path.with_name("journal.sqlite.schema-1.backup").exists()


def test_a_journal_of_the_second_schema_is_read_with_nobody_pinned_to_a_machine(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration())
    by_hand(path, "ALTER TABLE workers DROP COLUMN node")
    by_hand(path, "ALTER TABLE workers DROP COLUMN ordered")
    by_hand(path, "UPDATE written_by SET schema = 2")
    by_hand(path, "PRAGMA user_version = 2")
    with closing(Journal.open(path)) as journal:
        assert journal.pins() == {}
        journal.worker_pinned("w1", NODE)
    with closing(Journal.open(path)) as journal:
        assert journal.pins() == {"w1": NODE}


def test_a_pin_outlives_a_registration_and_goes_when_it_is_taken_away(journal: Journal) -> None:
    journal.worker_put("w1", registration())
    journal.worker_pinned("w1", NODE)
    journal.worker_put("w1", registration())
    assert journal.pins() == {"w1": NODE}
    journal.worker_pinned("w1", None)
    assert journal.pins() == {}
    with pytest.raises(NotFoundError):
        journal.worker_pinned("nobody", NODE)


def test_a_pin_that_cannot_be_read_is_a_damaged_journal(journal: Journal) -> None:
    journal.worker_put("w1", registration())
    by_hand(journal.path, "UPDATE workers SET node = '{}'")
    with pytest.raises(LydianError) as damaged:
        journal.pins()
    assert damaged.value.code == "journal_damaged"


def test_a_journal_of_the_second_schema_is_read_with_nobody_under_an_order(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration())
        journal.worker_judged("w1", 2, "2 refused")
    by_hand(path, "ALTER TABLE workers DROP COLUMN ordered")
    by_hand(path, "ALTER TABLE workers DROP COLUMN node")
    by_hand(path, "UPDATE written_by SET schema = 2")
    by_hand(path, "PRAGMA user_version = 2")
    with closing(Journal.open(path)) as journal:
        assert [(one.strikes, one.set_aside_reason, one.ordered) for one in journal.workers()] == [
            (2, "2 refused", "work")
        ]


def test_an_order_is_kept_until_another_one_comes_and_when_the_worker_registers_anew(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration())
        journal.worker_ordered("w1", "pause")
        journal.worker_put("w1", registration())
    with closing(Journal.open(path)) as journal:
        assert journal.workers()[0].ordered == "pause"
        journal.worker_ordered("w1", "work")
        assert journal.workers()[0].ordered == "work"
        with pytest.raises(NotFoundError, match="no worker 'w2'"):
            journal.worker_ordered("w2", "drain")


def test_a_process_that_died_before_the_tables_were_made_is_no_obstacle(path: Path) -> None:
    by_hand(path, "PRAGMA journal_mode = WAL")
    with closing(Journal.open(path)) as journal:
        assert journal.append("a", [late(1)])


def test_a_database_of_something_else_is_refused(path: Path) -> None:
    by_hand(path, "CREATE TABLE recipes (name TEXT)")
    with pytest.raises(LydianError, match="something else: its tables are recipes"):
        Journal.open(path)


def test_a_file_that_is_no_database_is_refused_and_kept(path: Path) -> None:
    path.write_bytes(b"not a journal\n" * 100)
    with pytest.raises(LydianError, match="is damaged, or is none") as refused:
        Journal.open(path)
    assert refused.value.code == "journal_damaged"
    assert path.read_bytes() == b"not a journal\n" * 100


def test_a_row_that_cannot_be_read_is_named(journal: Journal) -> None:
    journal.append("a", [late(1), late(2)])
    by_hand(journal.path, """UPDATE facts SET body = '{"type":"late","round":-4}' WHERE id = 2""")
    with pytest.raises(
        LydianError, match=r"row 2 of facts in .* cannot be read: late\.round: .*greater than or equal to 0"
    ) as error:
        list(journal.facts())
    assert error.value.code == "journal_damaged"


def test_only_the_owner_may_read_the_journal(journal: Journal) -> None:
    journal.append("a", [late(1)])
    files = [journal.path, journal.path.with_name("journal.sqlite-wal")]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]


def test_commits_wait_for_the_disk(journal: Journal) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert {name: journal._database.execute(f"PRAGMA {name}").fetchone()[0] for name in wanted} == wanted


def test_a_full_disk_refuses_the_transaction_and_the_journal_goes_on_when_there_is_room(journal: Journal) -> None:
    journal.append("a", [late(1)])
    (pages,) = journal._database.execute("PRAGMA page_count").fetchone()
    journal._database.execute(f"PRAGMA max_page_count = {pages}")
    big = StateChanged(state="failed", reason="x" * 100_000)
    with pytest.raises(DiskFullError, match=r"no room left for the journal .*SQLITE_FULL"):
        journal.append("a", [late(2), big])
    journal._database.execute("PRAGMA max_page_count = 1000000")
    assert [stored.fact for stored in journal.facts()] == [late(1)]
    assert [stored.id for stored in journal.append("a", [late(2), big])] == [2, 3]


def test_a_file_that_another_program_holds_is_not_waited_for_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_TIMEOUT_S", 0.05)
    with closing(Journal.open(path)) as journal, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="another program held the journal"):
            journal.append("a", [late(1)])
        other.execute("ROLLBACK")
        assert journal.append("a", [late(1)])[0].id == 1


def test_a_backup_holds_what_the_journal_held(journal: Journal, tmp_path: Path) -> None:
    journal.append("a", [late(1)])
    journal.backup(tmp_path / "copy")
    journal.append("a", [late(2)])
    with closing(Journal.open(tmp_path / "copy")) as copy:
        assert [stored.fact for stored in copy.facts()] == [late(1)]


def test_a_closed_journal_is_a_bug_of_the_caller_not_a_fault_of_the_disk(journal: Journal) -> None:
    journal.close()
    journal.close()
    with pytest.raises(sqlite3.ProgrammingError):
        journal.append("a", [late(1)])


# ---------------------------------------------------------------- workers and tokens


def test_a_worker_that_comes_back_keeps_its_first_day_and_stays_set_aside(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration("old"))
        journal.worker_put("w2", registration("other"))
        (first, _) = journal.workers()
        journal.worker_judged("w1", 3, "3 results were refused")
        journal.worker_put("w1", registration("new", start_id="s2"))
    with closing(Journal.open(path)) as journal:
        (one, two) = journal.workers()
        journal.worker_judged("w1", 3, None)
        assert journal.workers()[0].set_aside_reason is None
    assert (one.id, one.registration) == ("w1", registration("new", start_id="s2"))
    assert (one.created_at, one.set_aside_reason) == (first.created_at, "3 results were refused")
    assert (two.id, two.set_aside_reason) == ("w2", None)


def test_a_worker_that_is_not_there_cannot_be_set_aside(journal: Journal) -> None:
    with pytest.raises(NotFoundError, match="no worker 'w1'"):
        journal.worker_judged("w1", 3, "reason")


def test_a_registration_that_cannot_be_read_names_its_worker(journal: Journal) -> None:
    journal.worker_put("w1", registration())
    by_hand(journal.path, "UPDATE workers SET registration = '{}'")
    with pytest.raises(LydianError, match="the row 'w1' of workers"):
        journal.workers()


def test_a_token_is_revoked_once_and_stays_so(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.worker_put("w1", registration())
        journal.token_add(StoredToken("t1", "work", "00" * 32, "w1"))
        journal.token_add(StoredToken("t2", "join", "11" * 32, None))
        journal.token_revoke("t1")
        revoked_at = journal.tokens()[0].revoked_at
        journal.token_revoke("t1")
    with closing(Journal.open(path)) as journal:
        (one, two) = journal.tokens()
    assert (one.id, one.scope, one.secret_hash, one.worker) == ("t1", "work", "00" * 32, "w1")
    assert one.revoked_at == revoked_at is not None
    assert (two.worker, two.revoked_at) == (None, None)


def test_a_token_needs_a_free_id_and_a_worker_that_is_there(journal: Journal) -> None:
    journal.token_add(StoredToken("t1", "join", "00" * 32, None))
    with pytest.raises(ConflictError, match="a token 't1' already"):
        journal.token_add(StoredToken("t1", "join", "11" * 32, None))
    with pytest.raises(NotFoundError, match="no worker 'w9'"):
        journal.token_add(StoredToken("t2", "work", "11" * 32, "w9"))
    with pytest.raises(NotFoundError, match="no token 't2'"):
        journal.token_revoke("t2")
    assert [token.secret_hash for token in journal.tokens()] == ["00" * 32]


# ---------------------------------------------------------------- one coordinator a folder

HOLDS = """
import sys
from pathlib import Path
from server.store import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_coordinator_on_a_folder_is_told_who_has_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LydianError, match=f"is in use by process {other.pid}$") as refused:
            lock_folder(tmp_path)
        assert refused.value.code == "folder_locked"
        other.kill()
        other.wait()
        lock_folder(tmp_path).close()  # a killed one leaves nothing to clear away


def test_a_folder_given_back_can_be_taken_again(tmp_path: Path) -> None:
    with lock_folder(tmp_path) as lock:
        pass
    lock.close()
    (tmp_path / "lock").write_text("1234567890123\n")  # of a process that is gone, and had a longer number
    with lock_folder(tmp_path), pytest.raises(LydianError, match=f"in use by process {os.getpid()}$"):
        lock_folder(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LydianError, match=r"state folder .*nowhere cannot be used") as refused:
        lock_folder(tmp_path / "nowhere")
    assert refused.value.code == "folder_unusable"


# ---------------------------------------------------------------- secure sums


def test_what_came_of_a_sum_is_kept_in_order_and_by_its_seal_until_it_is_forgotten(path: Path) -> None:
    with closing(Journal.open(path)) as journal:
        journal.sum_append("j1", 1, 0, ["a", "b"])
        journal.sum_append("j1", 1, 1, ["c"])
        journal.sum_append("j2", 1, 0, ["d"])
    with closing(Journal.open(path)) as journal:
        assert journal.sum_of("j1", 1, 0) == ["a", "b"]
        assert journal.sum_of("j1", 1, 1) == ["c"]
        journal.sum_forget("j1")
        assert (journal.sum_of("j1", 1, 0), journal.sum_of("j1", 1, 1), journal.sum_of("j2", 1, 0)) == ([], [], ["d"])


def test_a_journal_of_the_third_schema_takes_secure_sums(path: Path) -> None:
    with closing(Journal.open(path)):
        pass
    by_hand(path, "DROP TABLE sums")
    by_hand(path, "UPDATE written_by SET schema = 3")
    by_hand(path, "PRAGMA user_version = 3")
    with closing(Journal.open(path)) as journal:
        journal.sum_append("j1", 1, 0, ["a"])
        assert journal.sum_of("j1", 1, 0) == ["a"]


def test_a_shard_of_a_round_begun_anew_may_be_accepted_once_more(journal: Journal) -> None:
    journal.append("j1", [accepted(1, 0)])
    journal.append("j1", [OpenedAnew(round=1, seal=1, shards=(), reason="too few")])
    journal.append("j1", [accepted(1, 0)])
    assert len(journal.results("j1", "train", 1, 0)) == 1
    with pytest.raises(ConflictError):
        journal.append("j1", [accepted(1, 0)])

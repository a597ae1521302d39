"""The worker's state folder: one agent, one identity, and a credential that only its owner can read."""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadTaskError, DiskFullError, LydianError
from common.messages import Registration
from worker import identity
from worker.identity import Identity, default_folder, place_of, trust_file, trusted_digests

URL = "http://100.64.0.1:8470"
SECRET = "lyd_work_never-in-a-log"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A state folder that does not exist yet."""
    return tmp_path / "workers" / "gpu-1"


@pytest.fixture
def joined(folder: Path) -> Path:
    """A state folder of a worker that a coordinator knows, and that no agent works in."""
    with Identity.open(folder, URL) as me:
        me.remember("gpu-1-0a1b2c3d", SECRET)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---------------------------------------------------------------- who it is


def test_a_new_worker_is_known_nowhere_and_leaves_no_identity_behind(folder: Path) -> None:
    with Identity.open(folder, URL) as me:
        assert (me.worker_id, me.credential) == (None, None)
        me.forget()
    assert not (folder / "identity.json").exists()


def test_what_was_remembered_is_known_after_a_restart(joined: Path) -> None:
    with Identity.open(joined, URL) as me:
        assert (me.worker_id, me.credential) == ("gpu-1-0a1b2c3d", SECRET)


def test_what_was_remembered_is_known_at_once_and_may_change(folder: Path) -> None:
    with Identity.open(folder, URL) as me:
        me.remember("first", "one")
        me.remember("second", "two")
        assert (me.worker_id, me.credential) == ("second", "two")


def test_each_coordinator_knows_the_worker_by_another_id(joined: Path) -> None:
    other = "http://100.64.0.9:8470"
    with Identity.open(joined, other) as me:
        assert me.worker_id is None
        me.remember("another", "one")
        me.forget()
        assert me.worker_id is None
    with Identity.open(joined, URL) as me:
        assert me.worker_id == "gpu-1-0a1b2c3d"
        me.forget()
    with Identity.open(joined, URL) as me:
        assert (me.worker_id, me.credential) == (None, None)


@pytest.mark.parametrize(
    ("spelling", "url"),
    [
        ("http://gpu-box:8470/", "http://gpu-box:8470"),
        ("HTTP://GPU-Box:8470", "http://gpu-box:8470"),
        (" http://gpu-box:8470//?x=1#y", "http://gpu-box:8470"),
        ("http://gpu-box", "http://gpu-box:80"),
        ("https://gpu-box", "https://gpu-box:443"),
        ("https://alice:secret@gpu-box/lydian/", "https://gpu-box:443/lydian"),
        ("http://[FD7A::1]:8470", "http://[fd7a::1]:8470"),
    ],
)
def test_one_coordinator_has_one_entry_however_its_url_is_spelled(folder: Path, spelling: str, url: str) -> None:
    with Identity.open(folder, url) as me:
        me.remember("gpu-1", SECRET)
    with Identity.open(folder, spelling) as me:
        assert me.worker_id == "gpu-1"
        assert me.url == url


@pytest.mark.parametrize(
    "url", ["gpu-box:8470", "100.64.0.1", "ftp://gpu-box", "http://", "http://x:port", "http://[x", ""]
)
def test_what_is_no_url_is_refused_before_a_folder_is_made(folder: Path, url: str) -> None:
    with pytest.raises(LydianError, match="no coordinator's URL") as refusal:
        Identity.open(folder, url)
    assert refusal.value.code == "bad_url"
    assert not folder.exists()


def test_every_start_has_an_id_of_its_own_that_a_registration_takes(folder: Path) -> None:
    starts = []
    for _ in range(20):
        with Identity.open(folder, URL) as me:
            starts.append(me.start_id)
    assert len(set(starts)) == 20
    longest = next(
        rule.max_length for rule in Registration.model_fields["start_id"].metadata if hasattr(rule, "max_length")
    )
    assert all(0 < len(start) <= longest for start in starts)


# ---------------------------------------------------------------- the file


def test_only_the_owner_can_read_the_credential_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        with Identity.open(folder, URL) as me:
            me.remember("gpu-1", SECRET)
            assert mode(folder) == 0o700
            assert mode(folder / "identity.json") == 0o600
            assert mode(folder / "agent.lock") == 0o600
    finally:
        os.umask(before)


def test_a_file_that_others_could_read_is_closed_to_them_and_that_is_said(
    joined: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (joined / "identity.json").chmod(0o644)
    with caplog.at_level(logging.WARNING, "lydian.worker"):
        Identity.open(joined, URL).close()

    assert mode(joined / "identity.json") == 0o600
    assert "644" in caplog.text
    assert SECRET not in caplog.text


def test_a_leftover_of_a_write_that_was_killed_is_no_obstacle_and_lends_its_mode_to_nothing(joined: Path) -> None:
    leftover = joined / "identity.json.part"
    leftover.write_text("half")
    leftover.chmod(0o644)
    with Identity.open(joined, URL) as me:
        me.remember("gpu-1", "new")

    assert not leftover.exists()
    assert mode(joined / "identity.json") == 0o600


DAMAGES = {
    "empty": "",
    "cut off": '{"coordinators": {"http://100.64.0.1:8470": {"worker_id": "a", "cred',
    "no object": "[]",
    "empty object": "{}",
    "no credential": '{"coordinators": {"http://x:1": {"worker_id": "a"}}}',
    "empty credential": '{"coordinators": {"http://x:1": {"worker_id": "a", "credential": ""}}}',
    "unknown field": json.dumps({"coordinators": {}, "secret": SECRET}),
    "wrong type": json.dumps({"coordinators": {"http://x:1": {"worker_id": "a", "credential": [SECRET]}}}),
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_an_error_that_names_it_and_never_a_new_identity(joined: Path, damage: str) -> None:
    content = DAMAGES[damage].encode(errors="surrogateescape")
    (joined / "identity.json").write_bytes(content)
    with pytest.raises(LydianError, match="is damaged") as refusal:
        Identity.open(joined, URL)

    assert refusal.value.code == "bad_identity"
    assert str(joined / "identity.json") in str(refusal.value)
    assert "token" in refusal.value.advice
    assert SECRET not in refusal.value.lines()
    assert (joined / "identity.json").read_bytes() == content


def test_a_damaged_file_leaves_the_folder_unlocked(joined: Path) -> None:
    good = (joined / "identity.json").read_bytes()
    (joined / "identity.json").write_bytes(b"")
    with pytest.raises(LydianError) as refusal:
        Identity.open(joined, URL)
    (joined / "identity.json").write_bytes(good)

    with Identity.open(joined, URL) as me:
        assert me.worker_id == "gpu-1-0a1b2c3d"
    assert refusal.value.code == "bad_identity"  # and still held, so that it is not its end that let go


@settings(max_examples=15)  # each waits for the disk
@given(
    known=st.dictionaries(
        st.sampled_from(["http://a:1", "http://b:2", "https://c:443/x"]),
        st.tuples(st.text(min_size=1), st.text(min_size=1)).map(
            lambda pair: tuple(part.encode(errors="replace").decode() for part in pair)
        ),
        min_size=1,
    )
)
def test_whatever_coordinators_give_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, known: dict[str, tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    for url, (worker_id, credential) in known.items():
        with Identity.open(folder, url) as me:
            me.remember(worker_id, credential)
    for url, pair in known.items():
        with Identity.open(folder, url) as me:
            assert (me.worker_id, me.credential) == pair


# ---------------------------------------------------------------- the lock


WRITER = """
import sys
from pathlib import Path
from worker.identity import Identity
me = Identity.open(Path(sys.argv[1]), sys.argv[2])
print("ready", flush=True)
number = 0
while True:
    me.remember(f"worker-{number}", f"credential-{number}" * 500)
    number += 1
"""


def start_writer(folder: Path) -> subprocess.Popen[str]:
    """Another agent, that writes its identity over and over."""
    command = [sys.executable, "-c", WRITER, str(folder), URL]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def test_a_second_agent_is_refused_and_told_who_the_first_is_until_that_one_is_killed(folder: Path) -> None:
    with start_writer(folder) as writer:
        try:
            with pytest.raises(LydianError, match=f"process {writer.pid}") as refusal:
                Identity.open(folder, URL)
            assert refusal.value.code == "folder_locked"
            assert "--state-dir" in refusal.value.advice
        finally:
            writer.send_signal(signal.SIGKILL)
    Identity.open(folder, URL).close()


def test_a_kill_in_the_middle_of_a_write_leaves_an_identity_that_is_whole(folder: Path) -> None:
    for _ in range(3):
        with start_writer(folder) as writer:
            path = folder / "identity.json"
            while not path.exists():  # until the first write
                assert writer.poll() is None
            writer.send_signal(signal.SIGKILL)
        with Identity.open(folder, URL) as me:
            assert me.worker_id is not None
            number = me.worker_id.removeprefix("worker-")
            assert me.credential == f"credential-{number}" * 500


def test_a_second_identity_in_the_same_process_is_refused_too(joined: Path) -> None:
    with Identity.open(joined, URL), pytest.raises(LydianError, match=f"process {os.getpid()}"):
        Identity.open(joined, "http://elsewhere:1")


def test_a_lock_without_a_process_id_is_still_a_lock(joined: Path) -> None:
    with Identity.open(joined, URL):
        os.truncate(joined / "agent.lock", 0)  # as in the moment between taking it and saying so
        with pytest.raises(LydianError, match="process not known"):
            Identity.open(joined, URL)


def test_closing_twice_is_closing_once_and_does_not_close_what_came_after(joined: Path) -> None:
    first = Identity.open(joined, URL)
    first.close()
    second = Identity.open(joined, URL)
    first.close()
    with pytest.raises(LydianError, match="another agent"):
        Identity.open(joined, URL)
    second.close()


def test_an_identity_that_nobody_holds_any_more_lets_go_of_its_folder(joined: Path) -> None:
    me = Identity.open(joined, URL)
    del me
    gc.collect()
    Identity.open(joined, URL).close()


def test_the_processes_that_an_agent_starts_do_not_inherit_the_lock(joined: Path) -> None:
    me = Identity.open(joined, URL)
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"here\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"here\n"  # it runs, so the system has closed what it does not inherit
        me.close()
        Identity.open(joined, URL).close()


# ---------------------------------------------------------------- the folder


def test_a_folder_that_cannot_be_made_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LydianError, match="Not a directory") as refusal:
        Identity.open(tmp_path / "file" / "state", URL)
    assert refusal.value.code == "folder_unusable"
    assert "--state-dir" in refusal.value.advice


def test_an_identity_that_is_a_folder_is_an_error_that_names_it(joined: Path) -> None:
    (joined / "identity.json").unlink()
    (joined / "identity.json").mkdir(mode=0o700)
    with pytest.raises(LydianError, match=r"Is a directory.*identity\.json"):
        Identity.open(joined, URL)


def test_a_folder_that_vanished_is_an_error_and_leaves_the_identity_as_it_was(joined: Path) -> None:
    with Identity.open(joined, URL) as me:
        joined.rename(joined.with_name("gone"))
        with pytest.raises(LydianError, match="cannot be used"):
            me.remember("other", "one")
        assert me.worker_id == "gpu-1-0a1b2c3d"


def test_a_place_is_the_same_at_each_start_and_says_nothing_of_the_machine(joined: Path) -> None:
    with Identity.open(joined, URL) as first:
        place, start = first.place, first.start_id
    with Identity.open(joined, URL) as second:
        assert (second.place, second.start_id != start) == (place, True)
    assert re.fullmatch("[0-9a-f]{64}", place)
    assert Registration.model_fields["place"].metadata[0].max_length == len(place)


def test_a_copied_folder_has_another_place_and_a_renamed_one_has_not(joined: Path) -> None:
    before = place_of(joined)
    shutil.copytree(joined, joined.with_name("copy"))
    joined.rename(joined.with_name("renamed"))
    assert place_of(joined.with_name("renamed")) == before
    assert place_of(joined.with_name("copy")) != before


def test_another_machine_has_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, machine_id = tmp_path / "folder", tmp_path / "machine-id"
    folder.mkdir()
    monkeypatch.setattr(identity, "MACHINE_IDS", (tmp_path / "absent", machine_id))
    places = set()
    for content in ("0123\n", "4567\n", ""):  # without an id, the machine's name stands for it
        machine_id.write_text(content)
        places.add(place_of(folder))
    assert len(places) == 3
    machine_id.unlink()
    assert place_of(folder) in places


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_one(tmp_path: Path, number: int) -> None:
    with pytest.raises(DiskFullError, match=r"No space left|quota"), identity.usable(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path))


def test_the_default_folder_is_one_a_worker_under_the_user_s_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    assert default_folder("gpu-1") == tmp_path / "lydian" / "workers" / "gpu-1"


@given(name=st.text(max_size=70) | st.sampled_from([".", "..", "a/b", "../x", "a\n", "a b", ""]))
def test_a_name_never_leads_out_of_the_workers_folder(name: str) -> None:
    workers = default_folder("x").parent
    with contextlib.suppress(LydianError):
        folder = default_folder(name)
        assert folder.parent == workers
        assert Path(os.path.normpath(folder)) == folder


@pytest.mark.parametrize("name", [".", "..", "a/b", "", "x" * 64, "gpu 1"])
def test_a_name_that_no_worker_can_have_is_refused(name: str) -> None:
    with pytest.raises(LydianError, match="cannot be a worker's name") as refusal:
        default_folder(name)
    assert refusal.value.code == "bad_name"


# ---------------------------------------------------------------- trust


DIGEST = hashlib.sha256(b"a task").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_bytes(b"a task")
    return path


def test_no_list_trusts_nothing(tmp_path: Path) -> None:
    assert trusted_digests(tmp_path) == ()
    assert trusted_digests(tmp_path / "absent") == ()


def test_a_list_is_read_with_its_comments_and_each_file_counts_once(tmp_path: Path) -> None:
    lines = ["# ours — über alles", "", f"  {DIGEST}  # my_task.py", OTHER.upper(), "#" + "0" * 64, DIGEST, "   "]
    (tmp_path / "trusted.txt").write_text("\r\n".join(lines), encoding="utf-8")

    assert trusted_digests(tmp_path) == (DIGEST, OTHER)


@pytest.mark.parametrize(
    "line", [DIGEST[:-1], DIGEST + "0", f"{DIGEST} my_task.py", "my_task.py", "g" * 64, "é" * 64, "٣" * 64]
)
def test_a_line_that_is_no_digest_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "trusted.txt").write_text(f"{OTHER}\n{line}\n", encoding="utf-8")
    with pytest.raises(LydianError, match=r"trusted\.txt, line 2") as refusal:
        trusted_digests(tmp_path)
    assert refusal.value.code == "bad_trust_list"


def test_a_trusted_file_is_listed_by_its_bytes_and_with_its_name(tmp_path: Path, task: Path) -> None:
    assert trust_file(tmp_path, task) == DIGEST
    assert trusted_digests(tmp_path) == (DIGEST,)
    assert (tmp_path / "trusted.txt").read_text() == f"{DIGEST}  # my_task.py\n"


def test_trusting_a_file_again_changes_nothing(tmp_path: Path, task: Path) -> None:
    trust_file(tmp_path, task)
    before = (tmp_path / "trusted.txt").read_bytes()

    assert trust_file(tmp_path, task) == DIGEST
    assert (tmp_path / "trusted.txt").read_bytes() == before


def test_a_changed_file_is_another_file(tmp_path: Path, task: Path) -> None:
    trust_file(tmp_path, task)
    task.write_bytes(b"another")
    trust_file(tmp_path, task)

    assert trusted_digests(tmp_path) == (DIGEST, OTHER)


@pytest.mark.parametrize("before", ["", "# no line end", f"{OTHER}", f"{OTHER}\n"])
def test_what_the_owner_wrote_stays_as_it_is(tmp_path: Path, task: Path, before: str) -> None:
    (tmp_path / "trusted.txt").write_text(before)
    old = trusted_digests(tmp_path)
    trust_file(tmp_path, task)

    assert (tmp_path / "trusted.txt").read_text().startswith(before)
    assert trusted_digests(tmp_path) == (*old, DIGEST)


def test_a_list_that_is_a_link_stays_one(tmp_path: Path, task: Path) -> None:
    shared = tmp_path / "shared.txt"
    shared.write_text(f"{OTHER}\n")
    (tmp_path / "trusted.txt").symlink_to(shared)
    trust_file(tmp_path, task)

    assert shared.read_text().endswith(f"{DIGEST}  # my_task.py\n")


def test_a_name_with_a_line_break_adds_no_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / f"x\n{OTHER}\nÿ.py"
    path.write_bytes(b"a task")
    trust_file(tmp_path, path)

    assert trusted_digests(tmp_path) == (DIGEST,)


def test_only_the_owner_can_add_to_the_list_whatever_the_umask(tmp_path: Path, task: Path) -> None:
    before = os.umask(0)
    try:
        trust_file(tmp_path, task)
    finally:
        os.umask(before)
    assert mode(tmp_path / "trusted.txt") == 0o600


def test_a_task_file_that_is_not_there_is_an_error_and_trusts_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadTaskError, match=r"absent\.py cannot be read"):
        trust_file(tmp_path, tmp_path / "absent.py")
    assert trusted_digests(tmp_path) == ()


def test_a_damaged_list_is_not_added_to(tmp_path: Path, task: Path) -> None:
    (tmp_path / "trusted.txt").write_text("nonsense\n")
    with pytest.raises(LydianError, match="line 1"):
        trust_file(tmp_path, task)
    assert (tmp_path / "trusted.txt").read_text() == "nonsense\n"


def test_a_list_that_cannot_be_read_is_an_error(tmp_path: Path, task: Path) -> None:
    (tmp_path / "trusted.txt").mkdir()
    with pytest.raises(LydianError, match="Is a directory"):
        trusted_digests(tmp_path)

"""The child's surroundings: its variables, what it is lent, what is taken of what it left, and what it cannot reach."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import LydianError
from tests.privileges import needs_bubbles
from worker import caging
from worker.cage import KEPT, Person, View, Wish, at_home, bubble, environment, limits, ways
from worker.caging import Cage, LeftOddError, open_cage, outermost

ROOT = Path(__file__).resolve().parent.parent
NOBODY = Person("nobody", 65_534, 65_534, (65_534,))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start a process as another user")

# ---------------------------------------------------------------- variables


def test_the_child_gets_what_computing_needs_and_no_secret() -> None:
    given = {
        "PATH": "/bin", "HOME": "/home/a", "LANG": "C", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "2",
        "PYTORCH_CUDA_ALLOC_CONF": "x", "HF_HOME": "/hf", "http_proxy": "http://proxy:3128", "NO_PROXY": "localhost",
        "LYDIAN_TOKEN": "t", "LYDIAN_URL": "u", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "h", "GITHUB_TOKEN": "g",
        "SSH_AUTH_SOCK": "/s", "HTTPS_PROXY": "http://ada:secret@proxy:3128", "DATABASE_URL": "d",
        "XDG_SESSION_ID": "1",
    }  # fmt: skip
    kept = environment(given)
    assert set(kept) == {
        "PATH", "HOME", "LANG", "LC_ALL", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
        "HF_HOME", "http_proxy", "NO_PROXY", "CUDA_DEVICE_ORDER", "PYTHONHASHSEED",
    }  # fmt: skip
    assert (kept["PYTHONHASHSEED"], kept["CUDA_DEVICE_ORDER"]) == ("0", "PCI_BUS_ID")


def test_an_owner_lets_a_variable_through_but_never_one_of_ours() -> None:
    given = {"HF_TOKEN": "h", "LYDIAN_TOKEN": "t", "CUDA_DEVICE_ORDER": "FASTEST_FIRST", "PYTHONHASHSEED": "7"}
    assert environment(given, ("HF_TOKEN", "LYDIAN_TOKEN", "ABSENT")) == {
        "HF_TOKEN": "h", "CUDA_DEVICE_ORDER": "FASTEST_FIRST", "PYTHONHASHSEED": "0"
    }  # fmt: skip
    with pytest.raises(LydianError, match="LYDIAN_TOKEN: no child gets that"):
        open_cage(Wish(environment=("LYDIAN_TOKEN",)), Path("unused"), {})


@given(
    st.text(alphabet="ABCDEFGHIKLMNOPQRSTUVWXYZ_", max_size=12), st.sampled_from(["TOKEN", "SECRET", "PASSWORD", "KEY"])
)
def test_no_pattern_of_kept_variables_begins_with_a_wildcard_so_strangers_stay_out(name: str, what: str) -> None:
    assert not any(pattern.startswith("*") for pattern in KEPT)
    assert f"QX_{name}_{what}" not in environment({f"QX_{name}_{what}": "v"})


def test_a_child_with_a_home_of_its_own_has_no_way_named_to_its_users() -> None:
    assert at_home({"HOME": "/root", "TMPDIR": "/root/tmp", "USER": "root", "PATH": "/bin"}, "/cage/home") == {
        "HOME": "/cage/home", "XDG_CACHE_HOME": "/cage/home/.cache", "PATH": "/bin"
    }  # fmt: skip


# ---------------------------------------------------------------- the command line of bubblewrap

VIEW = View(
    links={"/lib": "usr/lib"}, readable=["/usr", "/srv/data"], within=["/srv/data/state/own"], devices=["/dev/nvidia0"],
    hidden="/srv/data/state", lent="/srv/data/state/cage/in", own=["/srv/data/state/cage/home"],
    home="/srv/data/state/cage/home", caches={"/c": "/srv/data/state/cage/home/c"}, network=False,
)  # fmt: skip


def test_the_state_folder_is_hidden_after_what_shows_it_and_before_what_is_lent_of_it() -> None:
    line = bubble(["python"], VIEW, None)
    data, hidden = line.index("/srv/data"), line.index("/srv/data/state")
    assert data < line.index("--tmpfs", line.index("/dev/nvidia0")) < line.index("/srv/data/state/cage/in")
    assert hidden < line.index("/srv/data/state/own")
    assert line[line.index("/srv/data/state/cage/in") - 1] == "--ro-bind"
    assert line[line.index("/srv/data/state/cage/home") - 1] == "--bind"
    assert line[-2:] == ["--", "python"]


def test_all_namespaces_but_the_asked_for_network_are_the_sandboxs_own() -> None:
    line = bubble(["python"], VIEW, None)
    for name in ("user", "pid", "ipc", "uts", "net"):
        assert f"--unshare-{name}" in line
    assert line[line.index("--cap-drop") + 1] == "ALL"
    with_net = View(**{**VIEW.__dict__, "network": True})
    assert "--unshare-net" not in bubble(["python"], with_net, None)


def test_root_becomes_another_user_before_the_program_starts() -> None:
    line = bubble(["python"], VIEW, NOBODY)
    assert line[line.index("--") + 1 :][:3] == ["setpriv", "--reuid=65534", "--regid=65534"]
    assert line[-2:] == ["--", "python"]


def test_ways_and_outermost_paths() -> None:
    assert ways(["/a/b/c", "/a/d", "/tmp/x"]) == ["/a", "/a/b"]
    assert outermost(["/a/b", "/usr/lib/x", "/a", "/ab", "/a"], covered=["/usr"]) == ["/a", "/ab"]


def test_processes_are_counted_only_where_they_are_the_childs_alone() -> None:
    assert limits("none", memory=0) == {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 65_536}
    assert limits("user", memory=5)["RLIMIT_NPROC"] == 4_096
    assert limits("bwrap", memory=5)["RLIMIT_AS"] == 5


def test_limits_hold_for_the_process_and_are_never_raised() -> None:
    program = (
        "import sys, json, resource; sys.path.insert(0, sys.argv[1]); import task_cage\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 60))\n"
        "task_cage.enter(json.dumps({'RLIMIT_CORE': 0, 'RLIMIT_NOFILE': 50, 'RLIMIT_NONE': 1}))\n"
        "new = [line for line in open('/proc/self/status') if line.startswith('NoNewPrivs')]\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_NOFILE), new[0].split()[1])"
    )
    ended = subprocess.run([sys.executable, "-I", "-c", program, str(ROOT / "worker")], capture_output=True, text=True)
    assert ended.stdout == "(0, 0) (40, 50) 1\n", ended.stderr


# ---------------------------------------------------------------- what passes


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    place = folder / "work" / "job.train.1.0.1"
    place.mkdir(parents=True)
    (place / "indices.npy").write_bytes(b"indices")
    (folder / "models").mkdir()
    (folder / "models" / "m.safetensors").write_bytes(b"model")
    (folder / "identity.json").write_bytes(b"credential")
    return folder


@pytest.fixture
def cage(state: Path) -> Cage:
    made = Cage("bwrap", state, Wish("bwrap"), None, ())
    made.prepare()
    return made


def train(state: Path) -> dict[str, object]:
    place = state / "work" / "job.train.1.0.1"
    return {
        "do": "train", "seed": 1, "base": str(state / "models/m.safetensors"), "indices": str(place / "indices.npy"),
        "out": str(place / "update.safetensors"), "checkpoint": str(place / "checkpoint"), "optimizer_from": "",
        "optimizer": str(place / "optimizer"), "correction": None,
    }  # fmt: skip


def test_a_command_is_told_in_paths_of_the_cage_and_what_was_made_comes_to_its_place(state: Path, cage: Cage) -> None:
    command = train(state)
    told = cage.lend(command)
    assert (told["do"], told["seed"], told["optimizer_from"], told["correction"]) == ("train", 1, "", None)
    assert Path(told["base"]).read_bytes() == b"model"
    assert Path(told["indices"]).read_bytes() == b"indices"
    for name in ("base", "indices", "out", "checkpoint", "optimizer"):
        assert Path(told[name]).is_relative_to(state / "cage")
    Path(told["out"]).write_bytes(b"update")
    Path(told["checkpoint"]).write_bytes(b"so far")
    cage.take(command)
    cage.have_back()
    update = Path(str(command["out"]))
    assert (update.read_bytes(), stat.S_IMODE(update.stat().st_mode)) == (b"update", 0o600)
    assert not Path(str(command["optimizer"])).exists()  # it made none
    assert [path for path in (state / "cage").rglob("*") if path.is_file()] == []


def test_a_checkpoint_outlives_the_child_as_long_as_its_work_is_held(state: Path, cage: Cage) -> None:
    told = cage.lend(train(state))
    Path(told["checkpoint"]).write_bytes(b"so far")
    cage.have_back()  # it failed
    cage.prepare()  # another child
    assert Path(cage.lend(train(state))["checkpoint"]).read_bytes() == b"so far"
    shutil.rmtree(state / "work" / "job.train.1.0.1")
    cage.prepare()
    assert list((state / "cage" / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "other name", "pipe", "folder"])
def test_what_is_no_plain_file_of_the_childs_is_not_taken(kind: str, state: Path, cage: Cage) -> None:
    command = train(state)
    left = Path(cage.lend(command)["out"])
    secret = state / "identity.json"
    if kind == "link":
        left.symlink_to(secret)
    elif kind == "other name":
        left.hardlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(left)
    else:
        left.mkdir()
    with pytest.raises(LeftOddError, match="not a file of its own"):
        cage.take(command)
    assert not Path(str(command["out"])).exists()
    assert secret.read_bytes() == b"credential"


def test_without_a_sandbox_commands_stay_as_they_are(state: Path) -> None:
    cage = Cage("none", state, Wish(), None, ())
    cage.prepare()
    command = train(state)
    assert cage.lend(command) is command
    cage.take(command)
    cage.have_back()
    assert {path.name for path in (state / "cage").iterdir()} == {"home"}
    assert stat.S_IMODE(cage.home.stat().st_mode) == 0o700
    cage.clear()
    assert not cage.home.exists()


# ---------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        (Wish("user"), "needs --child-user"),
        (Wish("bwrap", "no-such-user"), "no such user|only root"),
        (Wish("none", "nobody"), "counts with --sandbox|only root"),
        (Wish("bwrap", "root"), "is root|only root"),
    ],
)
def test_wishes_that_do_not_go_together_are_refused_in_a_sentence(wish: Wish, sentence: str, state: Path) -> None:
    with pytest.raises(LydianError, match=sentence) as caught:
        open_cage(wish, state, {})
    assert caught.value.code == "bad_sandbox"


@needs_root
@needs_bubbles
def test_root_is_not_let_into_bubblewrap_as_root(state: Path) -> None:
    with pytest.raises(LydianError, match="root is root in a sandbox too"):
        open_cage(Wish("bwrap"), state, {})


def test_a_machine_without_bubblewrap_says_so_and_auto_goes_on_without(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(LydianError, match="there is no program bwrap"):
        open_cage(Wish("bwrap"), state, {})
    assert open_cage(Wish("auto"), state, {}).sandbox == "none"
    assert "run without a sandbox: --sandbox bwrap does not work here" in caplog.text


# ---------------------------------------------------------------- what code in there can do

ATTACK = """
import json, os, resource, socket, sys
state, agent, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
got = []
def attempt(name, act):
    try:
        act()
    except OSError:
        return
    got.append(name)
attempt("credential", lambda: open(f"{state}/identity.json").read())
attempt("models", lambda: open(f"{state}/models/m.safetensors").read())
attempt("state", lambda: open(f"{state}/trusted.txt", "a"))
attempt("lent", lambda: open(f"{state}/cage/in/x", "w"))
attempt("agent's variables", lambda: open(f"/proc/{agent}/environ").read())
attempt("agent's memory", lambda: open(f"/proc/{agent}/mem", "rb").read(0))
attempt("agent", lambda: os.kill(agent, 0))
attempt("own", lambda: open("x", "w"))
attempt("out", lambda: open(f"{state}/cage/out/x", "w"))
resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
forks = 0
try:
    while forks < 1000:
        if os.fork() == 0:
            os.setsid()
            os.closerange(0, 3)
            os.execve("/bin/sleep", ["sleep", "3600"], {})
        forks += 1
except BlockingIOError:
    pass
print(json.dumps([got, forks]))
"""


@pytest.fixture
def passable() -> Iterator[Path]:
    """A state folder that another user can be let into: pytest's own folders let nobody pass."""
    folder = Path(tempfile.mkdtemp(prefix="lydian-cage-"))
    folder.chmod(0o711)
    state = folder / "state"
    (state / "models").mkdir(parents=True)
    (state / "models" / "m.safetensors").write_bytes(b"model")
    (state / "identity.json").write_bytes(b"credential")
    (state / "identity.json").chmod(0o600)
    yield state
    shutil.rmtree(folder)


def attack(cage: Cage, python: str, most: int) -> tuple[list[str], int]:
    """What the code gets at, and how many processes it may start before it is refused."""
    cage.prepare()
    state = str(cage.folder.parent)
    program = cage.command([python, "-I", "-c", ATTACK, state, str(os.getpid()), str(most)])
    ended = subprocess.run(
        program, env=cage.environment(os.environ), cwd=cage.home, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, timeout=120, **cage.identity(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    got, forks = json.loads(ended.stdout)
    return got, forks


@needs_bubbles
def test_code_in_bubblewrap_gets_at_its_own_folders_and_starts_no_more_processes_than_it_may(passable: Path) -> None:
    cage = open_cage(Wish("bwrap", "nobody" if os.geteuid() == 0 else None), passable, {})
    got, forks = attack(cage, sys.executable, 40)
    assert got == ["own", "out"]
    assert forks < 40


@needs_root
def test_code_of_another_user_gets_at_its_own_folders_and_starts_no_more_processes_than_it_may(
    passable: Path,
) -> None:
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip(f"needs {python}, which another user can run")
    user = Person("nobody", 65_431, 65_431, (65_431,))  # of nobody at all: whoever else runs is not counted
    cage = Cage("user", passable, Wish("user"), user, ())
    try:
        got, forks = attack(cage, python, 40)
        assert got == ["own", "out"]
        assert forks < 40
    finally:
        cage.clear()
    seen = psutil.process_iter(["uids", "status"])  # passes over one that ends while it is looked at
    left = [process for process in seen if process.info["uids"].real == user.uid]
    assert not [process for process in left if process.info["status"] != psutil.STATUS_ZOMBIE]


def test_the_agent_keeps_its_memory_and_first_variables_from_its_own_user() -> None:
    program = (
        "import ctypes; from worker.caging import keep_to_itself\n"
        "keep_to_itself(); print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "0\n"
    assert caging.PR_SET_DUMPABLE == 4

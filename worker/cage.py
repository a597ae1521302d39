"""What of this machine the child that trains gets to see: which variables, and in a sandbox which files. Pure.

    sandbox   who the child is        what it sees
    none      the worker's user       what that user may; a folder of its own to work in
    user      another user (root's)   what that user may; its folder, and each file that a command names
    bwrap     in namespaces of its    the system and Python read-only, the data that is offered, likewise the files of
              own, without network    the command; its folder; no process, socket or device but those named below

Whatever the sandbox, the child has no token, no address of the coordinator and no variable that is not listed here.
worker.caging carries it out; worker/task_cage.py is what the child does to itself before it runs a task file.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from common.fitness import PCI_ORDER

Sandbox = Literal["none", "user", "bwrap"]

KEPT = (
    # who and where
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TZDIR", "TMPDIR", "XDG_CACHE_HOME",
    "XDG_DATA_HOME", "XDG_RUNTIME_DIR",
    # which Python, which libraries
    "PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONUSERBASE", "PYTHONDONTWRITEBYTECODE", "PYTHONMALLOC",
    "PYTHONFAULTHANDLER", "PYTHONWARNINGS", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "DYLD_*", "MALLOC_*", "FAKETIME*", "CC", "CXX",
    # how it computes
    "CUDA_*", "CUDNN_*", "CUBLAS_*", "NVIDIA_*", "NCCL_*", "GLOO_*", "TORCH_*", "TORCHINDUCTOR_*", "TORCHDYNAMO_*",
    "PYTORCH_*", "TRITON_*", "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "VECLIB_*", "ATEN_*",
    "HIP_*", "HSA_*", "ROCR_*", "ROCM_*", "MIOPEN_*", "GPU_*", "ZE_*", "ONEAPI_*", "SYCL_*",
    # where libraries keep data, never with what key
    "HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "SKLEARN_SITE_JOBLIB", "MPLCONFIGDIR",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""Variables that the child has of the worker's, as a shell matches them. Any other one needs `--child-env NAME`."""
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
"""Likewise, in either case, if there is no user and password in it."""
FIXED = {"PYTHONHASHSEED": "0"}  # sets of strings iterate alike on every worker

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/sys")
"""What of the system is shown in bwrap; one that is a link stays one."""
SETTINGS = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "passwd", "group", "nsswitch.conf", "hosts", "localtime", "timezone",
    "ssl", "ca-certificates", "pki", "alternatives", "mime.types", "OpenCL", "vulkan", "nvidia",
)  # fmt: skip
"""What of /etc is. Not the rest: an owner's user may read more there than a task has to know."""
NETWORK_SETTINGS = ("resolv.conf", "host.conf", "gai.conf", "services", "protocols")
DEVICES = ("nvidia*", "dri", "kfd", "dxg", "accel")
"""What of /dev is, beside what every program needs: GPUs."""
PROCESSES = 4_096  # and threads, where the limit can count the child's alone


@dataclass(frozen=True)
class Wish:
    """What the worker's owner decided."""

    sandbox: Literal["none", "user", "bwrap", "auto"] = "none"
    user: str | None = None  # whom the child is
    network: bool = False  # in bwrap: leave it the machine's network
    memory: int = 0  # bytes of address space that each process of the child may have; 0: no limit
    environment: tuple[str, ...] = ()  # variables that it has besides KEPT


@dataclass(frozen=True)
class View:
    """What a child in bwrap sees. Paths are absolute; what is not there is left out."""

    links: Mapping[str, str]  # path -> where it points to
    readable: Sequence[str]  # the same path inside
    within: Sequence[str]  # likewise, of what lies in `hidden`
    devices: Sequence[str]
    hidden: str  # the worker's state folder: empty, whatever above shows it
    lent: str  # readable
    own: Sequence[str]  # folders that it may write
    home: str
    caches: Mapping[str, str]  # readable: path -> path inside
    network: bool


def environment(given: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The child's environment, as long as the sandbox changes nothing of it.

    Args:
        given: the worker's.
        more: names that its owner lets through; one that begins with LYDIAN_ never is.
    """
    kept = {name: value for name, value in given.items() if is_kept(name, value) or name in set(more)}
    cards = {} if "CUDA_DEVICE_ORDER" in kept else {"CUDA_DEVICE_ORDER": PCI_ORDER}  # as nvidia-smi counts them
    return {**cards, **{name: value for name, value in kept.items() if not name.startswith("LYDIAN_")}, **FIXED}


def is_kept(name: str, value: str) -> bool:
    """Whether a variable is no secret, as far as its name and value tell."""
    if name.lower() in PROXIES:
        return "@" not in value
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in KEPT)


def at_home(variables: Mapping[str, str], home: str) -> dict[str, str]:
    """The environment of a child that has a home folder of its own, and /tmp for what is short-lived."""
    moved = {"TMPDIR", "XDG_RUNTIME_DIR", "XDG_DATA_HOME", "USER", "LOGNAME", "PYTHONUSERBASE"}
    kept = {name: value for name, value in variables.items() if name not in moved}
    return {**kept, "HOME": home, "XDG_CACHE_HOME": f"{home}/.cache"}


@dataclass(frozen=True)
class Person:
    """A user of this machine."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


def bubble(program: Sequence[str], view: View, person: Person | None) -> list[str]:
    """The command line of bubblewrap that runs a program in this view.

    What comes later on the line covers what came before: so the state folder is hidden in whatever data folder holds
    it, and what is lent of it shown again. All capabilities are dropped.

    Args:
        program: what is run.
        view: what it sees.
        person: whom root makes it before it starts: the machine's root would be root in any sandbox, whose files in
            /proc obey it. None: this process is not root's, and the sandbox has a user namespace of its own.
    """
    line = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    line += ["--unshare-user"] if person is None else []
    line += [] if view.network else ["--unshare-net"]
    line += ["--die-with-parent", "--cap-drop", "ALL"]
    if person is not None:
        line += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        program = [*become(person), *program]
    line += ["--dev", "/dev", "--proc", "/proc"]
    for path in ("/dev/shm", "/tmp"):  # noqa: S108 - its own
        line += ["--perms", "1777", "--tmpfs", path]
    line += passable(ways([*view.readable, view.hidden]))
    for path, target in view.links.items():
        line += ["--symlink", target, path]
    for path in view.readable:
        line += ["--ro-bind", path, path]
    for path in view.devices:
        line += ["--dev-bind", path, path]
    inside = [path for path in (*view.within, view.lent, *view.own) if path != view.hidden]
    line += ["--tmpfs", view.hidden, *passable(path for path in ways(inside) if path.startswith(f"{view.hidden}/"))]
    for path in (*view.within, view.lent):
        line += ["--ro-bind", path, path] if path != view.hidden else []
    for path in view.own:
        line += ["--bind", path, path]
    for path, shown_at in view.caches.items():
        line += ["--ro-bind", path, shown_at]
    return [*line, "--remount-ro", view.hidden, "--remount-ro", "/", "--chdir", view.home, "--", *program]


def ways(paths: Iterable[str]) -> list[str]:
    """The folders that lead to these paths, outer ones first."""
    parts = [path.strip("/").split("/")[:-1] for path in paths]
    found = {"/" + "/".join(folders[: length + 1]) for folders in parts for length in range(len(folders))}
    return sorted(found - {"/tmp"})  # noqa: S108 - which is made already


def passable(folders: Iterable[str]) -> list[str]:
    """What has bubblewrap make these folders, so that not only root can pass them."""
    return [word for path in folders for word in ("--perms", "0755", "--dir", path)]


def become(person: Person) -> list[str]:
    """What before a command line has root run it as another user, for good; of util-linux."""
    groups = ",".join(map(str, person.groups))
    return [
        "setpriv",
        f"--reuid={person.uid}",
        f"--regid={person.gid}",
        f"--groups={groups}",
        "--inh-caps=-all",
        "--no-new-privs",
        "--",
    ]


def limits(sandbox: Sandbox, *, memory: int) -> dict[str, int]:
    """Limits that the child sets itself (setrlimit): name -> value.

    Args:
        sandbox: what it is in. Without one, all that its user runs anywhere would be counted with it.
        memory: bytes of address space; 0: no limit.
    """
    found = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 65_536}
    return (
        found | ({"RLIMIT_NPROC": PROCESSES} if sandbox != "none" else {}) | ({"RLIMIT_AS": memory} if memory else {})
    )

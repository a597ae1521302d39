"""What the doctor asks: this machine, the network, the coordinator. Each question has a limit of time.

Decides nothing: what is found goes to judging.py.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from client.doctor.judging import Requirement, requirement
from client.running import python_module
from common.errors import LydianError
from common.messages import MachineProbe

PROBE_S = 400.0  # for two training processes to load torch from a cold disk (worker.child waits 180 s for each)
NAME_S = 5.0  # for a name to become an address
CONNECT_S = 5.0  # for a connection
CALL_S = 10.0  # for an answer of the coordinator

ROOT = Path(__file__).resolve().parent.parent.parent
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")
PORTS = {"http": 80, "https": 443}
CHILD_ENV = "LYDIAN_CHILD_ENV"  # which variables a training process has besides: the probe starts one
IP_MTU, IPV6_MTU = 14, 24  # linux/in.h, linux/in6.h: what the kernel knows of the path's MTU


# ---------------------------------------------------------------- this machine


def requirements() -> list[Requirement]:
    """What this version of the project asks for: a clone's pyproject.toml, or the metadata of an install."""
    project = ROOT / "pyproject.toml"
    if not project.is_file():
        return [requirement(line) for line in importlib.metadata.requires("lydian-training") or []]
    named = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = named["optional-dependencies"].items()
    lines = [*named["dependencies"], *(f"{line}; extra == '{name}'" for name, lines in extras for line in lines)]
    return [requirement(line) for line in lines]


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """Name -> version of each package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def has_module(name: str) -> bool:
    """Whether it could be imported."""
    return importlib.util.find_spec(name) is not None


@dataclass(frozen=True)
class Disk:
    """A state folder, tried."""

    folder: str
    free: int  # bytes
    fsync_s: float | None  # None: the folder is not there yet, and could be made


def try_disk(folder: Path) -> Disk:
    """Write a small file into the folder and have it on the disk; a folder that is not there is not made.

    Raises:
        OSError: it cannot be written, or not be made.
    """
    if not folder.exists():
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(f"{above} may not be written by this user")
        return Disk(str(folder), shutil.disk_usage(above).free, None)
    probe = folder / f".doctor-{os.getpid()}"
    try:
        began = time.monotonic()
        with probe.open("wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        took = time.monotonic() - began
    finally:
        with contextlib.suppress(OSError):  # it could not be written either
            probe.unlink(missing_ok=True)
    return Disk(str(folder), shutil.disk_usage(folder).free, took)


def probe(device: str) -> MachineProbe:
    """Have `python -m worker.probe` look at the GPUs and run a kernel in a training process.

    Raises:
        LydianError: it cannot be started, or its answer not be read.
    """
    command = python_module("worker.probe", ["--device", device])
    environment = {
        name: value for name, value in os.environ.items() if name == CHILD_ENV or not name.startswith("LYDIAN_")
    }
    try:
        ended = subprocess.run(
            command, env=environment, cwd=Path.cwd(), capture_output=True, text=True, timeout=PROBE_S, check=False
        )
        return MachineProbe.model_validate_json(ended.stdout)
    except subprocess.TimeoutExpired as error:
        raise LydianError(
            f"the look at this machine's GPUs and torch did not end within {PROBE_S:g} s",
            code="probe_failed",
            advice="see whether `nvidia-smi` answers; where it hangs, restart the machine",
        ) from error
    except ValidationError as error:
        last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "it said nothing")
        raise LydianError(
            f"the look at this machine's GPUs and torch ended with exit code {ended.returncode}: {last.strip()}",
            code="probe_failed",
            advice="install the packages anew",
        ) from error


# ---------------------------------------------------------------- the way to the coordinator


@dataclass(frozen=True)
class Place:
    """Where a coordinator is looked for."""

    url: str

    @property
    def host(self) -> str:
        """Its name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Its port."""
        parts = urlsplit(self.url)
        return parts.port or PORTS[parts.scheme]

    @property
    def proxy(self) -> str | None:
        """The proxy that calls go through, as the environment says; None: there is none."""
        scheme = urlsplit(self.url).scheme
        proxies = urllib.request.getproxies()
        found = proxies.get(scheme) or proxies.get("all")
        return None if found is None or urllib.request.proxy_bypass(self.host) else found


def resolve(place: Place) -> list[str]:
    """The addresses that a name stands for.

    Raises:
        OSError: none, or no answer in time.
    """
    answers: queue.Queue[list[str] | OSError] = queue.Queue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(each[4][0]) for each in found)))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="resolver", daemon=True).start()  # a resolver has no limit of time of its own
    try:
        answer = answers.get(timeout=NAME_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {NAME_S:g} s") from None
    if isinstance(answer, OSError):
        raise answer
    return answer


def connect(place: Place) -> None:
    """Make a connection and close it.

    Raises:
        OSError: it is refused, or not made in time.
    """
    socket.create_connection((place.host, place.port), timeout=CONNECT_S).close()


def path_mtu(place: Place) -> int | None:
    """Bytes that a packet to the coordinator may have, as far as this kernel knows; None where it does not tell."""
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError):
        family, _, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect(address)  # sends nothing
            if family == socket.AF_INET6:
                return probe_socket.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
            return probe_socket.getsockopt(socket.IPPROTO_IP, IP_MTU)
    return None


def congestion_control() -> str | None:
    """How this machine's TCP answers lost packets, such as cubic; None where the system does not tell."""
    try:
        return CONGESTION.read_text(encoding="ascii").strip()
    except OSError:
        return None


def worker_credential(folders: Iterable[Path], place: Place) -> tuple[str, Path] | None:
    """A worker's own token at this coordinator, with the pins behind it, and the file that has them.

    worker/identity.py writes those files.

    Args:
        folders: state folders in which a worker may live.
        place: the coordinator's.
    """
    parts = urlsplit(place.url)
    host = f"[{place.host}]" if ":" in place.host else place.host
    key = f"{parts.scheme}://{host}:{place.port}{parts.path.rstrip('/')}"
    for folder in folders:
        path = folder / "identity.json"
        # none, or one that only its worker can mend
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            known = json.loads(path.read_bytes())["coordinators"][key]
            pins = f"@{known['pin']}" if known.get("pin") else ""
            return f"{known['credential']}{pins}", path
    return None

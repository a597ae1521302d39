"""What the doctor makes of what was asked: numbers and answers in, findings out.

Pure: no network, disk, clock or process. Every limit is here, with its reason.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from client import shown
from client.doctor.findings import Finding, Side, of_fit
from common import fitness
from common.errors import ForbiddenError, LydianError
from common.messages import Link, MachineProbe, VersionView
from common.tailscale import EXPIRY_WARNING, Peer, TailscaleStatus

OLDEST_PYTHON = (3, 11)
NEWEST_FOR_LEGACY = (3, 13)  # the last Python that torch 2.7.1 has a build for
LOW_MEMORY = 1 << 30  # bytes; torch alone takes half of it
LOW_DISK, LEAST_DISK = 5 << 30, 256 << 20  # bytes; a few versions of a small model; nothing of use
SLOW_FSYNC_S = 0.5  # a coordinator waits for a few of them a round
SKEWED_S = 30.0  # between two clocks; nothing is decided by them, logs are read by them
SLOW_LINE = 1.25e6  # bytes a second, 10 Mbit/s: 100 MB take more than a minute
LONG_LINE_S = 0.03  # of latency, from which on a lossy path starves a loss-based congestion control
LEAST_MTU = 1280  # bytes, of IPv6 and of a tailnet


# ---------------------------------------------------------------- this machine


def python(version: tuple[int, int], shown_version: str, executable: str, program: str) -> Finding:
    """Whether this Python will do."""
    sentence = f"Python {shown_version}, lydian {program} in {executable}"
    if version < OLDEST_PYTHON:
        return _say("machine", "python", "failure", sentence, "install Python 3.11 or newer")
    return _say("machine", "python", "ok", sentence)


@dataclass(frozen=True)
class Requirement:
    """One package that the project asks for."""

    name: str
    clauses: tuple[tuple[str, tuple[int, ...]], ...]  # (operator, version)
    extra: str  # of which set it is; empty: of what every part needs

    def allows(self, version: str) -> bool:
        """Whether an installed version will do. What stands behind + (2.7.1+cpu) names the build and does not count."""
        have = release(version)
        if not have:
            return False
        return all(_holds(have, operator, wanted) for operator, wanted in self.clauses)

    def __str__(self) -> str:
        wanted = ",".join(operator + ".".join(map(str, version)) for operator, version in self.clauses)
        return f"{self.name}{wanted}"


def requirement(line: str) -> Requirement:
    """A line of the project's own metadata, which has floors, exact versions and upper ends, and extras as markers."""
    text, _, marker = line.partition(";")
    parsed = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)", text)
    assert parsed is not None  # noqa: S101 - every line names a package
    clauses = re.findall(r"(>=|<=|==|<|>)\s*([0-9.]+)", parsed[2])
    extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", marker)
    return Requirement(
        parsed[1],
        tuple(sorted((operator, release(version)) for operator, version in clauses)),
        extra[1] if extra else "",
    )


def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at the end: 2.14.1+cpu is (2, 14, 1)."""
    parsed = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in parsed[0].split(".")] if parsed else []
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _holds(have: tuple[int, ...], operator: str, wanted: tuple[int, ...]) -> bool:
    return {"==": have == wanted, ">=": have >= wanted, "<=": have <= wanted, "<": have < wanted}.get(
        operator, have > wanted
    )


def packages(
    requirements: Sequence[Requirement], installed: Mapping[str, str | None], extra: str, file: str
) -> Finding:
    """Whether the packages of one part are there, and new enough.

    Args:
        requirements: the project's.
        installed: name -> version; None: it is not installed.
        extra: which part's; empty: what every part needs.
        file: the requirements file that brings them.
    """
    side: Side = "training" if extra in FILES_OF_TRAINING else "machine"
    what = {"": "base", "server": "coordinator"}.get(extra, "worker")
    wanted = [one for one in requirements if one.extra == extra]
    wrong = [f"{one.name} is missing" for one in wanted if installed.get(one.name) is None]
    for one in wanted:
        version = installed.get(one.name)
        if version is not None and not one.allows(version):
            wrong.append(f"{one.name} is {version}, and {one} is needed")
    check = f"packages, {what}"
    if wrong:
        return _say(side, check, "failure", "; ".join(wrong), f"pip install -r {file}")
    return _say(side, check, "ok", f"{shown.several(len(wanted), 'package')} as {file} asks for")


FILES_OF_TRAINING = {"new-gpu": fitness.NEW.file, "legacy-gpu": fitness.LEGACY.file}


def training_set(requirements: Sequence[Requirement], installed: Mapping[str, str | None], file: str) -> str:
    """Which of the two worker sets is installed: the one whose torch is; where none is, the one that the cards want."""
    for extra in FILES_OF_TRAINING:
        torches = [one for one in requirements if one.extra == extra and one.name == "torch"]
        version = installed.get("torch")
        if version is not None and any(one.allows(version) for one in torches):
            return extra
    return next(extra for extra, name in FILES_OF_TRAINING.items() if name == file)


def memory(total: int, available: int) -> Finding:
    """Whether there is memory for anything. In bytes."""
    sentence = f"{shown.size(available)} of {shown.size(total)} memory are free"
    if available < LOW_MEMORY:
        return _say(
            "machine", "memory", "warning", sentence, "end what is not needed: a training process takes 1 GB and up"
        )
    return _say("machine", "memory", "ok", sentence)


def disk(folder: str, free: int, fsync_s: float | None) -> Finding:
    """Whether the state folder has room and a disk that writes.

    Args:
        folder: of the state.
        free: bytes.
        fsync_s: seconds that a small file took to be on the disk; None: the folder is still to be made.
    """
    took = "" if fsync_s is None else f", a write is on the disk in {fsync_s * 1e3:.0f} ms"
    sentence = f"{shown.size(free)} free for {folder}{took}"
    if free < LEAST_DISK:
        return _say("machine", "disk", "failure", sentence, "make room, or name another folder with --state-dir")
    if free < LOW_DISK:
        return _say("machine", "disk", "warning", sentence, "make room: models and updates are kept there")
    if fsync_s is not None and fsync_s > SLOW_FSYNC_S:
        return _say("machine", "disk", "warning", sentence, "use a local disk that is faster, with --state-dir")
    return _say("machine", "disk", "ok", sentence)


def no_disk(folder: str, why: str) -> Finding:
    """The state folder cannot be written."""
    sentence = f"the state folder {folder} cannot be used: {why}"
    return _say("machine", "disk", "failure", sentence, "name a folder that this user may write with --state-dir")


# ---------------------------------------------------------------- training here


def chosen(probe: MachineProbe, device: str, environment: Mapping[str, str]) -> fitness.Choice | None:
    """What a worker would train on; None where there is no torch to train with.

    Args:
        probe: what `python -m worker.probe` found with that device.
        device: that the worker is asked to train on.
        environment: of the worker: CUDA_VISIBLE_DEVICES counts.
    """
    if probe.build is None:
        return None
    seen = fitness.visible(probe.inventory.gpus, environment)
    return fitness.choose(device, probe.inventory, probe.build, seen=seen, broke=probe.failure or None)


def training(probe: MachineProbe, device: str, choice: fitness.Choice, tried: MachineProbe) -> list[Finding]:
    """GPUs, torch and kernel of this machine.

    Args:
        probe: what `python -m worker.probe` found with the device.
        device: that a worker is asked to train on.
        choice: what it would train on.
        tried: what was found there; the same probe where that is the device asked for.
    """
    assert probe.build is not None  # noqa: S101 - a choice was made
    gpus = [of_fit("training", "gpu", fitness.fit(gpu, probe.build)) for gpu in probe.inventory.gpus]
    if not gpus:
        gpus = [_of_absence(probe)]
    elif probe.inventory.reason:
        gpus.append(_say("training", "gpu", "warning", probe.inventory.reason, "look at what nvidia-smi says of it"))
    if choice.device is not None and choice.device.startswith("cuda"):  # it trains on another card all the same
        gpus = [one.model_copy(update={"verdict": "warning"}) if one.verdict == "failure" else one for one in gpus]
    return [*gpus, _kernel(tried, device if tried is probe else choice.device or device), _device(device, choice, gpus)]


def _of_absence(probe: MachineProbe) -> Finding:
    return of_fit("training", "gpu", fitness.absence(probe.inventory))


def no_build(probe: MachineProbe, *, has_torch: bool, python: tuple[int, int]) -> list[Finding]:
    """There is no torch that a training process could load.

    Args:
        probe: what `python -m worker.probe` found.
        has_torch: whether the package torch is installed.
        python: its version.
    """
    file = fitness.file_for(probe.inventory.gpus)
    if has_torch:
        broken = _say("training", "torch", "failure", probe.failure, f"install torch anew: pip install -r {file}")
        return [broken] if probe.inventory.gpus else [_of_absence(probe), broken]
    if not probe.inventory.gpus:
        sentence = "there is no torch: this machine can serve, submit and watch, and not train"
        found = [_say("training", "torch", "ok", sentence)]
        return found if probe.inventory.missing == "no_library" else [_of_absence(probe), *found]
    names = ", ".join(fitness.label(gpu) for gpu in probe.inventory.gpus)
    fix = f"pip install -r {file}"
    if file == fitness.LEGACY.file and python > NEWEST_FOR_LEGACY:
        fix = f"{fix}, with Python 3.13 at most: its torch has no build for a newer one"
    return [_say("training", "torch", "warning", f"there is no torch, so {names} cannot train", fix)]


def _kernel(tried: MachineProbe, device: str) -> Finding:
    if tried.failure or tried.build is None:
        fix = "do what the line of that GPU says; where it says nothing, restart the machine"
        return _say("training", "kernel", "failure", f"no kernel ran on {device}: {tried.failure}", fix)
    what = f"torch {tried.build.version} (CUDA {tried.build.cuda or 'none'})"
    return _say("training", "kernel", "ok", f"a kernel of {what} ran on {tried.build.device} in a training process")


def _device(asked: str, choice: fitness.Choice, gpus: Sequence[Finding]) -> Finding:
    """What `lydian work --device` would do."""
    command = f"`lydian work --device {asked}`"
    if choice.fit.code == "broken_device" and choice.device is None:
        sentence = f"{command} refuses, since no kernel runs there"
        return _say("training", "device", "failure", sentence, "name another one, or --device cpu")
    if choice.device is None:
        return _say("training", "device", "failure", f"{command} refuses: {choice.fit.sentence}", choice.fit.fix)
    sentence = f"{command} trains on {choice.device}"
    if not choice.fit.sentence:
        return _say("training", "device", "ok", sentence)
    if choice.fit.sentence in (gpu.sentence for gpu in gpus):
        fix = f"do what the line of the GPU says; --device {choice.device} says that this is meant"
        return _say("training", "device", "warning", f"{sentence}, for want of a better one", fix)
    return _say("training", "device", "warning", f"{sentence}: {choice.fit.sentence}", choice.fit.fix)


# ---------------------------------------------------------------- the coordinator


def no_address(host: str, why: str) -> Finding:
    """Its name is not known here."""
    fix = "use its address (on a tailnet `tailscale ip -4` there prints it), or see whether MagicDNS is on"
    return _say("coordinator", "address", "failure", f"{host} cannot be resolved: {why}", fix)


def no_connection(url: str, why: str, *, refused: bool) -> Finding:
    """Nothing takes a connection there."""
    fix = (
        "start it there with `lydian serve`, and paste the URL that it prints"
        if refused
        else "see whether that machine is on and in the same network, and its port is let through"
    )
    return _say("coordinator", "connection", "failure", f"{url} takes no connection: {why}", fix)


def nobody_named(url: str) -> Finding:
    """No coordinator was named, and none is at the usual place."""
    sentence = f"no coordinator was named, and none is at {url}, so the way to it was not checked"
    return _say("coordinator", "connection", "warning", sentence, "lydian doctor URL")


def version(theirs: VersionView, ours: VersionView) -> Finding:
    """Whether the two sides understand each other. A coordinator serves its own protocol and the one before."""
    both = (
        f"the coordinator has lydian {theirs.version} (protocol {theirs.protocol}), "
        f"this machine {ours.version} (protocol {ours.protocol})"
    )
    if theirs.protocol < ours.protocol:
        return _say("coordinator", "version", "failure", both, "upgrade the coordinator")
    if theirs.protocol > ours.protocol + 1:
        return _say("coordinator", "version", "failure", both, "upgrade this machine")
    if (theirs.protocol, theirs.version) != (ours.protocol, ours.version):
        older = (
            "this machine" if theirs.protocol > ours.protocol or theirs.version > ours.version else "the coordinator"
        )
        return _say("coordinator", "version", "warning", both, f"upgrade {older} soon")
    return _say("coordinator", "version", "ok", both)


def clock(ahead_s: float) -> Finding:
    """How far this machine's clock is ahead of the coordinator's, in seconds."""
    if abs(ahead_s) < SKEWED_S:
        return _say("coordinator", "clock", "ok", f"this clock and the coordinator's differ by {abs(ahead_s):.0f} s")
    way = "ahead of" if ahead_s > 0 else "behind"
    sentence = f"this clock is {shown.duration(abs(ahead_s))} {way} the coordinator's (only the times in logs suffer)"
    return _say("coordinator", "clock", "warning", sentence, "sudo timedatectl set-ntp true, on whichever is wrong")


def token(given: str | None, where: str, answer: LydianError | None) -> Finding:
    """What the coordinator says of the token.

    Args:
        given: the token; None: there is none.
        where: it was found.
        answer: to a call that takes the token of whoever may read; None: it was taken.
    """
    if given is None:
        sentence = "no token was given or found, so neither it nor the line was tried"
        return _say("coordinator", "token", "warning", sentence, "set LYDIAN_TOKEN")
    if answer is None:
        kind = {"read": "may read", "submit": "may submit jobs"}.get(_scope(given), "is an admin's")
        return _say("coordinator", "token", "ok", f"the token {where} {kind}")
    if isinstance(answer, ForbiddenError):
        kind = {"join": "lets a worker join", "work": "is a worker's"}.get(_scope(given), "is known")
        return _say("coordinator", "token", "ok", f"the token {where} {kind}")
    return _say(
        "coordinator", "token", "failure", f"the token {where} does not count: {answer}", answer.advice.rstrip(".")
    )


def _scope(given: str) -> str:
    return given.split("_")[1] if given.count("_") >= 3 else ""


def line(link: Link) -> Finding:
    """What the line to the coordinator carries."""
    sentence = (
        f"{shown.line_rate(link.down)} down, {shown.line_rate(link.up)} up, by one connection; "
        f"{shown.latency(link.latency_s)} a call"
    )
    if min(link.down, link.up) < SLOW_LINE:
        fix = "send less: aggregation.update = int8 or int4, more local steps a round"
        return _say("coordinator", "line", "warning", sentence, fix)
    return _say("coordinator", "line", "ok", sentence)


def congestion(link: Link, control: str) -> Finding | None:
    """Whether another congestion control would pay: far away and slow, where lost packets count as congestion."""
    if control == "bbr" or link.latency_s < LONG_LINE_S or link.up > 5 * SLOW_LINE:
        return None
    sentence = f"the line is long ({shown.latency(link.latency_s)}) and slow, and this machine sends by {control}"
    fix = "sudo sysctl net.core.default_qdisc=fq net.ipv4.tcp_congestion_control=bbr"
    return _say("coordinator", "congestion", "warning", sentence, fix)


def stalled(url: str, error: LydianError, mtu: int | None) -> Finding:
    """Small calls get through, and a body of 64 kB or more does not: large packets are lost on the way."""
    known = f", and packets of up to {mtu} bytes are sent" if mtu else ""
    sentence = f"small calls reach {url}, and larger ones stall{known} ({error})"
    fix = "a smaller MTU on the way is the likely cause: sudo sysctl net.ipv4.tcp_mtu_probing=1, on both machines"
    return _say("coordinator", "line", "failure", sentence, fix)


def mtu(bytes_a_packet: int) -> Finding:
    """How large a packet to the coordinator may be."""
    sentence = f"packets to the coordinator may have {bytes_a_packet} bytes"
    if bytes_a_packet < LEAST_MTU:
        fix = f"set the MTU of that interface to {LEAST_MTU} or more: a tailnet needs it"
        return _say("coordinator", "mtu", "warning", sentence, fix)
    return _say("coordinator", "mtu", "ok", sentence)


# ---------------------------------------------------------------- the tailnet


def tailnet(status: TailscaleStatus | None, why_none: str, *, now: datetime, needed: bool) -> list[Finding]:
    """Where this machine's tailscaled stands.

    Args:
        status: what it says; None: there is none.
        why_none: for that.
        now: aware, the wall clock.
        needed: whether the coordinator's address is one of a tailnet.
    """
    if status is None:
        if not needed:
            return [_say("tailnet", "tailscale", "ok", f"not in use: {why_none}")]
        sentence = f"the coordinator's address is a tailnet's, and here is {why_none}"
        return [
            _say("tailnet", "tailscale", "failure", sentence, "install Tailscale, and log in with `sudo tailscale up`")
        ]
    if status.state != "Running":
        fix = "sudo tailscale up"
        sentence = f"tailscaled is in state {status.state}"
        return [_say("tailnet", "tailscale", "failure" if needed else "warning", sentence, fix)]
    address = status.addresses[0] if status.addresses else "no address yet"
    name = f" as {status.name}" if status.name else ""
    mode = "" if status.tun else ", in userspace mode: set HTTP_PROXY to reach others (docs/tailscale.md)"
    running = _say("tailnet", "tailscale", "ok", f"running, {address}{name}{mode}")
    return [running, _key(status.key_expiry, now)]


def path(address: str, peer: Peer) -> Finding:
    """How packets to the coordinator travel.

    Args:
        address: the coordinator's, on the tailnet.
        peer: that machine, as this one's tailscaled knows it.
    """
    if peer.direct:
        return _say("tailnet", "path", "ok", f"packets to {address} go directly, to {peer.direct}")
    if not peer.peer_relay and not (peer.relay and peer.active):
        return _say("tailnet", "path", "ok", f"how packets to {address} travel is not known yet: few were sent")
    by = f"another machine ({peer.peer_relay})" if peer.peer_relay else f"a relay in {peer.relay} (DERP)"
    fix = "let UDP port 41641 through at one of the two ends"
    return _say("tailnet", "path", "warning", f"packets to {address} go through {by}, which is slow", fix)


def _key(expiry: datetime | None, now: datetime) -> Finding:
    """When this machine leaves the tailnet unless somebody logs in again."""
    if expiry is None:
        return _say("tailnet", "key", "ok", "this machine's key does not expire")
    days = (expiry - now) / timedelta(days=1)
    if expiry - now > EXPIRY_WARNING:
        return _say("tailnet", "key", "ok", f"this machine's key is valid for {days:.0f} days")
    when = f"expires in {days:.1f} days" if days > 0 else f"expired {-days:.1f} days ago"
    sentence = f"this machine's key {when}, and it is cut off then"
    fix = "sudo tailscale up --force-reauth, or disable key expiry for it in the admin console"
    return _say("tailnet", "key", "warning" if days > 0 else "failure", sentence, fix)


def _say(side: Side, check: str, verdict: fitness.Verdict, sentence: str, fix: str = "") -> Finding:
    return Finding(side=side, check=check, verdict=verdict, sentence=sentence, fix=fix)

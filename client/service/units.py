"""The text of a systemd unit, from the few values that differ between machines. Pure: no disk, process or clock.

    Service ──unit_text──▶ what is written, and what deploy/*.service show
       ▲                        │
       └──────program_line──────┘   what an installed unit runs, read back

ExecStart is written with the prefix `:`, so that systemd expands no variable in it: a dollar sign is one.

Source: systemd.service(5), COMMAND LINES; systemd.syntax(7), QUOTING; systemd.unit(5), SPECIFIERS.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from common.errors import LydianError

MARK = "# Written by `lydian install-service`"
STOP_ROOM_S = 30  # beyond a worker's grace, for a last try to hand in
GRACE_S = 60.0  # of `lydian work` unless its options say more
SERVE_STOP_S = 30  # seconds; a coordinator ends within ten

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "%": "%%", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_ESCAPED = re.compile(r"%%|\\x([0-9a-f]{2})|\\(.)")
_UNESCAPED = {"n": "\n", "t": "\t", "r": "\r"}


class Side(StrEnum):
    """What runs as a service."""

    serve = "serve"
    work = "work"

    @property
    def role(self) -> str:
        """What it is called."""
        return "coordinator" if self is Side.serve else "worker"

    @property
    def default_unit(self) -> str:
        """The unit's name unless another is asked for."""
        return f"lydian-{self.role}"


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service. Paths are absolute."""

    side: Side
    unit: str  # its name, without .service
    program: str  # the `lydian` of the Python environment that it runs in
    options: tuple[str, ...]  # of `lydian serve` or `lydian work`, the coordinator's URL among them; no secret
    state: str  # folder
    settings: str  # EnvironmentFile: LYDIAN_* settings, and a worker's join token until it has joined
    user: str | None  # whom a system unit runs as; None: a unit of the user's own manager
    grace_s: float = GRACE_S  # of a worker, to finish what is under way
    in_home: bool = False  # the program lies in somebody's home folder, so a system unit must see those

    @property
    def file_name(self) -> str:
        """Of the unit's file."""
        return f"{self.unit}.service"


def unit_text(service: Service) -> str:
    """The whole unit file.

    Raises:
        LydianError: a name or path that systemd cannot be told (code bad_unit).
    """
    check_name(service.unit)
    paragraphs = [_head(service), _process(service), _hardening(service), _install(service)]
    return "\n\n".join("\n".join(lines) for lines in paragraphs) + "\n"


def check_name(unit: str) -> None:
    """Let only names pass that are a unit's, a folder's and a user's alike.

    Raises:
        LydianError: bad_unit.
    """
    if not _NAME.fullmatch(unit) or unit.endswith(".service"):
        raise LydianError(
            f"{unit!r} cannot be a service's name",
            code="bad_unit",
            advice="Letters, digits, dashes, dots and underscores, without .service: e.g. lydian-worker-2.",
        )


def program_line(text: str) -> list[str]:
    """What a unit that was written here runs: the program and its arguments; empty where there is no such line."""
    for line in text.split("\n"):  # not splitlines: an option may hold one of the other line ends
        if line.startswith("ExecStart="):
            words = split(line.removeprefix("ExecStart="))
            return [words[0].removeprefix(":"), *words[1:]] if words else []
    return []


# ---------------------------------------------------------------- quoting


def quote(word: str) -> str:
    """One word of a command line or of a list of paths, so that systemd reads it as it is.

    Raises:
        LydianError: bad_unit, it is not text that systemd reads (bytes that are not UTF-8, noncharacters, NUL).
    """
    _check_text(word)
    if _PLAIN.fullmatch(word):
        return word
    escaped = (_ESCAPES.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 0x20 or ord(c) == 0x7F else c) for c in word)
    return f'"{"".join(escaped)}"'


def split(line: str) -> list[str]:
    """The words that `quote` wrote, separated by spaces."""
    return [_unescape(found[1]) if found[1] is not None else found[2] for found in _WORD.finditer(line)]


def _unescape(text: str) -> str:
    def plain(found: re.Match[str]) -> str:
        if found[1] is not None:
            return chr(int(found[1], 16))
        return "%" if found[2] is None else _UNESCAPED.get(found[2], found[2])

    return _ESCAPED.sub(plain, text)


def _check_text(word: str) -> None:
    for c in word:
        code = ord(c)
        if code == 0 or 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
            raise LydianError(
                f"{word!r} has a character that cannot stand in a unit file: U+{code:04X}",
                code="bad_unit",
                advice="Rename what it names; systemd reads UTF-8 alone.",
            )


def _bare_path(path: str) -> str:
    """A path that has a line for itself, which knows no quotes."""
    _check_text(path)
    if path != path.strip() or any(ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        raise _no_path(path)
    return path.replace("%", "%%")


def _program(path: str) -> str:
    """The first word of ExecStart; systemd refuses quotes and backslashes in it, escaped or not."""
    if any(c in "\"'\\" or ord(c) < 0x20 or ord(c) == 0x7F for c in path):
        raise _no_path(path)
    return quote(f":{path}")


def _no_path(path: str) -> LydianError:
    return LydianError(
        f"systemd cannot be told of a path like {path!r}: it has quotes, a backslash, control characters, or a space "
        "at an end",
        code="bad_unit",
        advice="Install into a folder with a simpler name, such as /opt/lydian.",
    )


# ---------------------------------------------------------------- the paragraphs


def _head(service: Service) -> list[str]:
    about = [
        f"{MARK}; run it again to change it.",
        f"# Additions of your own: systemctl {'' if service.user else '--user '}edit {service.unit}",
        "[Unit]",
        f"Description=LydianAI distributed training: {service.side.role}",
    ]
    if service.user:
        about += [
            "# Until tailscaled has an address there is none to bind. Neither of its units has to exist.",
            "Wants=network-online.target",
            "After=network-online.target tailscaled.service tailscale-online.target",
        ]
    return [
        *about,
        "# Restarts as often as it takes: each side waits for the other.",
        "StartLimitIntervalSec=0",
    ]


def _process(service: Service) -> list[str]:
    command = [service.side.value, *_url_first(service), "--state-dir", service.state, *_further(service)]
    line = " ".join([_program(service.program), *(quote(word) for word in command)])
    serves = service.side is Side.serve
    return [
        "[Service]",
        *(_ready_when_it_says_so() if serves else ["Type=exec"]),
        *_whose(service),
        "# LYDIAN_* settings, one NAME=VALUE a line" + ("" if serves else "; the join token, until it has joined"),
        f"EnvironmentFile=-{_bare_path(service.settings)}",
        f"ExecStart={line}",
        "Restart=always",
        "RestartSec=5",
        *(_ends_of_a_coordinator() if serves else _ends_of_a_worker(service.grace_s)),
    ]


def _url_first(service: Service) -> tuple[str, ...]:
    return service.options[:1] if service.side is Side.work else ()


def _further(service: Service) -> tuple[str, ...]:
    return service.options[1:] if service.side is Side.work else service.options


def _ready_when_it_says_so() -> list[str]:
    return [
        "# It says itself when it listens, once its state is loaded, however long that takes.",
        "Type=notify",
        "TimeoutStartSec=infinity",
    ]


def _whose(service: Service) -> list[str]:
    if service.user is None:
        return []
    lines = [
        "# A user of its own, so that training code on the same machine cannot read the admin token."
        if service.side is Side.serve
        else "# A user of its own: training code reads what all may read, and writes to its own folders.",
        f"User={service.user}",
    ]
    if service.state == f"/var/lib/{service.unit}":
        lines += [f"StateDirectory={service.unit}", "StateDirectoryMode=0700"]
    else:
        lines += [f"ReadWritePaths={quote(service.state)}"]
    if service.side is Side.work:
        cache = f"/var/cache/{service.unit}"
        lines += [
            f"CacheDirectory={service.unit}",
            "# Data sets and compiled kernels go to the cache folder: home folders are read-only here.",
            f"Environment=HOME={cache} XDG_CACHE_HOME={cache}",
        ]
    return lines


def _ends_of_a_coordinator() -> list[str]:
    return [
        "# Wrong usage stays wrong.",
        "RestartPreventExitStatus=2",
        f"TimeoutStopSec={SERVE_STOP_S}",
        "# A round is folded from all its updates at once: one open file an update.",
        "LimitNOFILE=65536",
    ]


def _ends_of_a_worker(grace_s: float) -> list[str]:
    return [
        "# Starting again would not help. 2: wrong usage stays wrong. 4: another machine works with this worker's",
        "# credential, from a copied state folder. 5: its torch does not run on the GPU.",
        "RestartPreventExitStatus=2 4 5",
        f"# SIGTERM goes to the agent, which finishes what it does within --grace ({grace_s:g} s) or hands it back;",
        "# what is left is killed.",
        "KillMode=mixed",
        f"TimeoutStopSec={int(-(-grace_s // 1)) + STOP_ROOM_S}",
        "# Whoever sits at this machine goes first.",
        "Nice=10",
        "# Running out of memory in a user's model must not take the agent with it.",
        "OOMPolicy=continue",
    ]


def _hardening(service: Service) -> list[str]:
    return [*_reason(service), "UMask=0077", "NoNewPrivileges=yes", *_by_root(service), *_BY_ANYBODY]


def _reason(service: Service) -> list[str]:
    if service.user is None:
        return [
            "# What systemd can do without root. Closing folders needs root or user namespaces, which many systems",
            "# refuse: a service here may read and write what its user may.",
        ]
    if service.side is Side.serve:
        return ["# The coordinator computes with numpy and writes its state folder; it needs nothing else here."]
    return [
        "# Training code needs the GPU, hence neither PrivateDevices nor ProtectClock, which closes /dev as a side",
        "# effect; and it may compile kernels, hence no MemoryDenyWriteExecute. It writes to its own folders alone.",
    ]


def _by_root(service: Service) -> list[str]:
    if service.user is None:
        return []
    hidden = service.side is Side.serve and not service.in_home
    return [
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        f"ProtectHome={'yes' if hidden else 'read-only'}",
        "PrivateTmp=yes",
        *(["PrivateDevices=yes", "ProtectProc=invisible", "ProtectClock=yes"] if service.side is Side.serve else []),
        "ProtectHostname=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "RemoveIPC=yes",
    ]


_BY_ANYBODY = (
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "# Unix sockets: tailscaled is asked for this machine's addresses over one. Netlink: the list of interfaces.",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "# A refused call is an error that gets a traceback, not a kill.",
    "SystemCallErrorNumber=EPERM",
)


def _install(service: Service) -> list[str]:
    return ["[Install]", f"WantedBy={'multi-user.target' if service.user else 'default.target'}"]

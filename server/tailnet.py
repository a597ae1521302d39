"""The tailnet around the coordinator: who calls, over which path, and whether a credential is where it was given to.

    a worker's call ──▶ admit ──whois──▶ tailscaled     server.paths judges; a machine is asked for once a minute
    registration    ──▶ joined: pins the machine to the worker, in the journal
    watch, refresh  ──status──▶ tailscaled              paths of all workers, the keys' ends, this machine's addresses

A machine without Tailscale costs a look for a socket that is not there. Nothing of it is asked on the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ForbiddenError, UnavailableError
from common.messages import TailnetPath
from common.pins import Pins
from common.tailscale import TailscaleStatus, Whois, expiry_warning, tailscale_status, whois
from server import paths
from server.paths import Verdict
from server.store import Journal

ASKED_EVERY_S = 60.0  # for one machine, or one connection from loopback
AGAIN_S = 2.0  # for one that tailscaled could not tell of
TOLD = 4096  # answers kept, before the old ones are forgotten
FRESH_S = 5.0  # a status that was asked for so long ago is shown
WARNED_EVERY_S = 86_400.0  # of this machine's key

log = logging.getLogger("lydian.tailnet")

Address = tuple[str, int]
"""A caller's end of a connection: address and port."""


@dataclass(frozen=True)
class Caller:
    """Where a worker called from last."""

    address: Address
    found: Whois
    verdict: Verdict


@dataclass
class Tailnet:
    """What is known of it. Made with the coordinator; `watch` runs as long as that."""

    socket: Path  # tailscaled's
    journal: Journal
    enforce: bool = True  # refuse a credential that comes from another machine, else only warn
    every_s: float = 60.0  # between two looks at the status
    clock: Callable[[], float] = time.monotonic
    status: TailscaleStatus | None = None
    why_none: str = "not asked yet"
    pin: str | None = None  # this machine's StableID, where workers reach it over the tailnet
    certificate: str | None = None  # sha256.… of the coordinator's, where tokens name it

    def __post_init__(self) -> None:
        self.callers: dict[str, Caller] = {}  # worker id -> its last call that was let in
        self.refused: dict[str, Caller] = {}  # worker id -> the last that came from somewhere else
        self.on_status: Callable[[TailscaleStatus], Awaitable[None]] | None = None
        self._asked_at = -FRESH_S
        self._warned_at = -WARNED_EVERY_S
        self._pins = self.journal.pins()  # worker id -> the machine that its credential was given to
        self._told: dict[Address, tuple[Whois, float]] = {}  # what tailscaled said, and when, in monotonic seconds
        self._paths: dict[str, TailnetPath] = {}  # worker id -> the path that was logged last
        self._said: dict[str, str] = {}  # worker id -> what was logged of its last call

    # ------------------------------------------------------------ who calls

    async def admit(self, worker_id: str, address: Address) -> None:
        """Let a worker's call pass, if it comes from where its credential was given to.

        Raises:
            ForbiddenError: it comes from somewhere else (`wrong_node`), and that is to be refused.
            UnavailableError: tailscaled cannot say where it comes from (`cannot_verify`).
        """
        caller = await self._caller(worker_id, address)
        if self.enforce and caller.verdict.code:
            raise _refusal(caller.verdict)

    def node_of(self, worker_id: str) -> str:
        """Name of the machine of the tailnet that the worker's last call came from; empty where that is not known."""
        caller = self.callers.get(worker_id)
        return caller.found.node.name if caller is not None and caller.found.node is not None else ""

    async def _caller(self, worker_id: str, address: Address) -> Caller:
        """Who makes a call with a worker's credential, and whether that is as it should be. Remembers it."""
        found, before = await self._whois(address), self.callers.get(worker_id)
        if before is not None and before.address[0] == address[0] and not found.asked:
            found = found if paths.is_loopback(address[0]) else before.found  # tailscaled does not answer now: it did
        caller = Caller(address, found, paths.judge(self._pins.get(worker_id), address[0], found))
        if caller.verdict.code:
            self.refused[worker_id] = caller
        elif (wrong := self.refused.get(worker_id)) is not None and wrong.verdict.code == "cannot_verify":
            del self.refused[worker_id]
        if not (caller.verdict.code and self.enforce):
            self.callers[worker_id] = caller
        self._say(worker_id, caller)
        return caller

    def _say(self, worker_id: str, caller: Caller) -> None:
        said = caller.verdict.sentence or (paths.shown(caller.found.node) if caller.found.node else "")
        if said and self._said.get(worker_id) != said:
            self._said[worker_id] = said
            log.log(logging.WARNING if caller.verdict.code else logging.INFO, "%s calls: %s", worker_id, said)

    async def _whois(self, address: Address) -> Whois:
        """Whose an address is. The port counts on loopback alone, where userspace networking brings everybody."""
        host, port = address if paths.is_loopback(address[0]) else (address[0], 0)
        now = self.clock()
        known = self._told.get((host, port))
        if known is not None and now - known[1] < (ASKED_EVERY_S if known[0].asked else AGAIN_S):
            return known[0]
        if not self.socket.exists():
            return Whois(None, f"no tailscaled on {self.socket}", asked=False)
        found = await asyncio.to_thread(whois, host, port, self.socket)
        if len(self._told) >= TOLD:
            self._told = {which: told for which, told in self._told.items() if now - told[1] < ASKED_EVERY_S}
        self._told[host, port] = (found, now)
        return found

    async def joined(self, worker_id: str, address: Address) -> None:
        """A worker has registered: from now on its credential is good from this machine, where that can be told."""
        caller = await self._caller(worker_id, address)
        node = caller.found.node
        if worker_id in self._pins or node is None:
            return
        self.journal.worker_pinned(worker_id, node)
        self._pins[worker_id] = node
        log.info("%s joined from %s, and its credential is pinned to it", worker_id, paths.shown(node))

    def pinned(self, token: str) -> str:
        """A token that tells who gets it which machine of the tailnet, and which certificate, it must find here."""
        return Pins(self.pin, self.certificate).behind(token)

    def unpin(self, worker_id: str) -> None:
        """Let a worker come from another machine: its next registration says from which."""
        if self._pins.pop(worker_id, None) is not None:
            self.journal.worker_pinned(worker_id, None)
        self.refused.pop(worker_id, None)

    # ------------------------------------------------------------ how they are reached

    async def refresh(self, older_s: float = FRESH_S) -> None:
        """Ask for the status, unless that was done less than so many seconds ago."""
        if self.clock() - self._asked_at < older_s:
            return
        self._asked_at = self.clock()
        if not self.socket.exists():
            self.status, self.why_none = None, f"no tailscaled on {self.socket}"
            return
        before = self.why_none
        found = await asyncio.to_thread(tailscale_status, self.socket, patience_s=0.0, peers=True)
        self.status, self.why_none = found
        if self.status is None and self.why_none != before:
            log.info("how workers are reached is not known now: %s", self.why_none)

    async def watch(self) -> None:
        """Look at the status every so often: warn before this machine's key ends, and tell who wants to know."""
        while True:
            await self.refresh(0.0)
            if self.status is not None:
                self._warn_of_key(self.status)
                self._say_paths(self.status)
                if self.on_status is not None:
                    await self.on_status(self.status)
            await asyncio.sleep(self.every_s)

    def _say_paths(self, status: TailscaleStatus) -> None:
        """Log the way to a worker when it changes."""
        for worker_id, caller in self.callers.items():
            path = paths.path_to(caller.address[0], caller.found.node, status)
            if path.kind in ("unknown", "other", "loopback") or self._paths.get(worker_id) == path:
                continue
            self._paths[worker_id] = path
            level = logging.INFO if path.kind == "direct" else logging.WARNING
            log.log(level, "the path to %s: %s by %s", worker_id, path.kind, path.via)

    def _warn_of_key(self, status: TailscaleStatus) -> None:
        warning = expiry_warning(status, now=datetime.now(UTC))
        if warning is not None and self.clock() - self._warned_at >= WARNED_EVERY_S:
            self._warned_at = self.clock()
            log.warning("%s", warning)


def _refusal(verdict: Verdict) -> ForbiddenError | UnavailableError:
    if verdict.code == "wrong_node":
        return ForbiddenError(
            verdict.sentence,
            code="wrong_node",
            advice="If that machine was set up anew, `lydian readmit WORKER` lets it come back; if this is another "
            "one, give it its own --state-dir and a join token.",
        )
    return UnavailableError(
        verdict.sentence,
        code="cannot_verify",
        advice="Start Tailscale on the coordinator's machine, or the coordinator with LYDIAN_NODE_PIN=warn.",
    )

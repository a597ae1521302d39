"""Calls without a token from machines of the tailnet, where the operator switched that on (server.login has the rules).

    GET without Authorization ──may_log_in──▶ whois ──scope_of──▶ Principal of that scope, named after its owner

Where a call comes from is the kernel's word; X-Forwarded-For is never read. A caller from loopback is asked for each
time, since its port may be another program's a moment later; others once a minute.
"""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from common.tailscale import Person, person
from server.login import Rules, may_log_in, scope_of
from server.paths import is_loopback
from server.tokens import Principal

ASKED_EVERY_S = 60.0  # for one machine: a grant that is taken back counts so long
TOLD = 1024  # answers kept
PREFIX = "tailnet:"  # of what stands in place of a token's id


class Logins:
    """Who of the tailnet may read without a token."""

    def __init__(self, rules: Rules, capability: str, socket: Path) -> None:
        """Ask nobody yet.

        Args:
            rules: whose machines have which scope.
            capability: the name of the grants that count; empty: none does.
            socket: tailscaled's.
        """
        self._rules, self._capability, self._socket = rules, capability, socket
        self._told: dict[str, tuple[Person | None, float]] = {}

    async def principal(
        self, method: str, headers: Mapping[str, str], address: tuple[str, int], own_name: str | None
    ) -> Principal | None:
        """Who calls; None: nobody that may without a token.

        Args:
            method: of the call.
            headers: of the call, by names in lower case.
            address: the caller's end of the connection.
            own_name: this machine's full name in the tailnet; None: not known.
        """
        if not (self._rules or self._capability) or not may_log_in(method, headers, own_name):
            return None
        caller = await self._person(address)
        scope = scope_of(caller, self._rules, self._capability)
        if caller is None or scope is None:
            return None
        return Principal(scope, f"{PREFIX}{caller.stable_id}", None, caller.login or ", ".join(caller.tags))

    async def _person(self, address: tuple[str, int]) -> Person | None:
        host, port = address if is_loopback(address[0]) else (address[0], 0)
        now = time.monotonic()
        known = self._told.get(host)
        if port == 0 and known is not None and now - known[1] < ASKED_EVERY_S:
            return known[0]
        if not self._socket.exists():
            return None
        found = await asyncio.to_thread(person, host, port, self._socket)
        if port == 0 and found is not None:
            self._told = {} if len(self._told) >= TOLD else self._told
            self._told[host] = (found, now)
        return found

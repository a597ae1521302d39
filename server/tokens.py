"""The tokens of one coordinator: made, looked up, rotated, revoked. All in memory, each in the journal first.

    issue ──▶ counts ──revoke──▶ revoked            for ever
                 │ └──its time is over──▶ expired   by server.calendar, which no clock that leaps misleads
                 └─rotate──▶ counts, with a second secret ──first use of it, or the overlap is over──▶ the second alone

A worker's token is made when it joins, and does not age. A join that is said again, since its answer was lost, makes no
second worker and counts once.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from common.errors import (
    BadRequestError,
    ConflictError,
    DiskFullError,
    ForbiddenError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from common.messages import TokenState, TokenView
from common.pins import SUFFIX
from server.calendar import Calendar, shown
from server.store import Journal, Seen, StoredToken

Scope = Literal["read", "submit", "admin", "join", "work"]

SEEN_EVERY_S = 60.0  # between two times that last uses are kept: one commit for all of them
ASKED_EVERY_S = 30.0  # between two times that a worker is asked to fetch its second secret

_TOKEN = re.compile(rf"lyd_(read|submit|admin|join|work)_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}}){SUFFIX}")
_BEARER = re.compile(r"bearer +([^ ]+)", re.IGNORECASE)
_PUBLIC = re.compile(r"lyd_[a-z]+_([0-9a-f]{12})(?:_.*)?")

log = logging.getLogger("lydian.tokens")


@dataclass(frozen=True)
class Principal:
    """Who calls: the holder of one token."""

    scope: str
    token_id: str
    worker: str | None  # the worker's id, for a work token
    name: str = ""


class Tokens:
    """All tokens, and what each may still be used for."""

    def __init__(self, journal: Journal, calendar: Calendar | None = None) -> None:
        """Read the tokens of a journal.

        Args:
            journal: where they are kept.
            calendar: what time it is; None: by this machine's clocks.
        """
        self._journal = journal
        self._calendar = calendar or Calendar(time.time, _steady, journal.calendar_reached())
        self._seen, self._fresh = journal.tokens_seen(), dict[str, Seen]()
        self._kept_at = time.monotonic()
        self._asked_at: dict[str, float] = {}  # worker id -> monotonic seconds
        self._known: dict[str, StoredToken] = {}
        self._of_worker: dict[str, StoredToken] = {}
        self._reload()

    # ------------------------------------------------------------ made

    def issue(
        self,
        scope: Scope,
        worker: str | None = None,
        *,
        name: str = "",
        ttl_s: float | None = None,
        uses: int | None = None,
        labels: Sequence[str] = (),
        joining: Principal | None = None,
        claim: str | None = None,
    ) -> str:
        """Make a token. It is returned this once and kept nowhere.

        Args:
            scope: what it may do.
            worker: for `work`, and only for it: the worker's id.
            name: for people, to know it by.
            ttl_s: seconds that it counts; None: until it is revoked.
            uses: for `join`: how many workers it lets in; None: any number.
            labels: for `join`: what its workers are called.
            joining: for `work`: whose call it is that lets the worker in.
            claim: for `work`: who joins, as it will say it again.

        Raises:
            BadRequestError: a work token without a worker, or another one with.
            NotFoundError: there is no such worker.
        """
        if (scope == "work") != (worker is not None):
            raise BadRequestError(f"a token of scope {scope} for worker {worker}: a worker goes with scope work alone")
        let_in = self._known.get(joining.token_id) if joining is not None else None
        token_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        made = StoredToken(
            token_id,
            scope,
            _hash(secret),
            worker,
            name=name,
            expires=None if ttl_s is None else self._calendar.now() + ttl_s,
            uses=uses,
            labels=tuple(labels) if let_in is None else let_in.labels,
            joined_by=None if let_in is None else let_in.id,
            claim=claim,
        )
        self._known[token_id] = kept = self._journal.token_add(made)
        if kept.worker is not None:
            self._of_worker[kept.worker] = kept
        return _written(made, secret)

    # ------------------------------------------------------------ who calls

    def check(self, header: str | None, address: str = "") -> Principal:
        """Who sent this `Authorization` header.

        Args:
            header: as it came.
            address: where from; noted as the token's last use, unless empty.

        Raises:
            UnauthenticatedError: there is no token in it (`no_token`), or one that does not count (`bad_token`,
                `token_expired`).
        """
        if not header:
            raise UnauthenticatedError("the call came without a token", code="no_token")
        found = _BEARER.fullmatch(header.strip())
        parts = _TOKEN.fullmatch(found[1]) if found else None
        if parts is None:
            raise UnauthenticatedError("the Authorization header is not of the form 'Bearer lyd_SCOPE_ID_SECRET'")
        scope, token_id, secret = parts.groups()
        known, given, public = self._known.get(token_id), _hash(secret), f"lyd_{scope}_{token_id}_…"
        is_first = known is not None and hmac.compare_digest(known.secret_hash, given)
        is_next = known is not None and hmac.compare_digest(known.next_hash or "", given)
        if known is None or known.scope != scope or not (is_first or is_next):
            raise UnauthenticatedError(f"the token {public} is not known to this coordinator")
        if known.revoked_at is not None:
            raise UnauthenticatedError(f"the token {public} was revoked at {known.revoked_at}")
        if known.expires is not None and known.expires <= self._calendar.now():
            raise UnauthenticatedError(
                f"the token {public} counted until {shown(known.expires)}",
                code="token_expired",
                advice="Ask for a new one: `lydian token create` makes it, for whoever has an admin token.",
            )
        if is_next:
            self._take_second(known)
        elif known.overlap_until is not None and known.overlap_until <= self._calendar.now():
            raise UnauthenticatedError(
                f"the token {public} was rotated, and its first secret counted until {shown(known.overlap_until)}",
                advice="The second secret counts. A worker that has not fetched it joins anew, by a token that `lydian "
                "token join` makes.",
            )
        if address:
            self._note_use(token_id, address)
        return Principal(known.scope, known.id, known.worker, known.name)

    def _take_second(self, token: StoredToken) -> None:
        """The second secret was used: the first counts no more."""
        after = replace(token, secret_hash=token.next_hash or "", next_hash=None, overlap_until=None, renew=False)
        with suppress(DiskFullError, UnavailableError):  # then the first goes on counting, until the next use
            self._journal.token_put(after)
            self._reload()
            log.info("lyd_%s_%s_… was rotated: its first secret counts no more", token.scope, token.id)

    def counts(self, token_id: str) -> bool:
        """Whether a token counts now, by whichever of its secrets."""
        known = self._known.get(token_id)
        return known is not None and self._state(known, Counter()) == "counts"

    def check_worker(self, worker_id: str) -> None:
        """Let a worker go on whose call began before its token was revoked, if it was not.

        Raises:
            UnauthenticatedError: it was.
        """
        known = self._of_worker.get(worker_id)
        if known is not None and known.revoked_at is not None:
            raise UnauthenticatedError(f"the token lyd_work_{known.id}_… was revoked at {known.revoked_at}")

    def _note_use(self, token_id: str, address: str) -> None:
        """In memory; every so often all of it is kept. What a kill takes of it decides nothing."""
        at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self._seen[token_id] = self._fresh[token_id] = Seen(at, address)
        if time.monotonic() - self._kept_at >= SEEN_EVERY_S:
            self.keep_seen()

    def keep_seen(self) -> None:
        """Keep the last uses and the time that was reached; on a full disk later, since that is no reason to refuse."""
        self._kept_at = time.monotonic()
        with suppress(DiskFullError, UnavailableError):
            self._journal.keep_seen(self._fresh, self._calendar.reached())
            self._fresh.clear()

    # ------------------------------------------------------------ joining

    def joined_before(self, joining: Principal, claim: str) -> str | None:
        """The worker that this very join made before, if its answer was lost; None: it is a new one.

        Args:
            joining: the holder of a join token.
            claim: who joins.

        Raises:
            ForbiddenError: the token has let in as many as it may (`token_spent`).
        """
        let_in = [token for token in self._known.values() if token.joined_by == joining.token_id]
        for token in let_in:
            if token.claim == claim and token.id not in self._seen and token.revoked_at is None:
                return token.worker
        uses = self._known[joining.token_id].uses
        if uses is not None and len(let_in) >= uses:
            raise ForbiddenError(
                f"the token lyd_join_{joining.token_id}_… lets {uses} join, and as many have",
                code="token_spent",
                advice="`lydian token join` makes another one.",
            )
        return None

    def credential(self, worker_id: str, name: str, joining: Principal | None, claim: str) -> str | None:
        """What a worker that introduces itself is given to call with; None: it goes on with what it has.

        Args:
            worker_id: the worker's.
            name: what it is called.
            joining: whose call it is, where the worker comes with a join token; None: it comes with its own.
            claim: who joins.
        """
        known = self._of_worker.get(worker_id)
        if known is None:
            return self.issue("work", worker_id, name=name, joining=joining, claim=claim)
        if joining is not None or known.renew:  # either may be the one that was lost on the way
            return self._second(known, known.overlap_until)
        return None

    def is_to_renew(self, worker_id: str, now: float) -> bool:
        """Whether a worker is to be asked now to fetch its second secret, by introducing itself once more.

        Args:
            worker_id: the worker's.
            now: monotonic seconds.
        """
        known = self._of_worker.get(worker_id)
        if known is None or not known.renew or now - self._asked_at.get(worker_id, -ASKED_EVERY_S) < ASKED_EVERY_S:
            return False
        self._asked_at[worker_id] = now
        return True

    # ------------------------------------------------------------ rotated, revoked

    def rotate(self, token: StoredToken, overlap_s: float) -> str | None:
        """Let a second secret take the place of the first.

        Args:
            token: a join token is none of these: another one is as good.
            overlap_s: seconds that the first counts on, unless the second is used before. A worker that has not fetched
                its second by then has to join anew.

        Returns:
            The token with its second secret; None for a worker's, which fetches it by itself.

        Raises:
            ConflictError: the token counts no more (`token_dead`), or is a join token (`not_rotated`).
        """
        if token.scope == "join":
            raise ConflictError(
                f"lyd_join_{token.id}_… lets workers join, and is not rotated",
                code="not_rotated",
                advice="Make another one with `lydian token join`, and revoke this one.",
            )
        if not self.counts(token.id):
            raise ConflictError(
                f"lyd_{token.scope}_{token.id}_… counts no more, so there is nothing to rotate",
                code="token_dead",
                advice="`lydian token create` makes a new one.",
            )
        until = self._calendar.now() + overlap_s
        if token.worker is None:
            return self._second(token, until)
        self._journal.token_put(replace(token, renew=True, overlap_until=until))
        self._reload()
        self._asked_at.pop(token.worker, None)
        return None

    def _second(self, token: StoredToken, until: float | None) -> str:
        """Give a token a second secret, in place of another one that was never used; until when the first counts."""
        secret = secrets.token_urlsafe(32)
        self._journal.token_put(replace(token, next_hash=_hash(secret), overlap_until=until))
        self._reload()
        return _written(token, secret)

    def revoke(self, token_id: str) -> None:
        """Let a token count no more, from the next call on. Twice is once.

        Raises:
            NotFoundError: there is no such token.
            ConflictError: it is the only one left of scope admin (`last_admin`).
        """
        rest = [one for one in self._known.values() if one.scope == "admin" and one.id != token_id]
        known = self._known.get(token_id)
        if known is not None and known.scope == "admin" and not any(self.counts(one.id) for one in rest):
            raise ConflictError(
                f"lyd_admin_{token_id}_… is the only token of scope admin that counts: nobody could make another one",
                code="last_admin",
                advice="Rotate it instead: `lydian token rotate`.",
            )
        self._journal.token_revoke(token_id)
        self._reload()

    # ------------------------------------------------------------ shown

    def find(self, named: str) -> StoredToken:
        """A token by its id, the worker whose it is, or its name, if one alone that counts has that.

        Raises:
            NotFoundError: there is none (`unknown_token`).
            ConflictError: several that count have the name (`ambiguous_name`).
        """
        public = _PUBLIC.fullmatch(named)
        by_id = self._known.get(public[1] if public else named) or self._of_worker.get(named)
        if by_id is not None:
            return by_id
        found = [token for token in self._known.values() if token.name == named and self.counts(token.id)]
        if len(found) > 1:
            raise ConflictError(
                f"{len(found)} tokens are called {named}: {', '.join(token.id for token in found)}",
                code="ambiguous_name",
                advice="Name the one you mean by its id; `lydian token list` shows them.",
            )
        if not found:
            raise NotFoundError(
                f"there is no token {named[:40]!r} that counts",
                code="unknown_token",
                advice="`lydian token list --all` shows all there ever were.",
            )
        return found[0]

    def views(self) -> list[TokenView]:
        """All tokens as `lydian token list` shows them, oldest first."""
        joined = Counter(token.joined_by for token in self._known.values() if token.joined_by is not None)
        return [self._view(token, joined) for token in self._known.values()]

    def view(self, token_id: str) -> TokenView:
        """One token, likewise."""
        return next(view for view in self.views() if view.id == token_id)

    def first_until(self, token_id: str) -> str:
        """Until when the first secret of a token that was rotated counts, if the second is not used before."""
        until = self._known[token_id].overlap_until
        return shown(until) if until is not None else "the second is used"

    def labels_of(self, worker_id: str) -> tuple[str, ...]:
        """What a worker is called beside its name, by the token that let it in."""
        known = self._of_worker.get(worker_id)
        return known.labels if known is not None else ()

    def _view(self, token: StoredToken, joined: Counter[str]) -> TokenView:
        seen = self._seen.get(token.id)
        return TokenView(
            id=token.id,
            name=token.name,
            scope=token.scope,
            state=self._state(token, joined),
            created_at=token.created_at,
            expires_at=None if token.expires is None else shown(token.expires),
            revoked_at=token.revoked_at,
            uses=token.uses,
            joined=joined[token.id],
            labels=token.labels,
            worker=token.worker,
            rotating=token.renew or token.next_hash is not None,
            last_used_at=seen.at if seen else None,
            last_address=seen.address if seen else None,
        )

    def _state(self, token: StoredToken, joined: Counter[str]) -> TokenState:
        if token.revoked_at is not None:
            return "revoked"
        if token.expires is not None and token.expires <= self._calendar.now():
            return "expired"
        return "spent" if token.uses is not None and joined[token.id] >= token.uses else "counts"

    def _reload(self) -> None:
        self._known = {token.id: token for token in self._journal.tokens()}
        self._of_worker = {token.worker: token for token in self._known.values() if token.worker is not None}


def _steady() -> float:
    """Seconds that no setting of the clock changes; where the system tells, those of a machine asleep as well."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _written(token: StoredToken, secret: str) -> str:
    return f"lyd_{token.scope}_{token.id}_{secret}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()

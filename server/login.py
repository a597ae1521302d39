"""What a machine of the tailnet may do without a token, where the operator switched that on.

Pure: what tailscaled said comes in (common.tailscale), scopes go out. Everything fails closed: who is not named, is a
guest from another tailnet, or cannot be told, may do nothing.

    alice@example.com=submit, tag:screen=read     LYDIAN_LOGIN: whose machines, and their scope
    example.com/cap/lydian                        LYDIAN_LOGIN_CAPABILITY: what grants of the tailnet's policy call it,
                                                  with {"scopes": ["read"]}

A browser that runs a foreign page on such a machine calls without being asked. So a login is for reading alone, by GET,
without an Origin, and to a name that no foreign page can have: an address, or this machine's own name.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence

from common.tailscale import Person

SCOPES = ("read", "submit", "admin")  # each has what the ones before it have

_RULE = re.compile(r"((?:tag:)?[^\s=,]+)=(read|submit|admin)")
_LABEL = re.compile(r"[a-z0-9-]{1,63}")

Rules = Mapping[str, str]
"""Login name or tag -> scope."""


def parse_rules(text: str) -> Rules:
    """The rules of LYDIAN_LOGIN; none for an empty text.

    Raises:
        ValueError: a part is no rule, or names somebody a second time.
    """
    rules: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = _RULE.fullmatch(part)
        if found is None or found[1] in rules:
            raise ValueError(f"{part[:80]!r} is no rule, or the second for the same")
        rules[found[1]] = found[2]
    return rules


def scope_of(person: Person | None, rules: Rules, capability: str) -> str | None:
    """The greatest scope that the rules and grants give; None: none.

    Args:
        person: who calls; None: nobody that tailscaled knows.
        rules: the operator's.
        capability: the name of the grants that count; empty: none does.
    """
    if person is None or person.guest:
        return None
    names = person.tags or ((person.login,) if person.login else ())  # a tagged machine has no user
    given = {rules[name] for name in names if name in rules}
    given |= _granted(person.capabilities.get(capability, ())) if capability else set()
    return max(given, key=SCOPES.index) if given else None


def _granted(grants: Sequence[object]) -> set[str]:
    """The scopes of ours that the values of a capability name."""
    listed = [grant.get("scopes") for grant in grants if isinstance(grant, dict)]
    return {scope for scopes in listed if isinstance(scopes, list) for scope in scopes if scope in SCOPES}


def may_log_in(method: str, headers: Mapping[str, str], own_name: str | None) -> bool:
    """Whether a call could not have been made by a foreign page in a browser on the caller's machine.

    Args:
        method: of the call.
        headers: of the call, by names in lower case.
        own_name: this machine's full name in the tailnet; None: not known.
    """
    if method != "GET" or "origin" in headers:
        return False
    host = headers.get("host", "").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:  # a page's own name, made to stand for this address, has a dot in it
        return bool(_LABEL.fullmatch(name)) or (own_name is not None and name == own_name.lower())
    return True

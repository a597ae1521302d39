"""Where and how a coordinator runs: read once, at the start, from LYDIAN_* in the environment.

Only the names below are read; LYDIAN_URL and LYDIAN_TOKEN are for workers and clients.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from common.errors import LydianError
from common.places import coordinator_folder
from common.tailscale import SOCKET
from server.hosts import host_of
from server.login import parse_rules

PREFIX = "LYDIAN_"
OPTIONS = ("state_dir", "host", "port", "insecure", "allow_host")  # of `lydian serve`

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Bytes = Annotated[int, Field(ge=0, lt=2**53)]
Times = Annotated[int, Field(ge=1, le=1_000_000)]
Calls = Annotated[float, Field(ge=1, le=1_000_000)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]


def _listed(value: object) -> object:
    """What a variable of the environment lists."""
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _named(name: str) -> str:
    if host_of(name) is None:
        raise ValueError("it is neither a name nor an address")
    return name


Names = Annotated[tuple[Annotated[str, AfterValidator(_named)], ...], BeforeValidator(_listed)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Settings:
    """All that can be set; a value that is not allowed cannot be held. Each description says what is allowed."""

    state_dir: Folder = Field(default_factory=coordinator_folder, description="a folder")
    host: str = Field(default="127.0.0.1", min_length=1, max_length=255, description="the address to listen on")
    port: int = Field(default=8470, ge=0, le=65_535, description="a port from 1 to 65535, or 0 for any that is free")
    ttl_s: Seconds = Field(default=40.0, description="seconds above 0, of a worker's silence that end its lease")
    heartbeat_s: Seconds = Field(default=10.0, description="seconds above 0 between two heartbeats")
    poll_s: Seconds = Field(default=25.0, description="seconds above 0, the longest that a poll waits for work")
    body_idle_s: Seconds = Field(
        default=30.0, description="seconds above 0 without a byte that end a body or a download"
    )
    body_min_rate: Bytes = Field(default=4096, description="bytes a second, 0 or more, below which a body is too slow")
    reserve_bytes: Bytes = Field(default=64 << 20, description="bytes of disk, 0 or more, kept for the journal")
    max_model_bytes: Bytes = Field(default=64 << 30, description="bytes, 0 or more, that a new model may have")
    max_attempts: Times = Field(default=5, description="a number from 1 on: failures of one task that end its job")
    max_expiries: Times = Field(
        default=20, description="a number from 1 on: workers gone with one task that end its job"
    )
    strikes: Times = Field(default=3, description="a number from 1 on: refused results that set a worker aside")
    keep_models: Times = Field(default=5, description="a number from 1 on: newest models of a job that are kept")
    tailscaled: Folder = Field(default=SOCKET, description="the path of tailscaled's socket")
    tailnet_s: Seconds = Field(default=60.0, description="seconds above 0 between two looks at Tailscale's status")
    node_pin: Literal["enforce", "warn"] = Field(
        default="enforce", description="enforce or warn: what becomes of a worker's calls from another tailnet machine"
    )
    login: str = Field(
        default="",
        max_length=10_000,
        description="WHO=SCOPE, …: logins or tags of the tailnet whose machines may read without a token, and their "
        "scope (read, submit, admin); empty: nobody",
    )
    login_capability: str = Field(
        default="",
        max_length=255,
        pattern=r"^([A-Za-z0-9.-]+/[A-Za-z0-9./_-]+)?$",
        description="the name of grants of the tailnet that do the same, such as example.com/cap/lydian; empty: none",
    )
    insecure: bool = Field(
        default=False, description="true or false: speak plain HTTP on addresses where others may listen"
    )
    tls: str = Field(
        default="", max_length=4096, description="self-made, tailscale, or a file with the certificate in PEM"
    )
    tls_key: Folder | None = Field(default=None, description="a file with its key, where that is not in the same")
    allow_host: Names = Field(
        default=(), description="names or addresses without a port, by which calls may come beside its own ones"
    )
    calls_per_s: Calls = Field(default=200.0, description="a number from 1 on: calls a second that a token may make")
    calls_burst: Calls = Field(default=2_000.0, description="a number from 1 on: calls of a token at once")
    stranger_calls_per_s: Calls = Field(
        default=20.0, description="a number from 1 on: calls a second from one address without a token that counts"
    )
    stranger_calls_burst: Calls = Field(default=100.0, description="a number from 1 on: such calls at once")
    connections: Times = Field(default=4_096, description="a number from 1 on: connections at once from one address")
    uploads: Times = Field(
        default=2, description="a number from 1 on: uploads at once, and half-sent ones, of a worker"
    )
    streams: Times = Field(default=100, description="a number from 1 on: event streams at once of a token")
    jobs: Times = Field(default=1_000, description="a number from 1 on: jobs that are open at once")
    jobs_each: Times = Field(default=100, description="a number from 1 on: jobs of one token that are open at once")
    workers: Times = Field(default=10_000, description="a number from 1 on: workers that may join")
    report_bytes: Annotated[int, Field(ge=1_000, lt=2**53)] = Field(
        default=4 << 20, description="bytes, 1000 or more, that a worker's reports of an hour may have in the journal"
    )

    @field_validator("login")
    @classmethod
    def _logins_are_rules(cls, text: str) -> str:
        parse_rules(text)
        return text

    @model_validator(mode="after")
    def _one_beat_may_be_lost(self) -> Self:
        if self.heartbeat_s > self.ttl_s / 2:
            raise ValueError(
                f"heartbeats every {self.heartbeat_s:g} s are too rare for leases of {self.ttl_s:g} s, since one may "
                "be lost: LYDIAN_HEARTBEAT_S is at most half of LYDIAN_TTL_S"
            )
        return self

    def allowing(self, names: Sequence[str]) -> Self:
        """The same settings, by which calls may also come by these names.

        Raises:
            LydianError: one of them is neither a name nor an address (`bad_setting`).
        """
        for name in names:
            if host_of(name) is None:
                raise LydianError(
                    f"--allow-host {name[:80]!r} is neither a name nor an address, without scheme and port",
                    code="bad_setting",
                    advice="Give the name alone, such as gpu-box.example.",
                )
        return replace(self, allow_host=(*self.allow_host, *names))

    @model_validator(mode="after")
    def _a_key_goes_with_a_file(self) -> Self:
        if self.tls_key is not None and self.tls in ("", "self-made", "tailscale"):
            raise ValueError(
                f"--tls-key (LYDIAN_TLS_KEY) goes with the file of a certificate, and --tls (LYDIAN_TLS) is "
                f"{self.tls or 'not given'}"
            )
        return self

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] | None = None, *, told: Mapping[str, object] | None = None
    ) -> Self:
        """The settings that LYDIAN_* name; the others have their defaults. An empty value is none.

        Args:
            environment: None: the process's own.
            told: settings by their names here, that go before those of the environment; an empty value is none.

        Raises:
            LydianError: a value is not allowed (`bad_setting`): its name, the value, and what is allowed.
        """
        given = os.environ if environment is None else environment
        named: dict[str, object] = {field.name: given.get(PREFIX + field.name.upper()) for field in fields(cls)}
        named |= {name: value for name, value in (told or {}).items() if value}
        try:
            return TypeAdapter(cls).validate_python({name: value for name, value in named.items() if value})
        except ValidationError as error:
            raise LydianError(
                "; ".join(_sentence(fault) for fault in error.errors(include_url=False)),
                code="bad_setting",
                advice="Set it to what is allowed, or unset it for the default.",
            ) from error


def in_words() -> str:
    """Every setting that has no option of its own, a paragraph each, for `--help`."""
    shown = TypeAdapter(Settings).json_schema()["properties"]
    named = [name for name in shown if name not in OPTIONS]
    return "\n\n".join(
        f"`{PREFIX}{name.upper()}`: {shown[name]['description']} ({shown[name].get('default')})" for name in named
    )


def _sentence(fault: ErrorDetails) -> str:
    """One fault in words; one that has no place concerns several settings, and names them itself."""
    if not fault["loc"]:
        return str(fault["ctx"]["error"])
    name = str(fault["loc"][0])
    allowed = TypeAdapter(Settings).json_schema()["properties"][name]["description"]
    return f"{PREFIX}{name.upper()}={str(fault['input'])[:80]!r} is not allowed: it is {allowed}"

"""`python -m server`, which is `lydian serve`: run the coordinator."""

import asyncio
import gc
import logging
import platform
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Annotated, Any, cast

import typer
import uvicorn
from fastapi import FastAPI

from common import __version__
from common.errors import LydianError
from common.logs import LogFormat, json_to_stderr, speaks_json
from common.pins import Pins, split
from common.tailscale import PATIENCE_S, TailscaleStatus, tailscale_status
from server.app import create_app, failed_start
from server.binding import LOOPBACK, Binding, choose, exposed, open_sockets
from server.certificates import Certificate, open_certificate
from server.line import Line
from server.settings import Settings, in_words
from server.supervisor import tell_ready
from server.wire import impatient

KEEP_ALIVE_S = 75  # longer than a poll waits: a worker's connection outlives its polls
GOODBYE_S = 1.0  # for the other end to take leave of TLS, where nothing is under way
GRACEFUL_S = 5  # for transfers under way when told to stop; they are resumed by the next coordinator
GARBAGE = (10_000, 20, 20)  # new objects, and passes over younger ones, before a pass of the collector

log = logging.getLogger("lydian.serve")

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


class Server(uvicorn.Server):
    """Uvicorn, that says when it listens, and in one sentence why it cannot. Listens itself, plainly or with TLS."""

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        on_ready: Callable[[], None],
        *,
        certificate: Certificate | None = None,
        handshake_s: float = 30.0,
    ) -> None:
        """Listen nowhere yet.

        Args:
            config: uvicorn's.
            app: what is served.
            on_ready: called when it listens.
            certificate: for TLS; None: plain HTTP.
            handshake_s: seconds that a client has for the handshake of TLS.
        """
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready
        self._certificate, self._handshake_s = certificate, handshake_s
        self._renewing: asyncio.Task[None] | None = None
        self.follows: int | None = None  # the port on which to go with this machine's tailnet addresses; None: stay
        self._lacking: set[str] = set()  # addresses of the tailnet that cannot be listened on

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Load the state, then listen, then say so.

        Raises:
            LydianError: the application cannot start, as it says itself.
        """
        try:
            await super().startup([])
        except SystemExit:
            error = failed_start(self._app)
            if error is None:
                raise
            raise error from None
        _collect_seldom()
        for sock in sockets or []:
            self.servers.append(await self._listen(sock))
        if self._certificate is not None:
            self._renewing = asyncio.create_task(self._certificate.watch())
        if self.started and not self.should_exit:
            if self.follows is not None:
                self._app.state.coordinator.tailnet.on_status = self.follow
            self._on_ready()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Listen no more, and end what is under way."""
        if self._renewing is not None:
            self._renewing.cancel()
        await super().shutdown(sockets)

    async def _listen(self, sock: socket) -> asyncio.Server:
        loop, options = asyncio.get_running_loop(), dict[str, Any]()
        if self._certificate is not None:
            options = {
                "ssl": self._certificate.context,
                "ssl_handshake_timeout": self._handshake_s,
                "ssl_shutdown_timeout": GOODBYE_S,
            }
        return await loop.create_server(self._protocol, sock=sock, backlog=self.config.backlog, **options)

    async def follow(self, status: TailscaleStatus) -> None:
        """Listen on the addresses that this machine has in the tailnet now, and no more on those that it had."""
        if status.state != "Running" or not status.addresses or self.follows is None or self.should_exit:
            return
        self._app.state.coordinator.tailnet.pin = status.stable_id
        at = {sock.getsockname()[0]: server for server in self.servers for sock in server.sockets}
        for address in [a for a in status.addresses if a not in at and a not in self._lacking]:
            try:
                (sock,) = open_sockets([address], self.follows)
            except LydianError as error:
                self._lacking.add(address)
                log.warning("%s", error.lines())
                continue
            self.servers.append(await self._listen(sock))
            log.warning("this machine has the tailnet address %s now: listening there too", address)
        for address, server in at.items():
            if address not in (*status.addresses, LOOPBACK):
                server.close()
                self.servers.remove(server)
                log.warning(
                    "this machine has the tailnet address %s no more: workers must be told the new one", address
                )

    def _protocol(self) -> asyncio.Protocol:
        """What uvicorn makes of a connection."""
        kind = cast("type[Any]", self.config.http_protocol_class)
        made: asyncio.Protocol = kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        return made


@app.command(epilog=f"Settings by the environment alone:\n\n{in_words()}")
def serve(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on (default: the tailnet's and loopback, or loopback).", envvar="LYDIAN_HOST"
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.", envvar="LYDIAN_PORT")] = 8470,
    state_dir: Annotated[
        Path | None, typer.Option(help="Journal, models and tokens.", envvar="LYDIAN_STATE_DIR")
    ] = None,
    tls: Annotated[
        str,
        typer.Option(
            metavar="self-made|tailscale|FILE",
            help="Encrypt, and show this certificate: one made here and pinned in the tokens, the tailnet name's, or a "
            "file in PEM.",
            envvar="LYDIAN_TLS",
        ),
    ] = "",
    tls_key: Annotated[
        Path | None,
        typer.Option(help="Key of that FILE, where it is not in it too.", envvar="LYDIAN_TLS_KEY"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer calls by this name too: of a tunnel, a container or your own DNS. May be repeated; "
            "LYDIAN_ALLOW_HOST lists several.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Allow plain HTTP where others may listen: anywhere but on loopback and a tailnet.",
            envvar="LYDIAN_INSECURE",
        ),
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of what is said on stderr.", envvar="LYDIAN_LOG_FORMAT")
    ] = LogFormat.text,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C.

    Prints `ready URL` on stdout when it listens, and on stderr the line to paste on the workers. Plain HTTP is spoken
    on loopback and in a tailnet, which encrypts; elsewhere it wants --tls.

    Examples:

    `lydian serve`

    `lydian serve --host 127.0.0.1 --port 8470 --state-dir /var/lib/lydian`

    `lydian serve --host 192.168.1.10 --tls self-made`

    `lydian serve --tls tailscale`

    `lydian serve --host 0.0.0.0 --tls /etc/ssl/lydian/fullchain.pem --tls-key /etc/ssl/lydian/privkey.pem`
    """
    if version:
        typer.echo(__version__)
        return
    level = logging.DEBUG if verbose else logging.INFO
    if log_format is LogFormat.json:
        json_to_stderr(level)
    else:
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for chatty in ("httpx2", "httpcore2", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        told: dict[str, Any] = {"tls": tls, "tls_key": tls_key, "insecure": insecure}
        if state_dir is not None:
            told["state_dir"] = state_dir
        settings = Settings.from_environment(told=told)
        _run(settings.allowing(allow_host) if allow_host else settings, host, port)
    except LydianError as error:
        _say(error.lines(), logging.ERROR)
        raise typer.Exit(1) from error


def descriptors() -> int:
    """Open files that this process may have, after as many as the system allows were asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _run(settings: Settings, host: str | None, port: int) -> None:
    patience_s = PATIENCE_S if host is None else 0.0  # beside a host it only says whether that is the tailnet's
    status, why_none = tailscale_status(settings.tailscaled, patience_s=patience_s)
    line = _line(settings, status)
    certificate = line.certificate
    binding = choose(host, status, why_none, machine=platform.node())
    if certificate is not None:
        binding = binding.encrypted(certificate.name)
    sockets = open_sockets(binding.hosts, port)
    addresses = [str(sock.getsockname()[0]) for sock in sockets]
    line = replace(line, exposed=exposed(addresses, encrypted=line.encrypted, insecure=settings.insecure))
    names = (*binding.hosts, binding.urls_host, binding.address)
    app = create_app(settings, pin=binding.pin, line=line, names=names)
    most = min(settings.connections, descriptors() // 2)  # one caller does not take all the files that may be open

    def connection_refused(address: str) -> None:
        app.state.coordinator.quotas.connection_refused(address, most)

    config = uvicorn.Config(
        app,
        http=impatient(settings.body_idle_s, most, connection_refused),
        ws="none",
        server_header=False,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # where a call comes from is asked of the kernel and of Tailscale, never of the caller
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACEFUL_S,
        workers=1,
    )
    logging.getLogger("uvicorn.error").addFilter(lambda record: failed_start(app) is None and not _is_cut_off(record))
    port = sockets[0].getsockname()[1]
    server = Server(
        config,
        app,
        on_ready=lambda: _announce(app, settings, binding, line, port),
        certificate=certificate,
        handshake_s=settings.body_idle_s,
    )
    if status is not None and host is None and status.tun:
        server.follows = port
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends itself the signal again when it has stopped
        signal.signal(number, lambda *_: None)
    server.run(sockets=sockets)
    if not server.started:
        raise typer.Exit(1)


def _collect_seldom() -> None:
    """Look for rings of garbage seldom, and never in what is there from the start: that was a tenth of each call."""
    gc.freeze()
    gc.set_threshold(*GARBAGE)


def _line(settings: Settings, status: TailscaleStatus | None) -> Line:
    if not settings.tls:
        return Line()
    return Line(open_certificate(settings.tls, settings.tls_key, settings.state_dir, status, settings.tailscaled))


def _is_cut_off(record: logging.LogRecord) -> bool:
    """Whether uvicorn tells with a traceback of a request that was still under way when the coordinator had to end."""
    return record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)


def _announce(app: FastAPI, settings: Settings, binding: Binding, line: Line, port: int) -> None:
    url = binding.url(port)
    app.state.coordinator.url = url
    file = settings.state_dir / "join.token"
    _say(f"{binding.reason}\nadmin token: {settings.state_dir / 'admin.token'}")
    if line.certificate is not None:
        _say(line.certificate.about)
    if line.exposed:
        _warn(line.exposed)
    # A secret is for a person's eyes; a service's are a log, which others read and keep.
    if sys.stderr.isatty() and not speaks_json():
        token, pins = split(file.read_text())
        join = Pins(binding.pin).over(pins).behind(token or "")
        typer.echo(f"on every machine that trains:\n\n    lydian work {url} --token {join}{_aloud(line)}\n", err=True)
    else:
        _say(
            f"join token: {file}\non every machine that trains: LYDIAN_TOKEN=TOKEN lydian work {url}{_aloud(line)}\n"
            "`lydian token join` on this machine prints a TOKEN"
        )
    if other := binding.address_url(port):
        _say(f"where the name is not resolved, {other}")
    typer.echo(f"ready {url}")
    sys.stdout.flush()
    tell_ready()


def _say(text: str, level: int = logging.INFO) -> None:
    """Tell a person; where a machine reads along, as a line of its log."""
    if speaks_json():
        log.log(level, "%s", text)
    else:
        typer.echo(text, err=True)


def _aloud(line: Line) -> str:
    return " --insecure" if line.exposed else ""


def _warn(exposed: tuple[str, ...]) -> None:
    said = (
        f"INSECURE: plain HTTP on {', '.join(exposed)}",
        "whoever listens on that network reads tokens, models and updates, and can use the tokens;",
        "`lydian serve --tls self-made` encrypts",
    )
    if speaks_json():
        log.warning("%s, as --insecure allows: %s; %s", *said)
        return
    width = max(map(len, said))
    rows = "\n".join(f"!! {row:{width}} !!" for row in said)
    typer.echo(f"\n{'!' * (width + 6)}\n{rows}\n{'!' * (width + 6)}\n", err=True)
    log.warning("%s, as --insecure allows", said[0])


if __name__ == "__main__":
    app(prog_name="lydian serve")

"""`python -m server`, which is `lydian serve`: run the coordinator."""

import asyncio
import logging
import platform
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from socket import socket
from typing import Annotated, Any, cast

import typer
import uvicorn
from fastapi import FastAPI

from common import __version__
from common.errors import LydianError
from common.tailscale import PATIENCE_S, TailscaleStatus, tailscale_status
from server.app import create_app, failed_start
from server.binding import LOOPBACK, Binding, choose, open_sockets
from server.settings import Settings
from server.supervisor import tell_ready
from server.wire import impatient

KEEP_ALIVE_S = 75  # longer than a poll waits: a worker's connection outlives its polls
GRACEFUL_S = 5  # for transfers under way when told to stop; they are resumed by the next coordinator

log = logging.getLogger("lydian.serve")

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


class Server(uvicorn.Server):
    """Uvicorn, that says when it listens, and in one sentence why it cannot."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready
        self.follows: int | None = None  # the port on which to go with this machine's tailnet addresses; None: stay
        self._lacking: set[str] = set()  # addresses of the tailnet that cannot be listened on

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Load the state, then listen, then say so.

        Raises:
            LydianError: the application cannot start, as it says itself.
        """
        try:
            await super().startup(sockets)
        except SystemExit:
            error = failed_start(self._app)
            if error is None:
                raise
            raise error from None
        if self.started and not self.should_exit:
            if self.follows is not None:
                self._app.state.coordinator.tailnet.on_status = self.follow
            self._on_ready()

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
            loop = asyncio.get_running_loop()
            self.servers.append(await loop.create_server(self._protocol, sock=sock, backlog=self.config.backlog))
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


@app.command()
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
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow 0.0.0.0 and ::, whoever can reach them.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C.

    Prints `ready URL` on stdout when it listens, and on stderr the line to paste on the workers.

    Examples:

    `lydian serve`

    `lydian serve --host 127.0.0.1 --port 8470 --state-dir /var/lib/lydian`
    """
    if version:
        typer.echo(__version__)
        return
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for chatty in ("httpx2", "httpcore2", "asyncio", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = Settings.from_environment()
        if state_dir is not None:
            settings = replace(settings, state_dir=state_dir)
        _run(settings, host, port, insecure=insecure)
    except LydianError as error:
        typer.echo(error.lines(), err=True)
        raise typer.Exit(1) from error


def _run(settings: Settings, host: str | None, port: int, *, insecure: bool) -> None:
    patience_s = PATIENCE_S if host is None else 0.0  # beside a host it only says whether that is the tailnet's
    status, why_none = tailscale_status(settings.tailscaled, patience_s=patience_s)
    binding = choose(host, status, why_none, insecure=insecure, machine=platform.node())
    sockets = open_sockets(binding.hosts, port)
    app = create_app(settings, pin=binding.pin)
    config = uvicorn.Config(
        app,
        http=impatient(settings.body_idle_s),
        log_config=None,
        access_log=False,
        proxy_headers=False,  # where a call comes from is asked of the kernel and of Tailscale, never of the caller
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACEFUL_S,
        workers=1,
    )
    logging.getLogger("uvicorn.error").addFilter(lambda record: failed_start(app) is None and not _is_cut_off(record))
    port = sockets[0].getsockname()[1]
    server = Server(config, app, on_ready=lambda: _announce(settings, binding, port))
    if status is not None and host is None and status.tun:
        server.follows = port
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn sends itself the signal again when it has stopped
        signal.signal(number, lambda *_: None)
    server.run(sockets=sockets)
    if not server.started:
        raise typer.Exit(1)


def _is_cut_off(record: logging.LogRecord) -> bool:
    """Whether uvicorn tells with a traceback of a request that was still under way when the coordinator had to end."""
    return record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)


def _announce(settings: Settings, binding: Binding, port: int) -> None:
    url = binding.url(port)
    join = (settings.state_dir / "join.token").read_text().strip()
    if not sys.stderr.isatty():  # a log, which more people read than the token is for
        join = "TOKEN"
    if binding.pin is not None:
        join = f"{join}@{binding.pin}"
    typer.echo(f"{binding.reason}\nadmin token: {settings.state_dir / 'admin.token'}", err=True)
    if not sys.stderr.isatty():
        typer.echo(
            f"a join token: `lydian token join` prints one; {settings.state_dir / 'join.token'} has one", err=True
        )
    typer.echo(f"on every machine that trains:\n\n    lydian work {url} --token {join}\n", err=True)
    if other := binding.address_url(port):
        typer.echo(f"where the name is not resolved, {other}", err=True)
    typer.echo(f"ready {url}")
    sys.stdout.flush()
    tell_ready()


if __name__ == "__main__":
    app(prog_name="lydian serve")

"""`python -m worker URL …`, which is `lydian work URL …`: join a coordinator and train for it."""

import logging
import os
import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from common import __version__, pins
from common.api import CoordinatorApi
from common.errors import LydianError
from common.guarding import is_plainly_sheltered
from common.logs import LogFormat, json_to_stderr, speaks_json
from common.places import machine_name
from common.tailscale import SOCKET
from worker import manners, plan
from worker import pin as tailnet_pin
from worker.agent import Agent
from worker.cage import Wish
from worker.caging import keep_to_itself, open_cage
from worker.fitting import UnfitError
from worker.hardware import usable_cores
from worker.identity import Identity, default_folder, trust_file, trusted_digests
from worker.logs import plain, to_stderr
from worker.manners import Rules
from worker.options import Options
from worker.signers import Signers, checked
from worker.spool import Spool

EXIT_RIVAL = 4
EXIT_UNFIT = 5
EXIT_DISK_BROKEN = 74  # EX_IOERR of sysexits.h, as the coordinator's

log = logging.getLogger("lydian.worker")

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


class TrustChoice(StrEnum):
    """Which task files that are not built in may run here."""

    none = "none"
    listed = "listed"
    signed = "signed"
    any = "any"


class SandboxChoice(StrEnum):
    """What a task file's code runs in."""

    none = "none"
    auto = "auto"
    bwrap = "bwrap"
    user = "user"


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def work(
    url: Annotated[str, typer.Argument(help="The coordinator, e.g. http://100.64.0.1:8470", envvar="LYDIAN_URL")],
    token: Annotated[
        str | None, typer.Option(help="Join token, needed once. Better in LYDIAN_TOKEN.", envvar="LYDIAN_TOKEN")
    ] = None,
    pin: Annotated[
        str | None,
        typer.Option(
            metavar="sha256.…",
            help="Certificate that the coordinator must show, where the token does not say it.",
            envvar="LYDIAN_PIN",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Send the token in plain words over any network, where the URL is http://.",
            envvar="LYDIAN_INSECURE",
        ),
    ] = False,
    name: Annotated[str | None, typer.Option(help="Shown to people (default: the host's name).")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Credential and files of this worker.", envvar="LYDIAN_STATE_DIR")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, mps, xpu, or auto (one); cuda:all, cuda:0,1 or cpu:2 (several).")
    ] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads to compute with (0: all that are usable).")] = 0,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a data folder; may be repeated.")] = None,
    trust: Annotated[TrustChoice, typer.Option(help="Task files that may run besides the built-in ones.")] = (
        TrustChoice.none
    ),
    allow: Annotated[
        list[Path] | None,
        typer.Option(help="Add a task file to the list of --trust listed and signed; may be repeated."),
    ] = None,
    signer: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Whose signed task files run with --trust signed; may be repeated."),
    ] = None,
    signers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, one key a line; looked at before each work.")
    ] = None,
    sandbox: Annotated[
        SandboxChoice,
        typer.Option(help="What task files run in; auto: the strongest that works.", envvar="LYDIAN_SANDBOX"),
    ] = SandboxChoice.none,
    sandbox_net: Annotated[
        bool, typer.Option("--sandbox-net", help="bwrap: leave them the network, to download data.")
    ] = False,
    child_user: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whom they run as, where the worker is root.")
    ] = None,
    child_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Address space of each of their processes; not with CUDA.")
    ] = None,
    child_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variable that they get besides; repeatable.", envvar="LYDIAN_CHILD_ENV"),
    ] = None,
    checkpoint_every: Annotated[
        float, typer.Option(min=0, help="Seconds between two checkpoints of the work under way (0: none).")
    ] = 30.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds to finish what is under way after the first SIGTERM or Ctrl-C.")
    ] = 60.0,
    stall_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a sign of life that end a task.")
    ] = 600.0,
    tailscaled: Annotated[
        Path, typer.Option(help="tailscaled's socket on this machine.", envvar="LYDIAN_TAILSCALED")
    ] = SOCKET,
    only_idle: Annotated[
        bool,
        typer.Option(
            "--only-idle",
            help="Only while no other process uses its GPU, and others use little of the processors.",
            envvar="LYDIAN_ONLY_IDLE",
        ),
    ] = False,
    idle_load: Annotated[
        str,
        typer.Option(metavar="SHARE", help="What others may use of the processors then.", envvar="LYDIAN_IDLE_LOAD"),
    ] = "25%",
    hours: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[DAYS@]HH:MM-HH:MM",
            help="Only then, by this machine's clock; may be repeated.",
            envvar="LYDIAN_HOURS",
        ),
    ] = None,
    max_temperature: Annotated[
        float | None,
        typer.Option(min=1, metavar="C", help="Stand still above this, in °C.", envvar="LYDIAN_MAX_TEMPERATURE"),
    ] = None,
    max_power: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="W",
            help="Stand still while the GPU's mean power is above this, in watts.",
            envvar="LYDIAN_MAX_POWER",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE",
            help="Out of the way when all together use more of the machine's memory.",
            envvar="LYDIAN_MAX_MEMORY",
        ),
    ] = None,
    max_gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE", help="What training may take of the GPU's memory.", envvar="LYDIAN_MAX_GPU_MEMORY"
        ),
    ] = None,
    quiet_for: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="S",
            help="Seconds that the machine must be left alone before work is taken again.",
            envvar="LYDIAN_QUIET_FOR",
        ),
    ] = 60.0,
    log_format: Annotated[
        LogFormat, typer.Option(help="Of what is said on stderr.", envvar="LYDIAN_LOG_FORMAT")
    ] = LogFormat.text,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Join a coordinator and train for it, until SIGTERM or Ctrl-C (twice: at once).

    What is trained and not handed in yet, and checkpoints of what is under way, are kept in the state folder: a worker
    that was killed goes on where it was.

    Exit codes: 0 left in good order · 1 refused, or cannot work here · 2 wrong usage · 4 another machine works with
    this worker's credential · 5 its torch does not run on the GPU · 74 the disk is broken. A coordinator that is away
    is waited for.

    Examples:

    `lydian work http://100.64.0.1:8470 --token lyd_join_…`

    `lydian work https://gpu-box:8470 --token lyd_join_…@sha256.…`

    `lydian work http://gpu-box:8470 --device cuda:1 --data mnist=/data/mnist`

    `lydian work http://gpu-box:8470 --device cuda:all`

    `lydian work http://gpu-box:8470 --trust listed --allow my_task.py`

    `lydian work http://gpu-box:8470 --trust signed --signers ~/signers.txt`

    `lydian work http://gpu-box:8470 --only-idle --hours mon-fri@19:00-08:00 --hours sat,sun@00:00-24:00`

    `lydian work http://gpu-box:8470 --max-temperature 80 --max-power 200 --max-gpu-memory 50%`
    """
    (json_to_stderr if log_format is LogFormat.json else to_stderr)(logging.DEBUG if verbose else logging.INFO)
    for chatty in ("httpx2", "httpcore2", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        bare, named = pins.split(token)
        options = Options(
            name="",
            device=device,
            threads=threads or usable_cores(),
            trust=trust.value,
            signers=checked(trust.value, Signers(tuple(signer or ()), signers)),
            stall_s=stall_timeout,
            join_token=bare,
            pins=pins.Pins(certificate=pins.certificate_pin(pin) if pin else None).over(named),
            insecure=insecure,
            checkpoint_every_s=checkpoint_every,
            grace_s=grace,
            rules=Rules(
                hours=tuple(manners.hours(text) for text in hours or ()),
                only_idle=only_idle,
                idle_load=_share("--idle-load", idle_load),
                max_temperature=max_temperature,
                max_power=max_power,
                max_memory=manners.amount("--max-memory", max_memory) if max_memory else None,
                quiet_s=quiet_for,
            ),
            gpu_memory=manners.amount("--max-gpu-memory", max_gpu_memory).number if max_gpu_memory else 1.0,
        )
        wish = Wish(
            sandbox.value, child_user, sandbox_net, _bytes("--child-memory", child_memory), tuple(child_env or ())
        )
        _agent(url, name, state_dir, data or [], allow or [], options, tailscaled, wish).run()
    except LydianError as error:
        if speaks_json():
            log.error("%s", error.lines())
        else:
            typer.echo(plain(error.lines()), err=True)
        raise typer.Exit(exit_code(error)) from error


def _share(flag: str, text: str) -> float:
    found = manners.amount(flag, text)
    if not found.share:
        raise LydianError(f"{flag} {text} is no share", code="bad_amount", advice=f"e.g. {flag} 25% or {flag} 0.25.")
    return found.number


def _bytes(flag: str, text: str | None) -> int:
    if text is None:
        return 0
    found = manners.amount(flag, text)
    if found.share:
        raise LydianError(f"{flag} {text} is a share", code="bad_amount", advice=f"e.g. {flag} 16G.")
    return int(found.number)


def exit_code(error: LydianError) -> int:
    """What the process ends with: a supervisor restarts some ends and not others (deploy/lydian-worker.service)."""
    if plan.is_rival(error):
        return EXIT_RIVAL
    if isinstance(error, UnfitError) and error.lasting:
        return EXIT_UNFIT
    return EXIT_DISK_BROKEN if error.code == "disk_broken" else 1


def _agent(
    url: str,
    name: str | None,
    state_dir: Path | None,
    data: list[str],
    allow: list[Path],
    options: Options,
    tailscaled: Path,
    wish: Wish,
) -> Agent:
    shown = name or machine_name()
    folder = (state_dir or default_folder(shown)).absolute()  # the child works in another folder than this one
    identity = Identity.open(folder, url)
    if identity.credential is None and options.join_token is None:
        raise LydianError(
            f"{shown} has not joined {url} yet and there is no join token",
            code="no_token",
            advice="Paste the line that `lydian serve` printed, or set LYDIAN_TOKEN (`lydian token join` prints one).",
        )
    for file in allow:
        trust_file(folder, file)
    wanted = options.pins.over(identity.pins)
    if said := tailnet_pin.check(url, wanted.node, tailscaled):
        log.info("%s", said)
    folders = data_folders(data)
    options = replace(options, name=shown, data=folders, trusted=trusted_digests(folder), pins=wanted)
    api = CoordinatorApi(url, options.join_token, pin=wanted.certificate, insecure=options.insecure)
    if options.insecure and url.startswith("http:") and not is_plainly_sheltered(url):
        log.warning("INSECURE: %s is plain HTTP, as --insecure allows: others on the way may read all of it", url)
    api.check_line()
    if wanted:
        identity.repin(wanted)
    options = replace(options, cage=open_cage(wish, folder, folders))
    keep_to_itself()
    os.environ.pop("LYDIAN_TOKEN", None)  # nothing that this process starts needs it
    if options.rules.measuring:  # the driver is asked about a GPU by its number: CUDA must count as it does
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return Agent(api, identity, Spool.open(folder), options, folder)


def data_folders(given: list[str]) -> dict[str, str]:
    """Name -> folder, of options NAME=PATH."""
    folders = {}
    for item in given:
        name, sign, path = item.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z0-9._-]{1,63}", name):
            raise LydianError(
                f"--data {item} is not NAME=PATH", code="bad_data", advice="e.g. --data mnist=/data/mnist"
            )
        if not Path(path).exists():
            raise LydianError(f"--data {item}: {path} does not exist", code="bad_data", advice="Check the path.")
        folders[name] = str(Path(path).resolve())
    return folders


if __name__ == "__main__":
    app(prog_name="lydian work")

"""`lydian`: every command of the system.

A command parses, asks the coordinator through common.api, and prints: the answer on stdout, everything else on stderr.
The packages that make the calls are imported inside the commands, so that `lydian --help` answers at once.

Exit codes: 0 fine · 1 the request failed, or the watched job did · 2 wrong usage · 3 no coordinator answers ·
4 the watched job was cancelled · 130 interrupted.
"""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from client import shown, tokens
from client.auditing import audit_app
from client.calling import (
    DEFAULT_URL,
    AsJson,
    Token,
    Url,
    coordinator,
    new_app,
    print_message,
    print_messages,
    run_program,
    token_from_file,
    without_secret,
)
from client.commands.export import export
from client.commands.init import init
from client.commands.pack import pack
from client.commands.top import top
from client.commands.track import track
from client.completing import complete_jobs, complete_workers
from client.service.units import Side
from common import __version__, begins
from common.privacy import shown_epsilon

if TYPE_CHECKING:
    from common.messages import JobView, Link, TailnetPath, WorkerView

HELP = """Train one PyTorch model on all the machines you have.

\b
Examples:
  lydian demo                                        train on this machine, in a minute
  lydian simulate digits --clients 1000              the same with very many virtual clients
  lydian serve                                       start the coordinator
  lydian work http://gpu-box:8470 --token TOKEN      train for it, on every machine
  lydian init my-model                               begin with a job.toml and a task.py
  lydian doctor http://gpu-box:8470                  see what keeps this machine from it, and what to do
  lydian submit fashion-mnist --rounds 20 --watch    send a job and watch it
  lydian top                                         see the fleet and its jobs live
  lydian pull JOB -o model.safetensors --best        fetch the model

\b
LYDIAN_URL and LYDIAN_TOKEN say which coordinator, and as whom; LYDIAN_PIN, which
certificate it must show where the token does not say it.

\b
Exit codes: 0 fine, 1 the request or the watched job failed, 2 wrong usage,
3 no coordinator answers, 4 the watched job was cancelled, 130 interrupted.
"""

app = new_app(HELP, completes=True)
app.add_typer(tokens.app, name="token")
app.add_typer(audit_app, name="audit")

WORKER_COLUMNS = (
    "WORKER", "NAME", "STATE", "SEEN", "DEVICE", "TORCH", "PRECISION", "NODE", "PATH", "DOWN", "UP", "LATENCY", "DOING",
    "SPEED", "REASON",
)  # fmt: skip

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=complete_jobs)]
JobOrNone = Annotated[str | None, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=complete_jobs)]
WorkerArgument = Annotated[
    str, typer.Argument(metavar="WORKER", help="The worker's id or name.", autocompletion=complete_workers)
]
WorkerOption = Annotated[
    str | None,
    typer.Option("--worker", metavar="WORKER", help="A worker's id or name instead.", autocompletion=complete_workers),
]


class PassedOn(TyperCommand):
    """A command whose arguments, --help included, are another program's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - click's, which typer brings or imports
        """Take them all as they are."""
        ctx.args = args
        return args

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:  # noqa: ANN401
        """Of `submit`, its flags: a key of a job each. The others are programs that load too much for a Tab."""
        if self.name != "submit":
            return []
        from typer.main import get_command

        from client.submit_job import make_app

        inner = get_command(make_app(ctx.command_path))
        found: list[Any] = inner.shell_complete(type(ctx)(inner, info_name="submit"), incomplete)
        return found


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Nothing by itself; HELP is shown instead of this."""


# ---------------------------------------------------------------- the parts of the system


@app.command(cls=PassedOn, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Run the coordinator on this machine."""
    from client.running import become

    become("server", context.args)


@app.command(cls=PassedOn, add_help_option=False)
def work(context: typer.Context) -> None:
    """Train for a coordinator on this machine."""
    from client.running import become

    become("worker", without_secret(context.args))


@app.command(
    "install-service", context_settings={"ignore_unknown_options": True}, options_metavar="[OPTIONS OF THIS COMMAND]"
)
def install_service(
    side: Annotated[Side, typer.Argument(metavar="serve|work", help="The coordinator, or a worker.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WHAT]", help="What follows `lydian serve` or `lydian work`: the URL, their options."),
    ] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="user|system", help="Whose service (default: root's is the system's).")
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whom a system service runs as (default: a user of its own).")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the service: a second worker, for a second GPU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written and done, and end.")] = False,
    no_enable: Annotated[bool, typer.Option("--no-enable", help="Write the files, and start nothing.")] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Stop and remove it; its state stays.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of a unit of another installation.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait until it listens, or has joined.")
    ] = 60,
) -> None:
    """Let systemd run the coordinator or a worker: from boot on, started again however it ends.

    Run as root it is a service of the system, else of this user. A second run changes what differs. A worker's join
    token comes from LYDIAN_TOKEN, or is asked for; it is never on a command line.

    \b
    Examples:
      lydian install-service serve
      lydian install-service work http://gpu-box:8470 --name attic --data scans=/srv/scans
      lydian install-service work http://gpu-box:8470 --unit lydian-worker-1 --name attic-1 --device cuda:1
      sudo /opt/lydian/bin/lydian install-service serve --dry-run
      lydian install-service serve --uninstall
    """
    import os

    from client.service import install as service

    if scope not in (None, "user", "system"):
        raise typer.BadParameter(f"--scope is user or system, not {scope!r}")
    of_user = os.geteuid() != 0 if scope is None else scope == "user"
    if of_user and user is not None:
        raise typer.BadParameter("--user says whom a system service runs as; a service of this user runs as this user")
    wish = service.Wish(
        side=side,
        options=tuple(options or ()),
        of_user=of_user,
        user=user,
        unit=unit,
        dry_run=dry_run,
        enable=not no_enable,
        replace=replace,
        wait_s=wait,
    )
    if uninstall:
        service.uninstall(wish)
    else:
        service.install(wish)


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to train.")] = 5,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Workers to start, one thread each.")] = 3,
    task: Annotated[str, typer.Option(help="A built-in task, or your own FILE.py.")] = "digits",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with state and logs.")] = False,
) -> None:
    """Train on this machine: a coordinator, some workers, real data, and everything stopped at the end.

    \b
    Examples:
      lydian demo
      lydian demo --rounds 10 --workers 4
      lydian demo --task my_task.py --keep
    """
    from client.demo import run_demo

    run_demo(rounds=rounds, workers=workers, task=task, keep=keep)


@app.command()
def simulate(
    what: Annotated[
        str, typer.Argument(metavar="TASK", help="A built-in task, a job file (TOML), or your own FILE.py.")
    ],
    clients: Annotated[int, typer.Option(min=1, max=1_000_000, help="Virtual clients: shards of the data.")] = 100,
    fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the clients that trains in a round (default: 0.1).")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to train (default: the job's).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the whole job (default: the job's).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the job; repeatable.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes that train.")] = 2,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, max=512, help="Clients that a process trains together, at most.")
    ] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, mps, xpu or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    stack: Annotated[
        str, typer.Option(metavar="auto|off", help="Train clients as one computation if faster.")
    ] = "auto",
    data: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A data folder; repeatable.")] = None,
    lease: Annotated[float, typer.Option(min=1, help="Seconds after which a dead process's clients move on.")] = 20,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep everything in this folder, which is new or empty.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the last model here (safetensors).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a federated setting with very many clients on this machine, before real machines join.

    A coordinator and a few processes are started here; the clients are shards of one data set, and everything goes over
    the real protocol. With --json every fact is one JSON object on a line, and the last line has type "summary".

    \b
    Examples:
      lydian simulate digits --clients 100 --rounds 5
      lydian simulate fashion-mnist --clients 1000 --fraction 0.01 --rounds 50 \\
        --set data.partition=dirichlet --set data.alpha=0.3
      lydian simulate my_task.py --clients 200 --processes 1 --device cuda -o model.safetensors
    """
    from client.simulate import Wish, run_simulation

    if stack not in ("auto", "off"):
        raise typer.BadParameter(f"--stack is auto or off, not {stack!r}")
    if fraction == 0:
        raise typer.BadParameter("--fraction is above 0")
    wish = Wish(
        what=what,
        clients=clients,
        fraction=fraction,
        rounds=rounds,
        seed=seed,
        settings=tuple(settings or ()),
        processes=processes,
        at_once=at_once,
        device=device,
        threads=threads,
        stack=stack,
        data=tuple(data or ()),
        lease_s=lease,
        state_dir=state_dir,
        output=output,
    )
    run_simulation(wish, as_json=as_json)


@app.command()
def chaos(
    faults: Annotated[int | None, typer.Option(min=1, help="Faults to inject (default: 20).")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="Instead: inject faults for so many seconds, about.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same faults at the same points.")] = 0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Workers to start, one thread each.")] = 4,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of the job (default: a few more than faults).")
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(metavar="KIND,…", help="Only these faults (default: all that can be had here).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A built-in task, or your own FILE.py (default: a small one for faults).")
    ] = None,
    lease: Annotated[float, typer.Option(min=1, help="Seconds of silence after which a worker's shard moves on.")] = 6,
    as_json: AsJson = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with state and logs.")] = False,
) -> None:
    """Break a fleet on this machine on purpose, and count what was lost.

    Trains a small job undisturbed, then the same one while processes are killed and stopped, connections cut, stalled
    and corrupted, clocks set, and the coordinator's disk filled and cut off. Exit code 0: every promise was kept.

    \b
    Kinds: kill-worker, kill-coordinator, kill-both, kill-at-point, stop-worker, stop-coordinator,
    cut, stall, half-close, corrupt, clock-jump (needs libfaketime), disk-full, power-cut (need root).

    \b
    Examples:
      lydian chaos
      lydian chaos --faults 200 --seed 7
      lydian chaos --kinds kill-worker,cut --seconds 60
    """
    from client.chaos.run import Wish, run_chaos

    if faults is not None and seconds is not None:
        raise typer.BadParameter("--faults and --seconds both say when to end: keep one")
    wish = Wish(
        faults=faults,
        seconds=seconds,
        seed=seed,
        workers=workers,
        rounds=rounds,
        kinds=tuple(kind.strip() for kind in kinds.split(",")) if kinds is not None else None,
        task=task,
        lease_s=lease,
        keep=keep,
    )
    raise typer.Exit(0 if run_chaos(wish, as_json=as_json) else 1)


@app.command(cls=PassedOn, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure what training costs on this machine, beside what the machine can do."""
    from client.running import become

    become("bench", context.args)


class Part(StrEnum):
    """The parts of `lydian doctor`."""

    machine = "machine"
    training = "training"
    coordinator = "coordinator"
    tailnet = "tailnet"


@app.command()
def doctor(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", envvar="LYDIAN_URL", help="The coordinator, if there is one.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(metavar="TEXT", envvar="LYDIAN_TOKEN", help="Any token. Better in LYDIAN_TOKEN.")
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="LYDIAN_STATE_DIR", help="The state folder of this machine's part."),
    ] = None,
    device: Annotated[str, typer.Option(help="What a worker here is to train on.")] = "auto",
    tailscaled: Annotated[
        Path | None, typer.Option(envvar="LYDIAN_TAILSCALED", help="tailscaled's socket on this machine.")
    ] = None,
    only: Annotated[list[Part] | None, typer.Option(help="Check this alone; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and the way from it to the coordinator: one line a check, and the one thing to do.

    With --json a list of {side, check, verdict, sentence, fix}. Exit code 1 where anything failed; warnings may be.

    \b
    Examples:
      lydian doctor                             before `lydian serve` or `lydian work`, on any machine
      lydian doctor http://gpu-box:8470         the way to the coordinator as well
      lydian doctor --only training --device cuda:1
    """
    from client.doctor.checks import Wish, run_doctor

    known = token or token_from_file()
    wish = Wish(url=url, token=known, state_dir=state_dir, device=device, sides=frozenset(only or ()))
    if tailscaled is not None:
        wish = replace(wish, tailscaled=tailscaled)
    raise typer.Exit(run_doctor(wish, as_json=as_json))


# ---------------------------------------------------------------- jobs


@app.command(cls=PassedOn, add_help_option=False)
def submit(context: typer.Context) -> None:
    """Send a job and print its id."""
    from client.submit_job import make_app

    program = context.command_path
    make_app(program)(context.args, prog_name=program)


app.command()(init)
app.command()(pack)


@app.command()
def plan(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A job file, a built-in task, or the id of a job.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the job; repeatable.")
    ] = None,
    like: Annotated[str | None, typer.Option(metavar="JOB", help="Take this job's measurements.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Train two rounds first, and measure those.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Foretell what a round will cost each worker, and what would be better; or set that beside what a job did cost.

    Rests on what was measured: speeds by an earlier job of the same task, lines by the workers themselves.

    \b
    Examples:
      lydian plan job.toml
      lydian plan fashion-mnist --set aggregation.update=int4 --measure
      lydian plan fashion-mnist-3f2a81c0
    """
    from client.planning import plan_beside_truth, plan_of, show
    from client.submit_job import read_what
    from common.tasks import BUILTIN

    with coordinator(url, token) as api:
        if what.endswith((".toml", ".py")) or what in BUILTIN:
            job = read_what(what, {}, settings or [])
            found, rounds = plan_of(api, job, like=like, measure=measure), job.spec.rounds
        elif settings or like is not None or measure:
            raise typer.BadParameter(f"{what} is the id of a job that has run: nothing of it can be set or measured")
        else:
            view = api.job(what)
            found, rounds = plan_beside_truth(api, view), view.spec.rounds
    if as_json:
        print_message(found)
    else:
        show(found, rounds)


@app.command()
def partition(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A job file, a built-in task, or your own FILE.py.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of the job; repeatable.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="For shards = auto: cut for so many (default: min_workers).")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="NAME=PATH", help="A data folder; repeatable.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|.svg", help="Draw the shards, stacked by class.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut a job's training set here, as the job will, and show how unlike the shards are. Needs torch and the data.

    \b
    Examples:
      lydian partition job.toml --plot shards.png
      lydian partition digits --set data.partition=dirichlet --set data.alpha=0.1 --set data.shards=20
      lydian partition my_task.py --set data.partition=natural --set data.by=users --json
    """
    from client.partition.command import Wish, run_partition
    from client.submit_job import read_what

    job = read_what(what, {}, settings or [])
    run_partition(job, Wish(workers, tuple(data or ()), plot), as_json=as_json)


@app.command()
def jobs(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """List the jobs, oldest first.

    \b
    Examples:
      lydian jobs
      lydian jobs --json | jq -r '.[] | select(.state == "training") | .id'
    """
    with coordinator(url, token) as api:
        found = api.jobs()
    if as_json:
        print_messages(found)
    elif found:
        header = ["JOB", "NAME", "TASK", "BEGAN WITH", "STATE", "ROUND", "ACCURACY", "ε", "REASON"]
        header, cells = shown.without_empty(header, [_job_cells(job) for job in found], {"BEGAN WITH", "ε"})
        shown.print_table(header, cells, right={"ROUND", "ACCURACY", "ε"})
    else:
        typer.echo("no job yet: `lydian submit --help` says how to send one", err=True)


@app.command()
def watch(job: JobArgument, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Watch a job until it is over; Ctrl-C leaves it running.

    With --json every fact is one JSON object on a line; a closed round has type "round", and the last line type "job".

    \b
    Examples:
      lydian watch digits-4f2a
      lydian watch digits-4f2a | tee watch.log
      lydian watch digits-4f2a --json | jq -r 'select(.type == "round") | .seconds'
    """
    from client import watching

    with coordinator(url, token) as api:
        ending = watching.watch(api, api.job(job), as_json=as_json)
    raise typer.Exit(ending)


app.command()(track)


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what the task writes.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Print every trouble of a job: what to do about it, the machine then, and its traceback.

    With --follow go on with what the task writes on each worker, as their heartbeats bring it, and with new troubles,
    until the job is over; --json is one object a line then. The exit codes are those of `lydian watch`.

    \b
    Examples:
      lydian logs digits-4f2a
      lydian logs digits-4f2a --follow
      lydian logs digits-4f2a --json | jq -r '.[] | [.worker, .cause, .advice] | @tsv'
    """
    from client import following
    from client.troubles import trouble_lines

    with coordinator(url, token) as api:
        if follow:
            raise typer.Exit(following.follow(api, api.job(job), as_json=as_json))
        entries = api.logs(job)
    if as_json:
        print_messages(entries)
        return
    for entry in entries:
        typer.echo("\n".join(trouble_lines(entry)))
    if not entries:
        typer.echo(f"{job} had no trouble", err=True)


@app.command()
def cancel(job: JobArgument, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """End a job; the models of its closed rounds stay.

    \b
    Examples:
      lydian cancel digits-4f2a
    """
    with coordinator(url, token) as api:
        _print_job(api.cancel(job), as_json=as_json)


@app.command()
def pause(
    job: JobOrNone = None,
    worker: WorkerOption = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Hand out no more work of a job until it is resumed; or have a worker out of the way at once.

    A paused worker gives its work back and frees its GPU at its next heartbeat, and stays joined.

    \b
    Examples:
      lydian pause digits-4f2a
      lydian pause --worker gpu-box
    """
    chosen = _job_or_worker(job, worker)
    with coordinator(url, token) as api:
        if worker is not None:
            _print_worker(api.pause_worker(worker), as_json=as_json)
        else:
            _print_job(api.pause(chosen), as_json=as_json)


@app.command()
def resume(
    job: JobOrNone = None,
    worker: WorkerOption = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a paused job where it stood; or give a paused or drained worker work again.

    \b
    Examples:
      lydian resume digits-4f2a
      lydian resume --worker gpu-box
    """
    chosen = _job_or_worker(job, worker)
    with coordinator(url, token) as api:
        if worker is not None:
            _print_worker(api.resume_worker(worker), as_json=as_json)
        else:
            _print_job(api.resume(chosen), as_json=as_json)


@app.command()
def pull(
    job: JobArgument,
    target: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE|FOLDER/", help="Where the model goes (default: a folder named as the job)."
        ),
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", min=0, metavar="N", help="The model after this round.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The model that was evaluated best.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite what is there.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Fetch a job's newest model: as a safetensors file, or as a folder with a model card, as on the Hugging Face hub.

    It is a folder where no -o is given, or one that ends with / or is there already; else a file. Prints its path.
    In Python: model.load_state_dict(safetensors.torch.load_file(FILE))

    \b
    Examples:
      lydian pull digits-4f2a -o digits.safetensors --best
      lydian pull digits-4f2a                          digits-4f2a/ with model.safetensors, config.json, README.md
      lydian pull digits-4f2a -o models/digits/ --round 7
    """
    from client.pulling import pull_folder, pull_model

    if best and number is not None:
        raise typer.BadParameter("--best and --round name two models: keep one")
    which = "best" if best else "newest" if number is None else str(number)
    path = Path(job if target is None else target)
    as_folder = target is None or target.endswith("/") or path.is_dir()
    with coordinator(url, token) as api:
        (pull_folder if as_folder else pull_model)(api, job, path, which=which, force=force)
    typer.echo(path)


app.command()(export)


@app.command()
def verify(
    job: JobArgument,
    number: Annotated[int | None, typer.Option("--round", min=1, metavar="N", help="This round alone.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The coordinator's state folder (default: LYDIAN_STATE_DIR).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Average a job's closed rounds again, and prove that the published models are what their updates make.

    On the coordinator's machine, beside it or without it; nothing in its folder is changed. Only rounds whose updates
    are kept can be proven: submit with --keep-updates N or all.

    \b
    Examples:
      lydian submit digits --rounds 5 --keep-updates all
      lydian verify digits-4f2a
      lydian verify digits-4f2a --round 3 --state-dir /var/lib/lydian --json
    """
    from client.running import become

    options = [*(["--round", str(number)] if number is not None else []), *(["--json"] if as_json else [])]
    folder = ["--state-dir", str(state_dir)] if state_dir is not None else []
    become("server.proof", ["job", *options, *folder, "--", job])


# ---------------------------------------------------------------- workers


app.command()(top)


@app.command()
def workers(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """List the workers and what they do.

    \b
    Examples:
      lydian workers
      lydian workers --json | jq -r '.[] | select(.state == "gone") | .name'
    """
    with coordinator(url, token) as api:
        found = api.workers()
    if as_json:
        print_messages(found)
    elif found:
        header, rows = shown.without_empty(WORKER_COLUMNS, [_worker_cells(worker) for worker in found], {"NODE"})
        shown.print_table(header, rows, right={"SEEN", "DOWN", "UP", "LATENCY", "SPEED"})
        for worker in found:
            for warning in worker.warnings:
                typer.echo(shown.one_line(f"warning: {worker.name}: {warning}"), err=True)
    else:
        typer.echo("no worker yet: `lydian serve` prints the line that starts one", err=True)


@app.command()
def drain(worker: WorkerArgument, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Let a worker finish what it does and give it nothing more, until `lydian resume --worker WORKER`.

    It stays joined, with its GPU free; a restart of the coordinator or of the worker does not end that.

    \b
    Examples:
      lydian drain gpu-box
      lydian resume --worker gpu-box
    """
    with coordinator(url, token) as api:
        _print_worker(api.drain(worker), as_json=as_json)


@app.command()
def readmit(worker: WorkerArgument, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Give a worker work again that was set aside, drained or paused; its refused results are forgiven.

    \b
    Examples:
      lydian readmit gpu-box
    """
    with coordinator(url, token) as api:
        _print_worker(api.readmit(worker), as_json=as_json)


@app.command("sign")
def sign_task(
    task: Annotated[Path | None, typer.Argument(metavar="TASK.py", help="The task file, which you have read.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="LYDIAN_SIGNING_KEY", help="Your key (default: the only one there is)."),
    ] = None,
    new_key: Annotated[
        Path | None, typer.Option("--new-key", metavar="FILE", help="Make a key, and print its public line.")
    ] = None,
) -> None:
    """Sign a task file, so that workers with --trust signed run it; the signature is written to TASK.py.sig.

    `lydian submit` sends it with the job. Give the public line of your key to the owners of the workers.

    \b
    Examples:
      lydian sign --new-key ~/.config/lydian/ada.key
      lydian sign my_task.py
    """
    from client import signing

    if (task is None) == (new_key is None):
        raise typer.BadParameter("name a TASK.py to sign, or --new-key FILE to make a key: one of the two")
    if new_key is not None:
        made = signing.new_key(new_key.expanduser())
        typer.echo(f"the key is in {new_key}, not encrypted: whoever reads that file can sign as {made.name}", err=True)
        typer.echo(made.line)
    elif task is not None:
        written, signer = signing.sign_file(task, key)
        typer.echo(f"signed as {signer.name} (key {signer.id}); workers list {signer.line}", err=True)
        typer.echo(str(written))


def main() -> NoReturn:
    """Run `lydian`."""
    run_program(app, "lydian")


# ---------------------------------------------------------------- cells


def _print_job(view: "JobView", *, as_json: bool) -> None:
    if as_json:
        print_message(view)
    else:
        typer.echo(shown.one_line(f"{view.id} is {view.state}: {view.reason}"))


def _job_or_worker(job: str | None, worker: str | None) -> str:
    """The one that is named.

    Raises:
        typer.BadParameter: both are, or neither.
    """
    if (job is None) == (worker is None):
        raise typer.BadParameter("name a JOB, or a worker with --worker WORKER: one of the two")
    return job or worker or ""


def _print_worker(view: "WorkerView", *, as_json: bool) -> None:
    if as_json:
        print_message(view)
    else:
        typer.echo(shown.one_line(f"{view.name} is {view.state}: {view.reason}"))


def _job_cells(job: "JobView") -> list[str]:
    accuracy = shown.measure(job.metrics.get("accuracy"))
    epsilon = shown_epsilon(job.privacy.epsilon) if job.privacy else shown.NOTHING
    begun = begins.short(job.begins_with) if job.begins_with else shown.NOTHING
    cells = [job.id, job.name, job.task, begun, job.state, f"{job.round}/{job.rounds}", accuracy, epsilon, job.reason]
    return [shown.one_line(cell) for cell in cells]


def _worker_cells(worker: "WorkerView") -> list[str]:
    measured = [speed.samples_per_s for speed in worker.speeds if speed.samples_per_s is not None]
    speed = worker.progress.samples_per_s if worker.progress else next(reversed(measured), None)
    torch = worker.hardware.torch
    cells = [
        worker.id,
        worker.name,
        worker.state,
        f"{shown.duration(worker.last_seen_s)} ago" if worker.last_seen_s >= 0 else shown.NOTHING,
        _device(worker),
        torch.version,
        _precision(worker),
        f"{worker.node.name} ({worker.node.owner})" if worker.node else shown.NOTHING,
        _path(worker.path),
        *_link_cells(worker.link),
        worker.assignment or shown.NOTHING,
        shown.NOTHING if speed is None else f"{speed:,.0f}/s",
        "; ".join(filter(None, (worker.reason, worker.hardware.device_reason))),
    ]
    return [shown.one_line(cell) for cell in cells]


def _path(path: "TailnetPath | None") -> str:
    """How packets reach the worker, in few words."""
    if path is None or path.kind == "unknown":
        return shown.NOTHING
    return f"relayed by {path.via}" if path.kind in ("relay", "peer relay") else path.kind


def _link_cells(link: "Link | None") -> list[str]:
    """What it carries from and to the coordinator, and its latency."""
    if link is None:
        return [shown.NOTHING] * 3
    return [shown.line_rate(link.down), shown.line_rate(link.up), shown.latency(link.latency_s)]


def _precision(worker: "WorkerView") -> str:
    """What `precision = auto` is there and why; before it what is computed in, where that is something else."""
    torch, now = worker.hardware.torch, worker.progress.precision if worker.progress else None
    best = f"{torch.precision} ({torch.precision_reason})" if torch.precision_reason else torch.precision
    return best if now in (None, torch.precision) else f"{now}, best {best}"


def _device(worker: "WorkerView") -> str:
    """The device that the worker trains on, with the GPU's name where its number tells which that is."""
    device = worker.hardware.torch.device
    kind, _, number = device.partition(":")
    names = {gpu.index: gpu.name for gpu in worker.hardware.gpus}
    name = names.get(int(number or 0)) if kind == "cuda" and (number or len(names) == 1) else None
    ranks = worker.hardware.torch.ranks
    shown_device = device if ranks == 1 else f"{ranks} × {kind}"
    return f"{shown_device} {name}" if name else shown_device


if __name__ == "__main__":
    main()

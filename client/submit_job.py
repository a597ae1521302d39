"""`submit_job`, which is `lydian submit`: send a job, print its id, and watch it if asked to.

The flags are made from JobSpec by client.job_keys, so this file names none of the job's keys.
"""

import inspect
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import uuid4

import typer
from typer.core import TyperCommand

from client import sending, shown
from client.calling import DEFAULT_URL, AsJson, Token, Url, coordinator, new_app, print_message, run_program
from client.job_file import INIT, TASK, Job, flag_layer, read_job, set_layer
from client.job_keys import Key, KeyPath, job_keys
from client.watching import watch
from common.cautions import cautions
from common.messages import JobRequest
from common.signing import whos
from common.tasks import BUILTIN

PROGRAM = "submit_job"
METAVARS = {TASK: "NAME|FILE.py", INIT: "FILE|JOB[@ROUND|@best]"}
HELP = """Send a job and print its id.

WHAT is a built-in task, a job file (TOML), or a training script that goes through lydian.rounds. Your own task:
--task FILE.py. A Flower app, as it is: --flower DIR. A flag counts more than the job file, and
--set more than a flag; the task's own defaults count least.

\b
Built-in tasks:
{tasks}

\b
Examples:
  {program} fashion-mnist --rounds 20 --watch
  {program} job.toml --lr 0.05 --set config.width=64
  {program} --task my_task.py --min-workers 3 --shards 8
  {program} train.py --rounds 10 --arguments "--width 64"
  {program} --flower examples/flower/digits --min-workers 2 --watch
  {program} job.toml --init digits-4f2a@best
  {program} char-lm --url http://gpu-box:8470 --json
"""


class SectionedCommand(TyperCommand):
    """A command whose help lists the options under the headings that they were given as panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - click's, which typer brings or imports
        """Write the options, one heading after the other."""
        headings: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                names = [", ".join(parameter.opts)] if parameter.param_type_name == "option" else []
                name = " ".join([*names, parameter.metavar]) if parameter.metavar else record[0]
                heading = getattr(parameter, "rich_help_panel", None) or "Options"
                headings.setdefault(heading, []).append((name, record[1]))
        for heading, records in headings.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)


def make_app(program: str) -> typer.Typer:
    """The command as an application of its own, called `program`."""
    app = new_app()
    tasks = "\n".join(f"  {name:<15}{task.summary}" for name, task in BUILTIN.items())
    app.command(cls=SectionedCommand, help=HELP.format(tasks=tasks, program=program))(_with_flags())
    return app


def submit(
    what: str | None,
    flags: dict[KeyPath, Any],
    sets: list[str],
    *,
    url: str,
    token: str | None,
    key: str | None,
    watching: bool,
    as_json: bool,
    flower: Path | None = None,
) -> None:
    """Send a job, print its id (or with `as_json` its view), and watch it.

    Raises:
        typer.Exit: with `watching`, the exit code for how the job ended.
        LydianError: the job is wrong, or the coordinator refused it or is away.
    """
    job = read_what(what, flags, sets, flower)
    request = JobRequest(spec=job.spec, task_source=job.task_source, signatures=job.signatures, key=key or uuid4().hex)
    with coordinator(url, token) as api:
        view = sending.submit(api, job, request)
        if job.signatures:
            typer.echo(f"sent with what {whos(job.signatures)} signed", err=True)
        for sentence in (*cautions(job.spec), *job.remarks):
            typer.echo(f"caution: {sentence}", err=True)
        if as_json:
            print_message(view)
        else:
            typer.echo(view.id)
        for warning in view.warnings:
            typer.echo(shown.one_line(warning), err=True)
        if watching:
            raise typer.Exit(watch(api, view, as_json=as_json))


def main() -> NoReturn:
    """Run `submit_job`."""
    run_program(make_app(PROGRAM), PROGRAM)


def read_what(what: str | None, flags: dict[KeyPath, Any], sets: list[str], flower: Path | None = None) -> Job:
    """The job that the command line says."""
    file = Path(what) if what is not None and what.endswith(".toml") else None
    if flower is not None and ((what is not None and file is None) or TASK in flags):
        raise typer.BadParameter(f"both {what or flags[TASK]} and --flower {flower} name the task: keep one")
    if what is not None and file is None:
        if TASK in flags:
            raise typer.BadParameter(f"both {what} and --task {flags[TASK]} name the task: keep one")
        flags = flags | {TASK: what}
    set_settings = set_layer(sets)
    if file is None and TASK not in flags and TASK not in set_settings and flower is None:
        raise typer.BadParameter(
            "say what to train: a built-in task, a job file, a script, --task FILE.py or --flower DIR"
        )
    return read_job(file, flag_layer(flags), set_settings, flower)


def _with_flags() -> Any:  # noqa: ANN401 - a function whose signature is made here
    """The function behind the command: a parameter for each key of a job, and what `submit` has for itself."""
    names = {_parameter_name(path): path for path in job_keys()}

    def command(**given: Any) -> None:  # noqa: ANN401 - as the signature says
        flags = {path: given[name] for name, path in names.items() if given[name] not in (None, [])}
        submit(
            given["what"],
            flags,
            given["settings"] or [],
            url=given["url"],
            token=given["token"],
            key=given["key"],
            watching=given["watch"],
            as_json=given["as_json"],
            flower=given["flower"],
        )

    own: dict[str, tuple[Any, Any]] = {
        "what": (
            Annotated[str | None, typer.Argument(metavar="WHAT", help="A built-in task, a job file or a script.")],
            None,
        ),
        "settings": (
            Annotated[
                list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key; repeatable.")
            ],
            None,
        ),
        "flower": (
            Annotated[Path | None, typer.Option("--flower", metavar="DIR", help="A Flower app's folder, unmodified.")],
            None,
        ),
        "watch": (Annotated[bool, typer.Option("--watch", help="Watch the job until it is over.")], False),
        "key": (
            Annotated[str | None, typer.Option("--key", metavar="TEXT", help="The same key again gives the same job.")],
            None,
        ),
        "url": (Url, DEFAULT_URL),
        "token": (Token, None),
        "as_json": (AsJson, False),
    }
    parameters = own | {_parameter_name(path): (_option(key), None) for path, key in job_keys().items()}
    command.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
    signature = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in parameters.items()
    ]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    return command


def _parameter_name(path: KeyPath) -> str:
    return "job_" + "_".join(path)


def _option(key: Key) -> Any:  # noqa: ANN401 - an annotation
    section = key.path[0] if len(key.path) > 1 or key.open else ""
    panel = f"[{section}]" if section else "Job"
    metavar = METAVARS.get(key.path, key.shape)
    option = typer.Option(key.flag, metavar=metavar, help=key.help, rich_help_panel=panel, show_default=False)
    return Annotated[list[str] | None, option] if key.open else Annotated[str | None, option]


if __name__ == "__main__":
    main()

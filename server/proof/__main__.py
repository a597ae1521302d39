"""`python -m server.proof`, which is `lydian verify` and `lydian audit … --state-dir`: reads a state folder.

Exit codes: 0 all that could be proven is right · 1 something is wrong, or nothing could be proven.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.audit import AuditHead, BrokenRecordError, Checker, parse_anchor
from common.errors import LydianError, NotFoundError
from common.places import coordinator_folder
from server.replay import Proof, prove
from server.store import Journal, StoredFact

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

StateDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The coordinator's state folder.", envvar="LYDIAN_STATE_DIR")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def head(state_dir: StateDir = None) -> None:
    """Print the newest row of the audit record as SEQ:HASH, after the whole was checked."""
    with _sentences(), Journal.reading(_journal(state_dir)) as journal:
        found = journal.audit_check(Checker())
    typer.echo(f"{found.seq}:{found.hash}")


@app.command()
def audit(
    since: Annotated[list[str] | None, typer.Option(metavar="SEQ:HASH", help="A head that was noted.")] = None,
    state_dir: StateDir = None,
) -> None:
    """Check the audit record, and every fact that it speaks of."""
    with _sentences():
        try:
            checker = Checker(parse_anchor(text) for text in since or [])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--since") from error
        with Journal.reading(_journal(state_dir)) as journal:
            found = journal.audit_check(checker)
    typer.echo(whole(found, checker))
    typer.echo(checker.proof(), err=True)


@app.command()
def job(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    number: Annotated[int | None, typer.Option("--round", min=1, metavar="N", help="This round alone.")] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Average the closed rounds of a job again, and compare the models with those that were published."""
    folder = (state_dir or coordinator_folder()).expanduser()
    with _sentences():
        facts, broken = _facts(folder, job)
        proofs = list[Proof]()
        for proof in prove(facts, folder, number):
            proofs.append(proof)
            typer.echo(json.dumps({"type": "proof", "job": job, **asdict(proof)}) if as_json else _line(proof))
    if not proofs:
        typer.echo(f"{job} has closed no {'such ' if number is not None else ''}round", err=True)
    count = {verdict: sum(proof.verdict == verdict for proof in proofs) for verdict in ("proven", "wrong")}
    typer.echo(f"{count['proven']} of {len(proofs)} rounds proven, {count['wrong']} wrong", err=True)
    raise typer.Exit(1 if broken or count["wrong"] or not count["proven"] else 0)


def whole(found: AuditHead, checker: Checker) -> str:
    """What to say of a record that holds."""
    return f"{found.seq} rows and {checker.facts} facts are as written; head {found.seq}:{found.hash}"


def _facts(folder: Path, job: str) -> tuple[list[StoredFact], bool]:
    """The facts of a job, and whether the record that vouches for them is broken. Read at once: proofs take long."""
    broken = False
    with Journal.reading(_journal(folder)) as journal:
        try:
            journal.audit_check(Checker())
        except BrokenRecordError as error:
            typer.echo(f"the facts below cannot be trusted: {error}", err=True)
            broken = True
        facts = list(journal.facts(job=job))
    if not facts:
        raise NotFoundError(f"there is no job {job[:80]!r} in {folder}", code="unknown_job")
    return facts, broken


def _line(proof: Proof) -> str:
    return f"round {proof.round}  {proof.verdict}  {proof.digest}  {proof.sentence}"


def _journal(state_dir: Path | None) -> Path:
    return (state_dir or coordinator_folder()).expanduser() / "journal.sqlite"


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except LydianError as error:
        typer.echo(error.lines(), err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"the state folder cannot be read: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()

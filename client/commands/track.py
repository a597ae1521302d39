"""The command `lydian track`."""

from typing import Annotated

import typer

from client.calling import DEFAULT_URL, Token, Url, coordinator
from client.completing import complete_jobs


def track(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=complete_jobs)],
    to: Annotated[list[str], typer.Option("--to", metavar="KIND=TARGET", help="Where to; repeatable.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    url: Url = DEFAULT_URL,
    token: Token = None,
) -> None:
    """Tell a job's rounds to a tracker: losses and metrics, samples, seconds, bytes, workers, who was left out and why.

    The job is read from its beginning, and what a tracker has is not written twice: the same command again goes on
    where it was. The job's settings are the run's hyperparameters. Nothing of it runs on the coordinator.

    \b
    Trackers:
      csv=FILE                  a table, one line a round
      jsonl=FILE                one JSON object a line
      tensorboard=DIR           event files in DIR/JOB           pip install -e '.[tensorboard]'
      wandb=[ENTITY/]PROJECT    Weights & Biases, also offline   pip install -e '.[wandb]'
      trackio=PROJECT           Trackio, on this machine         pip install -e '.[trackio]'
      mlflow=URI                a run of MLflow                  pip install -e '.[mlflow]'

    \b
    Examples:
      lydian track digits-4f2a --to csv=digits.csv
      lydian track digits-4f2a --to tensorboard=runs --to jsonl=digits.jsonl --follow
      WANDB_MODE=offline lydian track digits-4f2a --to wandb=digits
      lydian track digits-4f2a --to mlflow=http://mlflow:5000
    """
    from client.tracking.command import run_track
    from client.tracking.trackers import wish

    wishes = [wish(text) for text in to]
    with coordinator(url, token) as api:
        raise typer.Exit(run_track(api, job, wishes, follow=follow))

"""The way of somebody who has never seen this: from a clone to a model of their own on two workers, timed.

    python3 -m bench.newcomer [--keep]     needs git, make and Python 3.11, and what pip can reach; nothing installed

Every command runs as the README and the tutorial have it, in a clone of what is committed here, in a folder that goes
afterwards. Prints a Markdown table of the commands and their seconds; what they say goes to stderr.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 3600  # for the slowest step, which is the download
BIN = ".venv/bin/lydian"
JOB = ("--min-workers", "2", "--shards", "2", "--rounds", "5")


@dataclass
class Walk:
    """One newcomer: where they are, what they did, and how long it took."""

    folder: Path
    environment: dict[str, str]
    steps: list[tuple[str, str, float]] = field(default_factory=list)  # what, command, seconds

    def run(self, what: str, command: list[str], shown: str = "") -> str:
        """Run a command to its end. Returns its stdout.

        Raises:
            SystemExit: it failed; what it said is on stderr.
        """
        with self.timed(what, shown or " ".join(command)):
            ended = subprocess.run(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
        print(ended.stdout, file=sys.stderr, flush=True)
        if ended.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit code {ended.returncode}: see above")
        return ended.stdout

    @contextmanager
    def timed(self, what: str, command: str) -> Iterator[None]:
        """A step, noted when it is done."""
        print(f"$ {command}", file=sys.stderr, flush=True)
        began = time.monotonic()
        yield
        self.note(what, command, time.monotonic() - began)

    def note(self, what: str, command: str, seconds: float) -> None:
        """Keep what a step took, and say it: a later one may fail."""
        self.steps.append((what, command, seconds))
        print(f"took {seconds:.1f} s", file=sys.stderr, flush=True)

    @contextmanager
    def beside(self, command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A process that runs meanwhile, and is asked to end afterwards."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment | environment, stdout=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def walk(newcomer: Walk) -> float:
    """All steps. Returns the accuracy that their own task came to."""
    newcomer.run("get the code", ["git", "clone", "--quiet", str(ROOT), "."], "git clone REPOSITORY")
    newcomer.run("make an environment, with PyTorch", ["make", ".venv/installed-new"])
    newcomer.run("train: a coordinator, three workers, five rounds", ["make", "demo"])
    with coordinator(newcomer) as (url, state):
        with newcomer.timed("open the dashboard", "GET / and /ui/fleet"):
            look(url, (state / "admin.token").read_text().strip())
        newcomer.run("begin a task of their own", [BIN, "init", "my-model"])
        newcomer.environment |= {"LYDIAN_URL": url, "LYDIAN_TOKEN": (state / "admin.token").read_text().strip()}
        join = (state / "join.token").read_text().strip()
        work = [BIN, "work", url, "--trust", "any", "--threads", "1"]
        first, second = ([*work, "--name", name, "--state-dir", f"state/{name}"] for name in ("one", "two"))
        submit = [BIN, "submit", "my-model/job.toml", *JOB, "--watch", "--json"]
        with newcomer.beside(first, LYDIAN_TOKEN=join), newcomer.beside(second, LYDIAN_TOKEN=join):
            said = newcomer.run("train it on two workers that start meanwhile", submit)
            events = [json.loads(line) for line in said.splitlines()]
            job = next(event["id"] for event in events if "id" in event and "task" in event)
            newcomer.run("fetch the model", [BIN, "pull", job, "-o", "my-model.safetensors"])
    return [event["metrics"]["accuracy"] for event in events if event.get("type") == "evaluation"][-1]


@contextmanager
def coordinator(newcomer: Walk) -> Iterator[tuple[str, Path]]:
    """A coordinator on a free port: its address and its state folder."""
    state = newcomer.folder / "state" / "coordinator"
    command = [BIN, "serve", "--host", "127.0.0.1", "--port", "0", "--state-dir", str(state)]
    began = time.monotonic()
    with newcomer.beside(command) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"{' '.join(command)} did not say that it listens, but {line!r}")
        newcomer.note("start a coordinator", f"{BIN} serve", time.monotonic() - began)
        yield line.split()[1], state


def look(url: str, token: str) -> None:
    """The page, and the fleet in it.

    Raises:
        SystemExit: one of them is not answered with 200.
    """
    for path in ("/", "/ui/fleet"):
        connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        status = connection.getresponse().status
        connection.close()
        if status != 200:
            raise SystemExit(f"{url}{path} was answered with {status}")


def table(steps: list[tuple[str, str, float]]) -> Iterator[str]:
    """The steps as Markdown."""
    yield "| step | command | seconds |"
    yield "|---|---|---|"
    for what, command, seconds in steps:
        yield f"| {what} | `{command}` | {seconds:.1f} |"
    yield f"| in all | | {sum(seconds for _, _, seconds in steps):.0f} |"


def main() -> None:
    """Walk, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is")
    keep = parser.parse_args().keep
    folder = Path(tempfile.mkdtemp(prefix="lydian-newcomer-"))
    unset = ("LYDIAN_", "VIRTUAL_ENV", "MAKE", "MFLAGS")
    newcomer = Walk(folder, {k: v for k, v in os.environ.items() if not k.startswith(unset)})
    try:
        accuracy = walk(newcomer)
    finally:
        if keep:
            print(f"everything is kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(table(newcomer.steps)))
    print(f"\naccuracy of their own model, after five rounds: {accuracy:.3f}")


if __name__ == "__main__":
    main()

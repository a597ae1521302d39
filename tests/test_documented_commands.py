"""Every command that the docs tell people to type: parsed as it stands, and run, or said why it is not run here.

Run against one coordinator with a past that is made up, a model and a worker, on a thread of this process: nothing is
trained. A command of a new kind fails until it has its place in RUN or in NOT_RUN.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save
from typer.testing import CliRunner

from client.main import app
from common.begins import is_file
from common.errors import LydianError
from common.facts import Initialised, StateChanged
from common.messages import ModelFacts
from docs.generate import commands as all_commands
from docs.site.navigation import ROOT, pages
from tests.dashboard_kit import House, accepted, begun, closing, machine, opening
from tests.documented import Command, commands, inline
from tests.rounds_kit import spec

PARSERS = dict(all_commands())
COMMANDS = list({command.words: command for command in reversed(commands())}.values())[::-1]  # each once
JOB, ENDED = "digits-4f2a", "digits-0b1c"
FILES = (
    ("job.toml", "job.toml"),
    ("my_task.py", "my_task.py"),
    ("my_task.py", "task.py"),
    ("scripts/digits.py", "train.py"),
)
"""What readers have, from our examples -> what the docs call it."""

RUN = re.compile(
    r"(lydian|submit_job) (submit|jobs|workers|logs|watch|cancel|pause|resume|drain|readmit|token|pull"
    r"|audit(?!.*--state-dir|.*--follow)|init|pack|sign|top --once|(submit )?[a-z0-9./_-]+\.toml|--version)\b"
)
"""What is run: commands that ask, order or write a file. `--watch` is taken off: nobody trains here."""

NOT_RUN = {
    r"lydian serve\b": "does not end by itself; tests/acceptance/kit.py starts it in every acceptance test",
    r"lydian work\b": "does not end by itself; tests/acceptance/kit.py starts it in every acceptance test",
    r"lydian top\b": "does not end by itself; tests/test_top.py",
    r"lydian demo\b": "trains; tests/acceptance/test_demo.py",
    r"lydian simulate\b": "trains; tests/acceptance/test_simulate.py",
    r"lydian chaos\b": "takes minutes; tests/acceptance/test_chaos.py",
    r"lydian bench\b": "takes minutes; tests/test_bench.py",
    r"lydian doctor\b": "tries this machine's GPUs; tests/acceptance/test_doctor.py",
    r"lydian partition\b": "starts torch; tests/test_partition.py",
    r"lydian plan\b": "asks for a job that was trained; tests/acceptance/test_commands.py",
    r"lydian export\b": "starts torch; tests/acceptance/test_commands.py",
    r"lydian audit --follow\b": "does not end by itself; tests/test_audit.py",
    r"lydian audit \w+ --state-dir\b": "becomes a process of its own; tests/acceptance/test_audit.py",
    r"lydian track\b": "needs the packages of trackers; tests/test_tracking.py",
    r"(\S+=\S+ )?opentelemetry-|pip install opentelemetry": "another program's, around ours",
    r"lydian verify\b": "asks for updates that were trained; tests/acceptance/test_audit.py",
    r"(sudo \S+/)?lydian install-service\b": "changes this machine; tests/test_install_service.py",
    r"lydian --(install|show)-completion$": "changes this user's shell; tests/test_completing.py",
    r"make [a-z-]+\b": "takes minutes; its target is looked for",
    r"pip install -e \.": "asks an index; its file is looked for; tests/test_packaging.py",
    r"python3? -m venv\b": "makes an environment; bench/newcomer.py does",
    r"python3? -m [a-z_.]+": "measures or writes; the module is looked for",
    r"python train\.py\b": "a reader's own script; tests/test_script.py runs one by itself",
    r"python3? examples/": "trains; the file is looked for, and tests/acceptance/test_experiments.py runs them",
    r"uvicorn server\.app:app": "does not end by itself; tests/acceptance/test_commands.py",
    r"(sudo |)tailscale\b": "another program's; docs/tailscale.md says which version",
    r"(sudo |)(apt|apt-get) ": "changes this machine",
    r"docker compose\b": "needs Docker; tests/test_containers.py holds the file to the code",
    r"git clone\b": "asks another host; bench/newcomer.py clones this repository",
    r"(sudo |)(systemctl|journalctl)\b": "asks systemd; tests/test_install_service.py",
}
"""What is not run here -> why, and where it is."""


# ---------------------------------------------------------------- parsed


def found_in(command: Command) -> tuple[Any, str, list[str]]:
    """The parser of a command of ours, its full name, and the words that are left for it."""
    words = list(command.words)
    words[:1] = ["lydian", "submit"] if words[0] == "submit_job" else ["lydian"]
    name, at = words[0], 1
    while at < len(words) and f"{name} {words[at]}" in PARSERS:
        name, at = f"{name} {words[at]}", at + 1
    return PARSERS[name], name, words[at:]


def fault(command: Command, *, whole: bool = True) -> str:
    """What the command's own parser has against it; empty: nothing. Nothing is called, and no file is looked for.

    Args:
        command: which.
        whole: it could be typed as it is; else it is named in a sentence, and what belongs to it may be left out.
    """
    parser, name, words = found_in(command)
    if hasattr(parser, "commands") and words and not words[0].startswith("-"):
        return f"{command}: there is no command {name} {words[0]}"
    if name == "lydian bench":
        return ""  # a program of its own: tests/test_bench.py
    tried = ["1" if word == "N" else word for word in words]
    context = type(parser).context_class(parser, info_name=name, **parser.context_settings)
    try:
        given, left, _ = parser.make_parser(context).parse_args(args=tried)
        for parameter in map(copy, parser.get_params(context)):
            if given.get(parameter.name) is None and not (parameter.required and whole):
                continue
            parameter.callback = None  # --install-completion would do it
            parameter.process_value(context, parameter.consume_value(context, given)[0])
    except Exception as error:  # noqa: BLE001 - click's, which typer brings or imports under another name
        said = f"{type(error).__name__}: {error}"
        return "" if not whole and "requires an argument" in said else f"{command}: {said}"
    return f"{command}: {' '.join(left)} is too much" if left else ""


def test_every_command_of_ours_is_one_that_its_own_parser_takes() -> None:
    ours = [command for command in COMMANDS if command.words[0] in ("lydian", "submit_job")]
    assert len(ours) > 100
    assert [said for command in ours if (said := fault(command))] == []


def test_a_command_in_a_sentence_has_no_option_that_is_not_there() -> None:
    named = [one for page in pages() for one in inline(page, (ROOT / page).read_text(encoding="utf-8"))]
    assert len(named) > 100
    assert [said for command in named if (said := fault(command, whole=False))] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("lydian", "jobs", "--json"), ""), (("submit_job", "digits", "--rounds", "5"), ""),
        (("lydian", "jobz"), "no command lydian jobz"), (("lydian", "token", "burn"), "no command lydian token burn"),
        (("lydian", "submit", "digits", "--round", "5"), "--round"),
        (("lydian", "demo", "--rounds", "many"), "many"), (("lydian", "watch"), "MissingParameter"),
        (("lydian", "work", "http://a:1", "--trusted", "any"), "--trusted"), (("lydian", "jobs", "mine"), "mine"),
    ],
)  # fmt: skip
def test_a_command_that_nobody_could_type_is_named(words: tuple[str, ...], says: str) -> None:
    said = fault(Command("docs/page.md", 7, words))
    assert (said != "") == (says != "")
    assert says in said


def is_there(file: str) -> bool:
    """Whether it is in the repository, or a reader's."""
    return (ROOT / file).is_file() or any(file == theirs for _, theirs in FILES)


def test_what_a_page_asks_of_other_programs_is_there() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    missing = []
    for command in COMMANDS:
        match command.words:
            case ["make", target, *_] if target not in targets and not target.startswith(".venv/"):
                missing.append(command)
            case ["pip", *_, "-r", file] if not (ROOT / file).is_file():
                missing.append(command)
            case ["python" | "python3", "-m", module, *_] if importlib.util.find_spec(module) is None:
                missing.append(command)
            case ["python" | "python3", file, *_] if not (file.startswith("-") or is_there(file)):
                missing.append(command)
    assert [str(command) for command in missing] == []


# ---------------------------------------------------------------- run


def is_run(command: Command) -> bool:
    return RUN.match(" ".join(command.words)) is not None


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    words = {command: " ".join(command.words) for command in COMMANDS if not is_run(command)}
    left = [str(command) for command, said in words.items() if not any(re.match(kind, said) for kind in NOT_RUN)]
    assert left == [], "neither RUN nor NOT_RUN has a place for it"
    for why in NOT_RUN.values():
        assert [path for path in re.findall(r"[a-z]+/[\w/]+\.(?:py|md)", why) if not (ROOT / path).is_file()] == []


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A worker called gpu-box, and a finished-looking round of a job with a real file as its model."""
    running = House(tmp_path_factory.mktemp("house") / "state").open()
    running.add(machine("gpu-box"))
    running.do(lambda: running.coordinator.journal.worker_put("gpu-box", machine("gpu-box")))
    data = save({"weight": np.zeros(3, np.float32)})
    digest = running.do(lambda: running.coordinator.blobs.put_bytes(data))
    facts = ModelFacts(parameters=3, train_samples=20, test_samples=5, bounds=(0, 10, 20))
    first = Initialised(attempt=1, worker="gpu-box", digest=digest, size=len(data), facts=facts)
    past = [*begun(spec(rounds=9))[:2], first, opening(1, 1), accepted(1, 0, "gpu-box", 0.5), *closing(1, 1, 0.5, 0.9)]
    closed = past[-2].model_copy(update={"digest": digest, "size": len(data)})
    running.happen(JOB, [*past[:-2], closed, past[-1], opening(2, 1)])
    running.happen(ENDED, [*past[:-2], closed, past[-1], StateChanged(state="finished", reason="all rounds are done")])
    yield running
    running.close()


@pytest.fixture
def typed(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type commands in, with the files that the docs speak of."""
    for name in [name for name in os.environ if name.startswith("LYDIAN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LYDIAN_URL", house.url)
    monkeypatch.setenv("LYDIAN_TOKEN", house.token)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".config" / "lydian").mkdir(parents=True)
    for source, name in FILES:
        (tmp_path / name).write_text((ROOT / "examples" / source).read_text(encoding="utf-8"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


class Typist:
    """Types commands as a person would, with names of things that are there."""

    def __init__(self, house: House, folder: Path) -> None:
        self.house, self.folder, self.runner, self.turn = house, folder, CliRunner(), 0

    def fault(self, command: Command) -> str:
        """What went wrong; empty: nothing."""
        self.turn += 1
        words = [self.named(word) for word in command.words[1:] if word != "--watch"]
        words = ["submit", *words] if command.words[0] == "submit_job" else words
        self.prepare(words)
        ended = self.runner.invoke(app, words, env=dict(one.split("=", 1) for one in command.settings))
        if ended.exit_code == 0 and ended.exception is None:
            return ""
        said = ended.exception.lines() if isinstance(ended.exception, LydianError) else ended.output[-300:]
        return f"{command} (typed: {' '.join(words)}): exit code {ended.exit_code}: {said} {ended.exception!r}"

    def named(self, word: str) -> str:
        """A word of the docs as it is here."""
        there = {"JOB": JOB, "N": "1", "WORKER": "gpu-box", "http://gpu-box:8470": self.house.url}
        there |= {"JOB@best": f"{JOB}@best", "my-task-3f2a": JOB, "/etc/prometheus/lydian.token": "lydian.token"}
        if re.match(r"SEQ:HASH|841:|\$\(tail", word):
            head: str = self.runner.invoke(app, ["audit", "head"]).stdout.strip()
            return head
        return there.get(word, word)

    def prepare(self, words: list[str]) -> None:
        """Have there what the command speaks of, whatever the ones before it did."""
        match words:
            case ["token", "revoke" | "rotate", name, *_]:
                issued = self.house.do(lambda: self.house.coordinator.tokens.issue("submit", name=name))
                words[2] = issued.split("_")[2]
            case ["watch", *_] | ["logs", _, "--follow", *_]:
                words[1] = ENDED  # it watches to the end
            case ["pause" | "resume" | "cancel" as order, job, *_] if job == JOB:
                words[1] = f"digits-{self.turn}"
                self.house.happen(words[1], begun(spec(rounds=9)))
                if order == "resume":
                    self.runner.invoke(app, ["pause", words[1]])
            case ["pull", *_] if "--round" in words:
                words[words.index("--round") + 1 :] = ["1", "--force"]
            case ["pull", *_] | ["init", *_]:
                words.append("--force")
            case ["submit", *_]:
                for word in (word for word in words if word.endswith(("/job.toml", "/task.py"))):
                    self.runner.invoke(app, ["init", str(Path(word).parent), "--force"])
                if "--init" in words and is_file(words[words.index("--init") + 1]):
                    self.runner.invoke(app, ["pull", JOB, "-o", words[words.index("--init") + 1], "--force"])
            case ["sign", "my_task.py" | "task.py"]:
                (self.folder / "my_task.py.sig").unlink(missing_ok=True)
        for flag in ("--out", "--new-key"):
            if flag in words:
                (self.folder / Path(words[words.index(flag) + 1]).expanduser()).unlink(missing_ok=True)


def test_every_command_that_can_be_run_without_training_is_run(house: House, typed: Path) -> None:
    typist = Typist(house, typed)
    chosen = [command for command in COMMANDS if is_run(command)]
    assert len(chosen) > 40
    assert [said for command in chosen if (said := typist.fault(command))] == []


def test_a_command_that_fails_is_named_with_what_it_said(house: House, typed: Path) -> None:
    said = Typist(house, typed).fault(Command("docs/page.md", 7, ("lydian", "logs", "no-such")))
    assert said.startswith("docs/page.md:7: lydian logs no-such (typed: logs no-such): exit code 1")
    assert "there is no job 'no-such'" in said
    assert isinstance(app, typer.Typer)

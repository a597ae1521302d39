"""deploy/Dockerfile and deploy/compose.yaml, as far as they can be checked without an engine.

The Dockerfile is read by rules of ours that are stricter than Docker's, and every RUN is run by a real shell with the
programs that change a machine (pip, useradd, install) replaced by ones that record what they were asked.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from typer.main import get_command

from client.main import app as lydian
from server.__main__ import app as serve
from server.routes.public import router
from server.settings import Settings
from tests.tls_kit import Listener, written
from worker.__main__ import app as work

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
PORT = Settings().port

# ---------------------------------------------------------------- reading a Dockerfile

FORMS = {
    "ARG": r"[A-Z_]+(=\S*)?",
    "FROM": r"\S+ AS [a-z]+",
    "WORKDIR": r"/\S+",
    "COPY": r"(--from=[a-z]+ )?\S+( \S+)+",
    "RUN": r".+",
    "ENV": r"[A-Z_]+=\S+( [A-Z_]+=\S+)*",
    "USER": r"[a-z]+",
    "VOLUME": r"/\S+( /\S+)*",
    "EXPOSE": r"\d+",
    "STOPSIGNAL": r"SIG[A-Z]+",
    "HEALTHCHECK": r"(--[a-z-]+=\d+s )+CMD \[.+\]",
    "ENTRYPOINT": r"\[.+\]",
    "CMD": r"\[.+\]",
}


@dataclass
class Stage:
    """One FROM and what follows it, with what it stands on."""

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]


def read_dockerfile(text: str) -> tuple[list[str], dict[str, Stage]]:
    """The ARGs before the first FROM, and stage name -> stage; ValueError for what does not fit FORMS."""
    before: list[str] = []
    stages: dict[str, Stage] = {}
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", "", lines).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        if name not in FORMS or not re.fullmatch(FORMS[name], rest):
            raise ValueError(f"not understood: {line!r}")
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            if stage in stages:
                raise ValueError(f"a second stage {stage}")
            stages[stage] = Stage(base, list(stages[base].steps) if base in stages else [])
        elif stages:
            next(reversed(stages.values())).steps.append((name, rest))
        elif name == "ARG":
            before.append(rest)
        else:
            raise ValueError(f"{name} before the first FROM")
    return before, stages


BEFORE, STAGES = read_dockerfile((ROOT / "deploy/Dockerfile").read_text(encoding="utf-8"))
IMAGES = ("coordinator", "worker")


@pytest.mark.parametrize(
    "text",
    ["RUM x", "FROM a", "COPY x y", "FROM a AS b\nENTRYPOINT x", "FROM a AS b\nFROM c AS b", "FROM a AS b\nEXPOSE"],
)
def test_what_is_no_dockerfile_of_ours_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not understood|second stage|before the first"):
        read_dockerfile(text)


# ---------------------------------------------------------------- what is in it


def left_out(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last line that fits decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = [path, *(str(parent) for parent in Path(path).parents), *Path(path).parts]
            if any(fnmatch(part, pattern) for part in (parts if "**" in line else parts[: len(Path(path).parts)])):
                verdict = not line.startswith("!")
    return verdict


def test_everything_that_is_copied_is_in_the_clone_and_reaches_the_build() -> None:
    copied = [text.split()[:-1] for stage in STAGES.values() for text in stage.all("COPY") if "--from" not in text]
    names = {name for each in copied for name in each}
    assert names >= {"pyproject.toml", "README.md", *PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert [name for name in names if not (ROOT / name).exists() or left_out(name)] == []


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/lydian", "worker.env", "server/__pycache__/app.pyc", "tests/kit.py", ".env"]
)
def test_what_the_package_is_not_made_of_stays_out_of_the_build(path: str) -> None:
    assert left_out(path)
    assert not left_out("server/routes/jobs.py")


def test_a_stage_is_copied_from_only_where_it_was_made_before() -> None:
    names = list(STAGES)
    for stage, found in STAGES.items():
        for text in found.all("COPY"):
            if source := re.match(r"--from=(\S+)", text):
                assert names.index(source[1]) < names.index(stage)


def test_every_base_image_is_one_python_that_both_torches_have() -> None:
    outside = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert outside == {"python:${PYTHON}-slim"}
    assert [text.partition("=")[0] for text in BEFORE] == ["PYTHON"]
    minor = int(BEFORE[0].rpartition(".")[2])
    assert 11 <= minor <= 13  # requires-python, and the last one with a legacy torch


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_no_root_keeps_its_state_and_ends_in_good_order(image: str) -> None:
    stage = STAGES[image]
    assert stage.last("USER") == "lydian"
    assert "/state" in stage.last("VOLUME").split()
    assert stage.last("STOPSIGNAL") == "SIGTERM"
    assert not any(name == "RUN" for name, _ in stage.steps[[name for name, _ in stage.steps].index("USER") :])


@pytest.mark.parametrize("image", IMAGES)
def test_no_secret_can_be_in_a_layer(image: str) -> None:
    told = [text for name in ("ARG", "ENV", "RUN", "COPY") for text in STAGES[image].all(name)]
    assert [text for text in told if re.search(r"token|secret|password|authkey", text, re.IGNORECASE)] == []


@pytest.mark.parametrize(("image", "program"), [("coordinator", serve), ("worker", work)])
def test_the_entry_point_is_a_command_with_options_that_it_has(image: str, program: Any) -> None:
    words = json.loads(STAGES[image].last("ENTRYPOINT"))
    more = STAGES[image].all("CMD")
    options = {option for parameter in get_command(program).params for option in parameter.opts}
    assert words[0] in PROJECT["project"]["scripts"]
    assert words[1] in get_command(lydian).commands  # type: ignore[attr-defined]
    assert {word for word in [*words, *(json.loads(more[-1]) if more else [])] if word.startswith("--")} <= options


def test_the_port_is_the_coordinators() -> None:
    assert STAGES["coordinator"].last("EXPOSE") == str(PORT)
    assert STAGES["worker"].all("EXPOSE") == []


# ---------------------------------------------------------------- the health check, run for real


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    """A server that answers with one status: its port, and the paths that it was asked for."""
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *told: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def health(port: int) -> tuple[int, str]:
    """The image's health check, of another port: its exit code, and what it says."""
    words = json.loads(STAGES["coordinator"].last("HEALTHCHECK").partition(" CMD ")[2])
    assert words == ["python", "-m", "server.health", f"127.0.0.1:{PORT}"]
    command = [sys.executable, *words[1:3], f"127.0.0.1:{port}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(("status", "said"), [(200, ""), (503, "answers /healthz with 503\n")])
def test_the_health_check_asks_a_path_that_there_is_and_goes_by_the_answer(status: int, said: str) -> None:
    with answering(status) as (port, asked):
        ended = health(port)
    assert ended == (1 if said else 0, f"127.0.0.1:{port} {said}" if said else "")
    assert asked == ["/healthz"]
    assert asked[0] in {getattr(route, "path", "") for route in router.routes}


def test_the_health_check_speaks_tls_with_a_coordinator_that_does(tmp_path: Path) -> None:
    with Listener(written(tmp_path)) as listener:
        assert health(listener.port) == (0, "")


def test_the_health_check_says_that_nobody_listens() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        code, said = health(port)
    assert (code, said.startswith(f"nobody listens on 127.0.0.1:{port}: ")) == (1, True)


# ---------------------------------------------------------------- every RUN, by a real shell

Run = Callable[..., tuple[int, list[list[str]], str]]


@pytest.fixture
def run_step(tmp_path: Path) -> Run:
    """Run a RUN with build arguments: its exit code, what it asked of the programs that change things, its stderr."""
    tools, wheels, record = tmp_path / "bin", tmp_path / "wheels", tmp_path / "record"
    tools.mkdir()
    wheels.mkdir()
    (wheels / "lydian_training-0.1.0-py3-none-any.whl").touch()
    for name in ("pip", "useradd", "install"):
        program = tools / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> {record}\nprintf "\\n" >> {record}\n')
        program.chmod(0o755)

    def run(text: str, **arguments: str) -> tuple[int, list[list[str]], str]:
        record.write_text("")
        ended = subprocess.run(
            ["/bin/sh", "-c", text.replace("/wheels/", f"{wheels}/")],
            env={"PATH": str(tools), **arguments}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        asked = [line.split("\0")[:-1] for line in record.read_text().splitlines()]
        return ended.returncode, asked, ended.stderr

    return run


def test_every_step_of_an_image_runs_and_asks_for_extras_that_there_are(run_step: Run) -> None:
    asked: list[list[str]] = []
    for stage in STAGES.values():
        for text in stage.all("RUN"):
            code, calls, said = run_step(text, TORCH="new")
            assert (code, said) == (0, ""), text
            asked += calls
    extras: set[str] = set()
    for call in asked:
        if call[:2] == ["pip", "install"]:
            wheel, _, rest = call[-1].rpartition("/")[2].partition("[")
            extras |= Requirement(f"{wheel.partition('-')[0]}[{rest}").extras
    assert extras == {"server", "new-gpu"}
    assert extras <= EXTRAS
    assert ["pip", "wheel", "--no-cache-dir", "--no-deps", "--wheel-dir", "/wheels", "."] in asked


@pytest.mark.parametrize(
    ("torch", "index", "last"),
    [
        ("new", "", "[new-gpu]"),
        ("legacy", "", "[legacy-gpu]"),
        ("cpu", "http://cpu.example/whl", "[new-gpu]"),
        ("new", "http://own.example/whl", "[new-gpu]"),
    ],
)
def test_a_worker_gets_the_torch_that_was_asked_for(torch: str, index: str, last: str, run_step: Run) -> None:
    code, calls, _ = run_step(STAGES["worker"].last("RUN"), TORCH=torch, TORCH_INDEX=index)
    assert code == 0
    assert calls[0][-1].endswith(f".whl{last}")
    assert calls[0][2:-1] == ["--no-cache-dir", *(["--extra-index-url", index] if index else [])]
    assert last.strip("[]") in EXTRAS


@pytest.mark.parametrize(("torch", "said"), [("cpu", "TORCH_INDEX"), ("newest", "new, legacy or cpu")])
def test_a_torch_that_cannot_be_installed_ends_the_build_in_words(torch: str, said: str, run_step: Run) -> None:
    code, calls, stderr = run_step(STAGES["worker"].last("RUN"), TORCH=torch)
    assert (code, calls) == (1, [])
    assert said in stderr


# ---------------------------------------------------------------- compose

COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
KEYS = {
    "build", "image", "profiles", "hostname", "ports", "volumes", "restart", "read_only", "tmpfs", "cap_drop",
    "security_opt", "stop_grace_period", "environment", "shm_size", "network_mode", "depends_on", "command", "deploy",
}  # fmt: skip


def test_every_key_of_the_compose_file_is_one_that_we_know() -> None:
    assert {key for service in SERVICES.values() for key in service} <= KEYS
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "volumes"}


def test_each_service_is_in_one_profile_so_that_nothing_starts_by_itself() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items()}
    assert profiles == {
        "coordinator": ["local"],
        "tailscale": ["tailnet"],
        "coordinator-tailnet": ["tailnet"],
        "worker": ["worker"],
        "worker-gpu": ["gpu"],
    }


def test_our_services_are_built_from_stages_and_arguments_that_there_are() -> None:
    for service in OURS.values():
        build = service["build"]
        assert (ROOT / "deploy" / build["context"] / build["dockerfile"]).samefile(ROOT / "deploy/Dockerfile")
        arguments = {text.partition("=")[0] for text in STAGES[build["target"]].all("ARG")}
        assert set(build.get("args", {})) <= arguments


def test_our_services_have_no_rights_and_write_to_their_volumes_alone() -> None:
    for service in OURS.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        mounted = {mount.split(":")[1] for mount in service["volumes"]}
        assert set(STAGES[service["build"]["target"]].last("VOLUME").split()) <= mounted


def test_every_volume_is_declared_and_used() -> None:
    used = {mount.split(":")[0] for service in SERVICES.values() for mount in service["volumes"]}
    assert used == set(COMPOSE["volumes"])


def test_the_coordinator_is_published_to_this_machine_alone() -> None:
    assert [service.get("ports") for service in SERVICES.values()] == [[f"127.0.0.1:{PORT}:{PORT}"], *[None] * 4]


def test_a_coordinator_on_the_tailnet_shares_tailscales_network_and_socket() -> None:
    coordinator, tailscale = SERVICES["coordinator-tailnet"], SERVICES["tailscale"]
    assert coordinator["network_mode"] == "service:tailscale"
    assert coordinator["depends_on"] == ["tailscale"]
    assert coordinator["command"] == []  # else the image's --host would keep it from asking tailscaled
    socket = Path(tailscale["environment"]["TS_SOCKET"])
    assert f"tailscaled:{socket.parent}" in tailscale["volumes"]
    assert f"tailscaled:{socket.parent}:ro" in coordinator["volumes"]


def test_secrets_come_from_outside_the_compose_file() -> None:
    text = (ROOT / "deploy/compose.yaml").read_text(encoding="utf-8")
    values = [value for service in SERVICES.values() for key, value in service.get("environment", {}).items()
              if re.search("TOKEN|KEY", key)]  # fmt: skip
    assert set(values) == {"${LYDIAN_TOKEN:-}", "${TS_AUTHKEY:-}"}
    assert re.search(r"lyd_|tskey-", text) is None


def test_a_worker_has_time_to_finish_and_names_options_that_it_has() -> None:
    options = {option for parameter in get_command(work).params for option in parameter.opts}
    grace = next(parameter.default for parameter in get_command(work).params if parameter.name == "grace")
    for name in ("worker", "worker-gpu"):
        service = SERVICES[name]
        assert int(service["stop_grace_period"].removesuffix("s")) >= grace + 10
        assert {word for word in service["command"] if word.startswith("--")} <= options


def test_only_the_gpu_worker_asks_for_gpus() -> None:
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["worker-gpu"]
    devices = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]

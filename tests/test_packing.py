"""A Flower app is packed, told apart and refused without Flower and without torch: texts in, texts out."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.flower_app import packed, read_app, settings
from client.job_file import read_job, set_layer
from client.main import app as commands
from client.packing import App, app_of, literal, measured_by_clients, names_of_flower, pack, remarks, unpack
from client.task_file import check_task, script_of
from common.errors import BadJobError, BadTaskError, LydianError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "flower"
PROJECT = """
[project]
name = "my app"
[tool.flwr.app.components]
serverapp = "pkg.server_app:app"
clientapp = "pkg.client_app:app"
[tool.flwr.app.config]
num-server-rounds = 4
lr = 0.1
far = inf
name = "it's"
nested.deep = true
"""
CLIENT = "from flwr.clientapp import ClientApp\napp = ClientApp()\n@app.evaluate()\ndef evaluate(m, c): ...\n"
FILES = {"pyproject.toml": PROJECT, "pkg/__init__.py": "", "pkg/client_app.py": CLIENT,
         "pkg/server_app.py": "from flwr.serverapp.strategy import FedAvg\n"}  # fmt: skip


def made(**changed: str) -> App:
    """The app with other texts in its files; a file's name has _ for / and no suffix."""
    names = {"project": "pyproject.toml", "client": "pkg/client_app.py", "server": "pkg/server_app.py"}
    return app_of(FILES | {names[name]: text for name, text in changed.items()}, "DIR")


# ---------------------------------------------------------------- one script


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("'\\\r\n\0\"")))
def test_a_text_comes_back_from_its_literal_whatever_is_in_it(text: str) -> None:
    assert ast.literal_eval(literal(text)) == text


def test_a_packed_app_is_a_script_that_gives_the_same_app_and_the_same_bytes_again() -> None:
    app = made()
    source = pack(app)
    check_task(source.encode(), "app.py")
    script = script_of(source)
    assert script is not None
    assert not script.shares
    assert unpack(source, "app.py") == app
    assert pack(app_of(dict(reversed(FILES.items())), "DIR")) == source
    assert CLIENT in source, "it can be read"
    assert "'far': float('inf')" in source
    assert app.config == {"num-server-rounds": 4, "lr": 0.1, "far": float("inf"), "name": "it's", "nested.deep": True}


@pytest.mark.parametrize(
    "source", ["import lydian\n", "x = 'lydian.flower.run'\n", "lydian.flower.run(\n", "FILES = {}; lydian.flower.run"]
)
def test_another_script_is_no_packed_app(source: str) -> None:
    if source.startswith("FILES"):  # somebody wrote it by hand
        with pytest.raises(BadTaskError, match=r"app\.py has no pyproject\.toml"):
            unpack(source, "app.py")
    else:
        assert unpack(source, "app.py") is None


@pytest.mark.parametrize(
    ("project", "sentence"),
    [
        ("x =", "DIR/pyproject.toml is not TOML: "),
        ("[project]\n", "DIR/pyproject.toml has no serverapp under [tool.flwr.app.components]"),
        (PROJECT.replace("clientapp", "other"), "DIR/pyproject.toml has no clientapp under"),
        (PROJECT.replace('"pkg.client_app:app"', "3"), "clientapp = 3 is not PACKAGE.MODULE:NAME"),
        (PROJECT.replace("pkg.client_app:app", "pkg.client_app"), "'pkg.client_app' is not PACKAGE.MODULE:NAME"),
        (PROJECT.replace("pkg.client_app:app", "pkg.other:app"), "there is no pkg/other.py in DIR"),
        (PROJECT + "list = [1]\n", "list under [tool.flwr.app.config] is a list"),
    ],
)
def test_a_project_that_is_no_flower_app_is_refused_in_a_sentence(project: str, sentence: str) -> None:
    with pytest.raises(BadTaskError) as refused:
        made(project=project)
    assert sentence in str(refused.value)


def test_a_component_may_be_a_package_and_the_name_its_own() -> None:
    project = PROJECT.replace("pkg.client_app:app", "pkg:app").replace('name = "my app"', "")
    assert (made(project=project).client, made(project=project).name) == ("pkg:app", "pkg")


@pytest.mark.parametrize(
    ("client", "name", "advice"),
    [
        ("from flwr.client.mod import secaggplus_mod as x\n", "secaggplus_mod", "--secure-enabled true"),
        ("from flwr.clientapp.mod import fixedclipping_mod\n", "fixedclipping_mod", "[privacy]"),
        ("import flwr as fl\nfl.server.strategy.DPFedAvgFixed()\n", "DPFedAvgFixed", "[privacy]"),
        ("from flwr.server import strategy\nstrategy.FedXgbBagging()\n", "FedXgbBagging", "trees"),
    ],
)
def test_what_has_its_other_half_on_flowers_server_is_refused_with_what_there_is_instead(
    client: str, name: str, advice: str
) -> None:
    with pytest.raises(BadTaskError, match=rf"DIR uses Flower's {name}, which cannot be carried") as refused:
        made(client=client)
    assert advice in refused.value.advice


def test_only_names_of_flower_count() -> None:
    assert names_of_flower(made(client="from other import Krum\nKrum.FedAdam\n", server="")) == set()


def test_whoever_submits_is_told_that_the_strategy_does_not_average() -> None:
    assert list(remarks(made(), "fedavg", "none")) == []
    odd = made(server="from flwr.serverapp.strategy import FedAdam, QFedAvg\n", project=PROJECT.replace("num-", "n-"))
    said = list(remarks(odd, "fedavg", "median"))
    assert said[0].startswith("the app has Flower's FedAdam, and this job is averaged by fedavg, robust = median")
    assert "most like it is --algorithm fedadam" in said[0]
    assert "nothing here is like it" in said[1]
    assert "has no num-server-rounds" in said[2]


@pytest.mark.parametrize(
    ("client", "server", "theirs"),
    [
        (CLIENT, "", True),
        ("class C:\n    def evaluate(self): ...\n", "", True),
        ("class C:\n    def fit(self): ...\n@wraps\ndef f(): ...\n@app.train()\ndef t(): ...\n", "", False),
        (CLIENT, "strategy.start(evaluate_fn=f)\n", False),
    ],
)
def test_clients_measure_where_they_can_and_the_server_does_not(client: str, server: str, theirs: bool) -> None:
    assert measured_by_clients(made(client=client, server=server)) is theirs


# ---------------------------------------------------------------- a folder, and the job that it makes


def write(folder: Path, **more: bytes) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_folder_gives_its_python_files_and_nothing_of_environments_caches_and_data(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for name in (".venv/a.py", "env/pyvenv.cfg", "env/b.py", "pkg/__pycache__/c.py", "pkg/d.csv", "pkg/pyproject.toml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "pkg/link").symlink_to(folder / "env")
    assert set(read_app(folder).files) == set(FILES)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("pkg/client_app.py", b"def", r"pkg/client_app\.py:1: "),
        ("pkg/client_app.py", b"\xff", r"pkg/client_app\.py is not UTF-8"),
        ("pyproject.toml", b"\xff", r"pyproject\.toml is not UTF-8"),
        ("pkg/big.py", b"#" * (1 << 20), r"bytes of Python, and a task has at most"),
    ],
)
def test_a_folder_that_cannot_travel_is_refused_naming_the_file(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (write(tmp_path) / name).write_bytes(content)
    with pytest.raises(BadTaskError, match=sentence):
        packed(tmp_path)


def test_no_folder_and_no_project_are_two_sentences(tmp_path: Path) -> None:
    with pytest.raises(BadTaskError, match="is not a folder"):
        packed(tmp_path / "nowhere")
    with pytest.raises(BadTaskError, match=r"has no pyproject\.toml"):
        packed(tmp_path)


def test_the_app_says_rounds_and_who_measures_and_flags_count_more() -> None:
    said = settings(made(), {})
    assert said == {("rounds",): 4, ("config", "num-server-rounds"): 4, ("evaluation", "scope"): "workers"}
    assert settings(made(), {("rounds",): 7})["config", "num-server-rounds"] == 7
    assert settings(made(), {("config", "num-server-rounds"): 2})["rounds",] == 2
    assert settings(made(project=PROJECT.replace("num-", "n-"), client=""), {("config", "num-supernodes"): 9}) == {}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({("config", "lrr"): 1}, "config.lrr is no key of the app's [tool.flwr.app.config]: there are far, lr, name"),
        ({("config", "lr"): [1]}, "config.lr is a list"),
        ({("rounds",): 3, ("config", "num-server-rounds"): 4}, "rounds = 3 and config.num-server-rounds = 4 are two"),
        ({("arguments",): ("--x",)}, "arguments are for a script's command line"),
    ],
)
def test_settings_that_no_app_takes_are_refused_at_submit(given: dict[tuple[str, ...], object], sentence: str) -> None:
    with pytest.raises(BadJobError) as refused:
        settings(made(), given)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("name", ["digits", "digits_numpy"])
def test_an_example_becomes_a_job_by_folder_and_by_packed_script_alike(name: str, tmp_path: Path) -> None:
    sets = set_layer(["config.lr=0.2", "round.min_workers=2"])
    job = read_job(None, {}, sets, EXAMPLES / name)
    assert (job.spec.rounds, job.spec.script, job.spec.data.partition) == (3, True, "local")
    assert job.spec.config == {"num-server-rounds": 3, "lr": 0.2}
    assert (job.spec.evaluation.scope, job.remarks) == ("workers", ())

    file = tmp_path / f"{job.spec.task}.py"
    done = CliRunner().invoke(commands, ["pack", str(EXAMPLES / name), "-o", str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file}\n")
    assert CliRunner().invoke(commands, ["pack", str(EXAMPLES / name)]).stdout == file.read_text()
    again = read_job(None, {}, set_layer([f'task="{file}"', "config.lr=0.2", "round.min_workers=2"]))
    assert again == job


def test_pack_writes_python_files_only_and_where_it_may(tmp_path: Path) -> None:
    name = str(EXAMPLES / "digits")
    assert CliRunner().invoke(commands, ["pack", name, "-o", str(tmp_path / "a.txt")]).exit_code == 2
    error = CliRunner().invoke(commands, ["pack", name, "-o", str(tmp_path / "no" / "a.py")]).exception
    assert isinstance(error, LydianError)
    assert "cannot be written" in str(error)


def test_a_job_has_one_task(tmp_path: Path) -> None:
    with pytest.raises(BadJobError, match=r"task in --set and --flower .* both name the task"):
        read_job(None, {}, set_layer(["task=digits"]), EXAMPLES / "digits")

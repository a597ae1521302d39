"""Flower apps with Flower itself: the same folders under its own strategy and here. `make test-flower` runs these.

Flower pins what our coordinator needs newer, so it is in no environment of ours, and this is skipped there; what needs
no Flower is in test_packing.py and test_flower_arrays.py.
"""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from client.flower_app import packed, read_app
from client.packing import app_of, pack
from lydian import loop
from tests.test_script import Desk

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed here: make test-flower"),
    pytest.mark.filterwarnings("ignore"),  # Flower's own
]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "flower"
PROJECT = """
[tool.flwr.app.components]
serverapp = "small.server:app"
clientapp = "small.client:app"
[tool.flwr.app.config]
num-server-rounds = 3
lr = 0.5
"""
SERVER = """
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedProx
app = ServerApp()
@app.main()
def main(grid, context):
    strategy = FedProx(proximal_mu=0.25, min_available_nodes=7, fraction_train=0.5)
    strategy.start(grid=grid, initial_arrays=ArrayRecord([np.zeros(3, np.float32)]), num_rounds=3,
                   train_config=ConfigRecord({"lr": context.run_config["lr"]}))
"""
CLIENT = """
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    config, at = message.content["config"], context.node_config
    assert (config["server-round"], config["lr"], config["proximal-mu"]) == (2, 0.5, 0.25)
    assert at["scans"] == "/data/scans" and context.run_config == {"num-server-rounds": 3, "lr": 0.5}
    arrays = [array + at["partition-id"] + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    seen = context.state.config_records.setdefault("seen", ConfigRecord({"times": 0}))
    seen["times"] += 1
    metrics = {"num-examples": 10 * (at["partition-id"] + 1), "of": at["num-partitions"], "times": seen["times"]}
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}), reply_to=message)
@app.evaluate()
def evaluate(message, context):
    metrics = MetricRecord({"num-examples": 5, "mean": float(message.content["arrays"].to_numpy_ndarrays()[0].mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""
LEGACY = """
import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
class Client(NumPyClient):
    def get_parameters(self, config):
        return [np.full(2, 3, np.float32)]
    def fit(self, parameters, config):
        return [parameters[0] * 2], 4, {"note": "a text", "twice": 2.0}
def server_fn(context):
    return ServerAppComponents(strategy=FedAvg(), config=ServerConfig(num_rounds=3))
client, app = ClientApp(lambda context: Client().to_client()), ServerApp(server_fn=server_fn)
"""


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    loop.put(loop.Alone())
    yield
    loop.put(loop.Alone())
    forget("small", "digits_flower", "digits_numpy")


def forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def small(client: str = CLIENT, server: str = SERVER) -> str:
    return pack(app_of({"pyproject.toml": PROJECT, "small/client.py": client, "small/server.py": server}, "DIR"))


# ---------------------------------------------------------------- unmodified: under Flower, and here


def under_flower(folder: Path, kind: str, seeds: tuple[int, int]) -> dict[str, np.ndarray]:
    """What one round of Flower's own FedAvg over two clients makes of an app, in this process.

    Args:
        folder: the app.
        kind: messages or numpy: which API.
        seeds: before the ServerApp begins, and before the clients train, as our job has them.
    """
    from flwr.app import Context, RecordDict
    from flwr.serverapp import strategy as strategies
    from flwr.supercore.task_identity import TaskIdentity

    from lydian.flower import loaded
    from lydian.flower_server import Caught, ask, grid_of, numbers_of

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    sys.path.insert(0, str(folder))
    app = read_app(folder)
    config = {**app.config, "num-server-rounds": 1}

    def context(partition: int) -> Context:
        at = {"partition-id": partition, "num-partitions": 2}
        return Context(1, partition + 1, at, RecordDict(), config)

    def clients(self: Any, messages: Any, *, timeout: float | None = None) -> list[Any]:
        torch.manual_seed(seeds[1])
        asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        return [client(message, context(message.metadata.dst_node_id - 1)) for message in asked]

    try:
        seed(seeds[0])
        server, client = loaded(app.server), loaded(app.client)
        grid = grid_of((1, 2))
        type(grid).send_and_receive = clients
        if kind == "messages":
            kept: list[Any] = []
            whole = strategies.FedAvg.start
            strategies.FedAvg.start = lambda *given, **named: kept.append(whole(*given, **named)) or kept[0]
            try:
                server(grid, context(0))
            finally:
                strategies.FedAvg.start = whole
            return dict(numbers_of(kept[0].arrays))
        served = ask(server, context(0))  # its own loop wants threads: two steps of it, by Flower's own strategy
        first = served.first(lambda message: client(message, context(0)))
        sent = [served.message("train", 1, first, at, 2) for at in (0, 1)]
        replies = clients(None, sent)
        from flwr.compat.common.parameter import parameters_to_ndarrays
        from flwr.compat.common.recorddict_compat import recorddict_to_fitres

        fitted = [(None, recorddict_to_fitres(reply.content, keep_input=True)) for reply in replies]
        averaged, _ = served.strategy.aggregate_fit(1, fitted, [])
        return {str(at): array for at, array in enumerate(parameters_to_ndarrays(averaged))}
    except Caught as caught:
        raise AssertionError("the strategy did not start") from caught
    finally:
        sys.path.remove(str(folder))
        forget("digits_flower", "digits_numpy")


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.mark.parametrize(("name", "kind"), [("digits", "messages"), ("digits_numpy", "numpy")])
def test_a_round_of_two_clients_gives_what_flowers_own_fedavg_gives_of_the_same_folder(
    desk: Desk, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the ServerApp writes final_model.safetensors
    truth = under_flower(EXAMPLES / name, kind, seeds=(7, 5))
    train = {**desk.train(), "round": 1, "shard": 0, "shards": 1}
    config = {"num-supernodes": 2, "num-server-rounds": 1}
    commands = desk.init(), train, desk.evaluate()
    _, init, trained, measured, closed = desk.run(packed(EXAMPLES / name)[1], *commands, config=config)
    assert (init["event"], trained["samples"], closed) == ("done", 1_439, {"event": "done"})
    assert measured["metrics"]["accuracy"][1] == 358
    ours = load_file(desk.path("out"))
    assert ours.keys() == truth.keys()
    for array, theirs in ((ours[name], truth[name]) for name in ours):
        np.testing.assert_allclose(array, theirs, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(load_file(desk.path("base"))[min(ours)], ours[min(ours)])


# ---------------------------------------------------------------- what an app is told, and what it tells


def test_a_client_gets_its_strategys_config_its_partition_and_the_owners_folders(desk: Desk) -> None:
    commands = desk.init(), desk.evaluate(), desk.train("a"), desk.train("b"), desk.evaluate()
    _, _, before, first, second, measured, _ = desk.run(small(), *commands)
    assert before["metrics"] == {}, "it knows of no partition yet"
    assert (first["samples"], first["metrics"]) == (20, {"of": [40.0, 20.0], "times": [20.0, 20.0]})
    assert second["metrics"]["times"] == [40.0, 20.0], "a client's state lives on"
    assert load_file(desk.path("a"))["0"].tolist() == [2, 2, 2]
    assert measured["metrics"] == {"mean": [0.0, 5.0]}


def test_a_worker_has_as_many_of_the_clients_as_fall_to_it_and_averages_them(desk: Desk) -> None:
    _, _, trained, _ = desk.run(small(), desk.init(), desk.train(), config={"num-supernodes": 5})
    assert trained["samples"] == 20 + 40, "partitions 1 and 3 of 5: shard 1 of 2"
    np.testing.assert_allclose(load_file(desk.path("out"))["0"], (20 * 2 + 40 * 4) / 60)


def test_the_app_is_loaded_anew_when_its_data_is_cut_into_another_number_of_parts(desk: Desk) -> None:
    once = "import builtins\nbuiltins.loads = getattr(builtins, 'loads', 0) + 1\n"
    client = once + CLIENT.replace('"times": seen["times"]', '"times": builtins.loads')
    again = {**desk.train(), "shards": 3}
    _, _, first, same, other, _ = desk.run(small(client), desk.init(), desk.train(), desk.train(), again)
    counts = [done["metrics"]["times"][0] / done["samples"] for done in (first, same, other)]
    assert counts[0] == counts[1] == counts[2] - 1


def test_the_older_api_may_take_its_first_arrays_from_a_client_and_measure_nothing(desk: Desk) -> None:
    project = PROJECT.replace("small.server:app", "small:app").replace("small.client:app", "small:client")
    source = pack(app_of({"pyproject.toml": project, "small.py": LEGACY}, "DIR"))
    _, _, trained, measured, _ = desk.run(source, desk.init(), desk.train(), desk.evaluate())
    assert load_file(desk.path("base"))["0"].tolist() == [3, 3]
    assert load_file(desk.path("out"))["0"].tolist() == [6, 6]
    assert (trained["samples"], trained["metrics"], measured["metrics"]) == (4, {"twice": [8.0, 4.0]}, {})


def test_an_evaluate_fn_measures_in_place_of_the_clients(desk: Desk) -> None:
    server = SERVER.replace("num_rounds=3,", "num_rounds=3, evaluate_fn=central,")
    server += 'central = lambda number, arrays: MetricRecord({"central": float(arrays.to_numpy_ndarrays()[0].sum())})\n'
    _, _, _, measured, _ = desk.run(small(server=server), desk.init(), desk.train(), desk.evaluate())
    assert measured["metrics"] == {"central": [0.0, 1.0]}


# ---------------------------------------------------------------- what goes wrong

REPLY = CLIENT[CLIENT.index("return Message") : CLIENT.index("\n@app.evaluate")]


@pytest.mark.parametrize(
    ("there", "here", "code", "sentence"),
    [
        ("    config, at", "    1 / 0\n    config, at", "task_failed",
         "ZeroDivisionError in client.py, line 8, in round 2: division by zero"),
        ('"num-examples": 10 * (at["partition-id"] + 1), ', "", "task_failed",
         "has no num-examples in its MetricRecord"),
        ("ArrayRecord(arrays)", "ArrayRecord([np.ones((2, 2))])", "task_failed",
         "the client gave '0' as float64 [2, 2], and the model that the job began with has it as float32 [3]"),
        ('"arrays": ArrayRecord(arrays), ', "", "task_failed", "has 0 ArrayRecords and 1 MetricRecords"),
        (REPLY, "return None", "task_failed", "the ClientApp answered 'train' with a NoneType and no Message"),
        (REPLY, "from flwr.app import Error; return Message(Error(3, 'no data'), reply_to=message)", "task_failed",
         "the ClientApp answered with an error: no data (code 3)"),
        ("import numpy", "import nowhere\nimport numpy", "missing_package",
         "ModuleNotFoundError in client.py, line 2, before lydian.rounds(model): No module named 'nowhere'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_client_is_said_with_its_line(
    desk: Desk, there: str, here: str, code: str, sentence: str
) -> None:
    assert there in CLIENT
    error = desk.fails(small(CLIENT.replace(there, here, 1)), desk.init(), desk.train())
    assert error["code"] == code
    assert sentence in error["sentence"], error["sentence"]
    assert "Traceback" in error["detail"]


def test_an_error_in_an_evaluation_is_the_apps_and_its_training_goes_on(desk: Desk) -> None:
    client = CLIENT.replace('{"num-examples": 5, ', "{")
    _, _, _, measured, trained, _ = desk.run(small(client), desk.init(), desk.train(), desk.evaluate(), desk.train())
    assert measured["code"] == "task_failed"
    assert "the reply to 'evaluate' has no num-examples" in measured["sentence"]
    assert trained["event"] == "done"


@pytest.mark.parametrize(
    ("there", "here", "sentence"),
    [
        ("    strategy.start(", "    grid.send_and_receive([])\n    strategy.start(",
         "the app calls send_and_receive(…) by itself: only the rounds of a strategy are carried"),
        ("    strategy.start(", "    return\n    strategy.start(", "came to its end and never to strategy.start"),
        ("ArrayRecord([np.zeros(3, np.float32)])", "None", "FedProx.start(…) was given no ArrayRecord"),
        ("fraction_train=0.5", "fraction_train=0.0", "FedProx sends no client anything to train on"),
        ("def main(grid, context):", "def main(grid, context):\n    raise KeyError('no-key')",
         "KeyError in server.py, line 9, before lydian.rounds(model): 'no-key'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_server_is_said(desk: Desk, there: str, here: str, sentence: str) -> None:
    assert there in SERVER
    error = desk.fails(small(server=SERVER.replace(there, here, 1)), desk.init(), desk.train())
    assert sentence in error["sentence"], error["sentence"]


def test_a_worker_more_than_there_are_clients_says_so(desk: Desk) -> None:
    error = desk.fails(small(), desk.init(), desk.train(), config={"num-supernodes": 1})
    assert "num-supernodes is 1, and this is worker 2 of 2, with no client left for it" in error["sentence"]
    error = desk.fails(small(), desk.init(), config={"num-supernodes": 0})
    assert "config.num-supernodes is 0" in error["sentence"]


def test_a_start_of_the_apps_own_is_caught_as_well(desk: Desk) -> None:
    own = "class Own(FedProx):\n    def start(self, grid, initial_arrays, num_rounds=3, train_config=None): 1 / 0\n"
    server = SERVER.replace("app = ServerApp()", own + "app = ServerApp()").replace("FedProx(prox", "Own(prox")
    assert [answer["event"] for answer in desk.run(small(server=server), desk.init(), desk.train())] == ["done"] * 4


def test_a_workflow_that_masks_is_refused_and_another_is_carried(desk: Desk) -> None:
    server = """
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig, strategy, workflow
from flwr.serverapp import ServerApp
import numpy as np
app = ServerApp()
@app.main()
def main(grid, context):
    begin = strategy.FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(2, np.float32)]))
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=3), strategy=begin)
    masks = getattr(workflow, "Sec" + "AggPlusWorkflow")(num_shares=3, reconstruction_threshold=2)
    workflow.DefaultWorkflow(fit_workflow=masks)(grid, legacy)
"""
    error = desk.fails(small(server=server), desk.init())
    assert "SecAggPlusWorkflow masks between Flower's server and clients: submit with --secure" in error["sentence"]
    answers = desk.run(small(server=server.replace("fit_workflow=masks", "")), desk.init())
    assert [answer["event"] for answer in answers][-2:] == ["done", "done"]

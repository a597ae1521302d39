"""A Flower app in rounds: `lydian.flower.run(FILES)`, which the script that `lydian pack` writes consists of.

    files ──▶ a folder ──▶ ServerApp, up to its rounds ──▶ first arrays ──▶ lydian.rounds(…)
                                                     for each: Message ──▶ ClientApp ──▶ reply
                                             this worker's update: arrays, num-examples, metrics

Nothing of Flower's runtime is started: no SuperLink, no SuperNode, no gRPC, no Ray. Its own Message and Context are
made here, its own ClientApp is called in this process, mods and lifespan with it.
"""

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lydian.loop import Here, Round, config, owns, rounds

RUN_ID = 1
CLIENTS = "num-supernodes"
"""The key of the job's [config] that says how many clients there are, where that is not one a worker."""


def run(files: Mapping[str, str], *, server: str, client: str, config: Mapping[str, Any]) -> None:
    """Train a Flower app in the rounds of a job.

    Args:
        files: path in the app's folder -> text.
        server: the ServerApp, as `package.module:name`.
        client: the ClientApp.
        config: the app's own; the job's [config] counts more.

    Raises:
        ModuleNotFoundError: Flower is not installed here, or another version than this was written for.
        RuntimeError, ValueError: what the app asks for, or gives back, cannot be carried.
    """
    if (devices := os.environ.get("WORLD_SIZE", "1")) != "1":
        sentence = f"a Flower app trains on one device, and this worker has {devices} that train together"
        raise RuntimeError(f"{sentence}: start a worker for each GPU, --device cuda:1")
    need_flower()
    with tempfile.TemporaryDirectory(prefix="lydian-flower-") as made:
        folder = Path(made).resolve()
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        owns(f"{folder}/")
        sys.path.insert(0, str(folder))
        try:
            train(server, Clients(folder, client, config))
        finally:
            sys.path.remove(str(folder))
            unload(folder)


def need_flower() -> None:
    """Make sure that Flower is here.

    Raises:
        ModuleNotFoundError: it is not, or its parts are elsewhere than they were.
    """
    try:
        import flwr
    except ModuleNotFoundError as error:
        if error.name != "flwr":
            raise
        sentence = "Flower is not installed here: pip install 'flwr>=1.42' in the worker's environment"
        raise ModuleNotFoundError(sentence, name="flwr") from error
    logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells of a sampling that is not ours
    try:
        importlib.import_module("lydian.flower_server")
    except ImportError as error:
        sentence = f"flwr {getattr(flwr, '__version__', '')} is here, and this was written for 1.42: {error}"
        raise ModuleNotFoundError(f"{sentence}; pip install 'flwr==1.42.0' in the worker's environment") from error


# ---------------------------------------------------------------- the rounds


def train(server: str, clients: "Clients") -> None:
    """Ask the ServerApp, then have the ClientApp train until the job is over."""
    from flwr.supercore.task_identity import TaskIdentity

    from lydian.flower_arrays import Arrays
    from lydian.flower_server import ask

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1
    served = ask(loaded(server), clients.context(None, 0))
    model = Arrays(served.first(lambda message: clients.send(message, 0, 1)))

    def evaluate(_: object) -> Mapping[str, Any]:
        if served.measures:
            return numbers(served.measure(clients.number, model.arrays()))
        return clients.measured(served, model.arrays())

    measurable = served.measures or clients.measure
    for round in rounds(model, evaluate=evaluate if measurable else None):  # noqa: A001 - the word of a script
        if round.number == 1 and round.rounds != served.rounds:
            say(f"the app asks for {served.rounds} rounds, and the job has {round.rounds}")
        found = clients.trained(served, model.arrays(), round)
        if found is not None:
            mean, metrics = found
            model.put(mean.arrays(), "the client")
            round.report(samples=mean.samples, metrics=metrics)


def say(sentence: str) -> None:
    """A line for the worker's log."""
    sys.stderr.write(f"lydian.flower: {sentence}\n")


class Clients:
    """The clients of this worker: partitions of the data, each with its own Context, and one ClientApp."""

    def __init__(self, folder: Path, client: str, known: Mapping[str, Any]) -> None:
        """Take an app that lies in a folder which Python imports from."""
        given = {**known, **config()}
        self._all = given.get(CLIENTS) if CLIENTS in known else given.pop(CLIENTS, None)
        if self._all is not None and (not isinstance(self._all, int) or self._all < 1):
            raise ValueError(f"config.{CLIENTS} is {self._all!r}, where a whole number of at least 1 is needed")
        self._folder, self._client, self._config = folder, client, given
        self._states = dict[int | None, Any]()
        self._app, self._of = loaded(client), 0
        self.number, self._own = 0, list[int]()  # the newest round, and this worker's partitions in it
        for mod in getattr(self._app, "_mods", ()):
            say(f"mod {getattr(mod, '__name__', type(mod).__name__)} runs on this worker, around the ClientApp")

    @property
    def measure(self) -> bool:
        """Whether the ClientApp can be asked to evaluate."""
        return getattr(self._app, "_call", None) is not None or any(
            name.startswith("evaluate") for name in getattr(self._app, "_registered_funcs", {"evaluate": None})
        )

    def context(self, partition: int | None, partitions: int) -> Any:  # noqa: ANN401 - a Context
        """What an app is told of where it runs: a client's own state lives as long as this process."""
        from flwr.app import Context, RecordDict

        at: dict[str, Any] = dict(Here.place.folders)
        if partition is not None:
            at |= {"partition-id": partition, "num-partitions": partitions}
        state = self._states.setdefault(partition, RecordDict())
        node = 0 if partition is None else partition + 1
        return Context(run_id=RUN_ID, node_id=node, node_config=at, state=state, run_config=dict(self._config))

    def send(self, message: Any, partition: int, partitions: int) -> Any:  # noqa: ANN401 - a Message, and the reply
        """Have the ClientApp answer a message, as the client of one partition.

        A ClientApp of Flower's runtime starts anew with each message, so an app may keep a data set that is cut into so
        and so many parts: it is loaded anew when there are more or fewer.
        """
        if self._of not in (0, partitions):
            unload(self._folder)
            self._app = loaded(self._client)
        self._of = partitions
        reply = self._app(message, self.context(partition, partitions))
        if reply is None or not hasattr(reply, "has_error"):
            kind = type(reply).__name__
            raise ValueError(f"the ClientApp answered {message.metadata.message_type!r} with a {kind} and no Message")
        if reply.has_error():
            error = reply.error
            raise RuntimeError(f"the ClientApp answered with an error: {error.reason} (code {error.code})")
        return reply

    def trained(self, served: Any, arrays: Mapping[str, Any], round: Round) -> Any:  # noqa: ANN401, A002 - the word
        """(Mean, metrics) of this worker's clients in a round; None: nobody wants the round any more."""
        from lydian.flower_arrays import Mean

        mean, sums = Mean(), dict[str, tuple[float, float]]()
        self.number, partitions = round.number, self._all or round.shards
        self._own = list(range(round.shard, partitions, round.shards))
        if not self._own:
            sentence = f"{CLIENTS} is {partitions}, and this is worker {round.shard + 1} of {round.shards}"
            raise ValueError(f"{sentence}, with no client left for it: raise it, or use fewer workers")
        for at in self._own:
            if round.stopping:
                return None
            message = served.message("train", round.number, arrays, at, partitions)
            if message is None:
                kind = type(served.strategy).__name__
                raise RuntimeError(f"{kind} sends no client anything to train on (is fraction_train 0?)")
            reply = served.read("train", self.send(message, at, partitions))
            samples = counted(reply.samples, "train")
            mean.add(reply.arrays, samples)
            add(sums, reply.metrics, samples)
            round.progress(samples=mean.samples)
        return mean, sums

    def measured(self, served: Any, arrays: Mapping[str, Any]) -> Mapping[str, tuple[float, float]]:  # noqa: ANN401 - a Served
        """What this worker's clients say of arrays: nothing before they have trained, and know which they are."""
        sums = dict[str, tuple[float, float]]()
        for at in self._own:
            message = served.message("evaluate", self.number, arrays, at, self._of)
            if message is None:  # fraction_evaluate = 0
                return {}
            reply = served.read("evaluate", self.send(message, at, self._of))
            if reply.measured:
                add(sums, reply.metrics, counted(reply.samples, "evaluate"))
        return sums


def loaded(reference: str) -> Any:  # noqa: ANN401 - a ClientApp or a ServerApp
    """What `package.module:name` stands for."""
    module, _, name = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def unload(folder: Path) -> None:
    """Forget the modules that come from a folder."""
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{folder}/"):
            del sys.modules[name]


# ---------------------------------------------------------------- numbers


def counted(samples: Any, kind: str) -> int:  # noqa: ANN401 - whatever a client gives
    """The weight of a client's reply.

    Raises:
        ValueError: there is none, or no whole number above zero.
    """
    if samples is None:
        raise ValueError(f"the reply to {kind!r} has no num-examples in its MetricRecord, by which it is weighed")
    if isinstance(samples, list) or samples != int(samples) or samples < 1:
        raise ValueError(f"the reply to {kind!r} has num-examples = {samples!r}: it is a whole number of at least 1")
    return int(samples)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics: a list is name/0, name/1 …; what is none (a text) is left out."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        many = value if isinstance(value, list) else [value]
        for at, one in enumerate(many):
            if isinstance(one, int | float) or hasattr(one, "__float__"):
                found[f"{name}/{at}" if isinstance(value, list) else name] = float(one)
    return found


def add(sums: dict[str, tuple[float, float]], metrics: Mapping[str, Any], samples: int) -> None:
    """Add a client's means to sums and counts."""
    for name, value in numbers(metrics).items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = total + value * samples, count + samples

"""What a Flower ServerApp says when it is asked: first arrays, the messages of each round, how it measures.

The ServerApp runs unmodified up to the call that would begin its rounds, and no further: the rounds are the job's.

    @app.main()     main(grid, context) ──▶ strategy.start(…)          caught ──▶ Messages
    server_fn       ServerApp(grid, context) ──▶ start_grid(…)         caught ──▶ Legacy
                    DefaultWorkflow()(grid, LegacyContext(…))          caught ──▶ Legacy

What a client is sent is written by the app's own strategy (`configure_train`, `configure_fit`), so that whatever it
puts into the config arrives: FedProx its mu, on_fit_config_fn what it likes. What the strategy makes of replies is not
asked: the coordinator averages, as the job says. Paths and names are those of flwr 1.42.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common import recorddict_compat as compat
from flwr.compat.common.parameter import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.typing import Code, GetParametersIns
from flwr.server.client_manager import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow
from flwr.serverapp import Grid, server_app
from flwr.serverapp.strategy import Strategy

Named = Mapping[str, Any]
Send = Callable[[Message], Message]
"""A message to a client of this worker -> its reply."""


@dataclass(frozen=True)
class Reply:
    """What a client said."""

    arrays: Named  # name -> numpy array; empty from an evaluation
    samples: Any  # num-examples, as the client gave it; None: it gave none
    metrics: Mapping[str, Any]
    measured: bool = True  # False: the client has no such method


class Served(Protocol):
    """What a ServerApp was about to begin, in either API."""

    rounds: int
    strategy: Any

    def first(self, send: Send) -> Named:
        """The arrays that the first round begins with: name -> numpy array."""

    def message(self, kind: str, number: int, arrays: Named, partition: int, partitions: int) -> Message | None:
        """What a client is sent in a round: kind is train or evaluate. None: the strategy sends nothing."""

    def read(self, kind: str, reply: Message) -> Reply:
        """What came back."""

    @property
    def measures(self) -> bool:
        """Whether the app measures on the server, with a function of its own."""

    def measure(self, number: int, arrays: Named) -> Mapping[str, Any]:
        """What that function says; nothing where it says None."""


class Caught(BaseException):
    """The ServerApp came to the call that begins its rounds. No Exception, so that no `except` of an app takes it."""

    def __init__(self, served: Served) -> None:
        super().__init__("the rounds begin")
        self.served = served


def ask(app: Any, context: Any) -> Served:  # noqa: ANN401 - a ServerApp and a Context
    """Run a ServerApp up to the call that begins its rounds.

    Raises:
        RuntimeError: it comes to its end without one, or sends messages by itself.
    """
    try:
        with catching():
            app(grid_of(()), context)
    except Caught as caught:
        return caught.served
    raise RuntimeError(
        "the ServerApp came to its end and never to strategy.start(…): the rounds of this job are those of a strategy"
    )


@contextmanager
def catching() -> Iterator[None]:
    """Inside, what begins the rounds of a ServerApp raises Caught: every `start` that any strategy has, too."""
    starts = [(kind, vars(kind)["start"]) for kind in kinds_of(Strategy) if "start" in vars(kind)]
    begins, flows = server_app.start_grid, DefaultWorkflow.__call__
    try:
        for kind, start in starts:
            kind.start = started(start)
        server_app.start_grid, DefaultWorkflow.__call__ = legacy_started, workflow_started
        yield
    finally:
        for kind, start in starts:
            kind.start = start
        server_app.start_grid, DefaultWorkflow.__call__ = begins, flows


def kinds_of(kind: type) -> list[Any]:
    """A class and all that are made of it."""
    below: list[type] = kind.__subclasses__()
    return [kind, *(found for one in below for found in kinds_of(one))]


def started(start: Callable[..., Any]) -> Callable[..., NoReturn]:
    """What stands in a strategy where its `start` was, and takes the same arguments."""
    signature = inspect.signature(start)

    def caught(*given: Any, **named: Any) -> NoReturn:  # noqa: ANN401 - a strategy, and its own arguments
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        raise Caught(Messages(given[0], bound.arguments))

    return caught


def legacy_started(
    *,
    grid: Any,  # noqa: ANN401, ARG001 - as start_grid has it
    server: Any = None,  # noqa: ANN401
    config: Any = None,  # noqa: ANN401
    strategy: Any = None,  # noqa: ANN401
    client_manager: Any = None,  # noqa: ANN401, ARG001
) -> NoReturn:
    """What stands in place of start_grid, with its defaults."""
    chosen = server.strategy if server is not None else strategy or LegacyFedAvg()
    raise Caught(Legacy(chosen, 1 if config is None else config.num_rounds))


def workflow_started(workflow: Any, _: Any, context: Any) -> NoReturn:  # noqa: ANN401 - as DefaultWorkflow has them
    """What stands in place of a DefaultWorkflow's call."""
    fit = workflow.fit_workflow
    if type(fit).__module__.startswith("flwr.server.workflow.secure"):
        name = type(fit).__name__
        raise RuntimeError(f"{name} masks between Flower's server and clients: submit with --secure-enabled true")
    raise Caught(Legacy(context.strategy, context.config.num_rounds))


def grid_of(nodes: tuple[int, ...]) -> Grid:
    """A grid that knows of nodes and sends nothing."""
    made: dict[str, Any] = {name: refusing(name) for name in Grid.__abstractmethods__}
    made |= {"get_node_ids": lambda _: list(nodes), "run": property(refusing("run"))}
    return type("NodesOnly", (Grid,), made)()


def refusing(name: str) -> Callable[..., NoReturn]:
    """A method that says why it does nothing."""

    def refuse(*_: object, **__: object) -> NoReturn:
        sentence = f"the app calls {name}(…) by itself: only the rounds of a strategy are carried"
        raise RuntimeError(f"{sentence} (strategy.start, or server_fn), no messages of its own")

    return refuse


def nodes_for(strategy: Any, partitions: int) -> int:  # noqa: ANN401 - of either API
    """How many nodes a strategy is shown: as there are, and never fewer than it would wait for."""
    wanted = [value for name, value in vars(strategy).items() if name.startswith("min_") and isinstance(value, int)]
    return max(partitions, *wanted, 1)


# ---------------------------------------------------------------- the Message API


class Messages:
    """A `flwr.serverapp.strategy.Strategy` whose start was caught."""

    def __init__(self, strategy: Any, given: Mapping[str, Any]) -> None:  # noqa: ANN401
        """Take what start was given, by name."""
        if not isinstance(given.get("initial_arrays"), ArrayRecord):
            raise RuntimeError(f"{type(strategy).__name__}.start(…) was given no ArrayRecord as initial_arrays")
        self.strategy, self.rounds = strategy, int(given.get("num_rounds", 0))
        self._arrays, self._measure = given["initial_arrays"], given.get("evaluate_fn")
        self._configs = {kind: given.get(f"{kind}_config") or {} for kind in ("train", "evaluate")}

    def first(self, _: Send) -> Named:
        """Those that start was given."""
        return numbers_of(self._arrays)

    def message(self, kind: str, number: int, arrays: Named, partition: int, partitions: int) -> Message | None:
        """Of those that the strategy writes, the one to this client, or to any."""
        configure = self.strategy.configure_train if kind == "train" else self.strategy.configure_evaluate
        grid = grid_of(tuple(range(1, nodes_for(self.strategy, partitions) + 1)))
        written = list(configure(number, record_of(arrays), ConfigRecord(dict(self._configs[kind])), grid))
        own = [message for message in written if message.metadata.dst_node_id == partition + 1]
        return next(iter(own + written), None)

    def read(self, kind: str, reply: Message) -> Reply:
        """One ArrayRecord where it trained, and one MetricRecord, as Flower's strategies want them.

        Raises:
            ValueError: there are none, or more.
        """
        arrays, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
        if (kind == "train" and len(arrays) != 1) or len(metrics) != 1:
            found = f"{len(arrays)} ArrayRecords and {len(metrics)} MetricRecords"
            raise ValueError(f"the reply to {kind!r} has {found}, where one of each is averaged")
        values, key = dict(metrics[0]), getattr(self.strategy, "weighted_by_key", "num-examples")
        return Reply(numbers_of(arrays[0]) if kind == "train" else {}, values.pop(key, None), values)

    @property
    def measures(self) -> bool:
        """Whether start was given an evaluate_fn."""
        return self._measure is not None

    def measure(self, number: int, arrays: Named) -> Mapping[str, Any]:
        """What that says."""
        return dict((self._measure(number, record_of(arrays)) if self._measure else None) or {})


def record_of(arrays: Named) -> ArrayRecord:
    """Arrays as a message has them."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def numbers_of(record: ArrayRecord) -> Named:
    """And back."""
    return {name: array.numpy() for name, array in record.items()}


# ---------------------------------------------------------------- the older API


class Legacy:
    """A `flwr.server.strategy.Strategy`, of a server_fn. Arrays have no names there: theirs are 0, 1, 2 …"""

    def __init__(self, strategy: Any, rounds: int) -> None:  # noqa: ANN401
        """Take what the server would have begun with."""
        self.strategy, self.rounds = strategy, rounds

    def first(self, send: Send) -> Named:
        """The strategy's initial_parameters, else those of a client."""
        given = self.strategy.initialize_parameters(self._clients(1))
        if given is None:
            asked = compat.getparametersins_to_recorddict(GetParametersIns({}))
            kind = MessageTypeLegacy.GET_PARAMETERS
            answer = send(Message(asked, dst_node_id=1, message_type=kind, group_id="0"))
            found = compat.recorddict_to_getparametersres(answer.content, keep_input=True)
            checked(found.status, "get_parameters")
            given = found.parameters
        return positions(given)

    def message(self, kind: str, number: int, arrays: Named, partition: int, partitions: int) -> Message | None:
        """Of those that the strategy writes, the one to this client, or to any."""
        training = kind == "train"
        configure = self.strategy.configure_fit if training else self.strategy.configure_evaluate
        clients = self._clients(nodes_for(self.strategy, partitions))
        written = configure(number, ndarrays_to_parameters(list(arrays.values())), clients)
        own = [given for client, given in written if client.cid == str(partition + 1)]
        given = next(iter(own + [given for _, given in written]), None)
        if given is None:
            return None
        pack = compat.fitins_to_recorddict if training else compat.evaluateins_to_recorddict
        content: RecordDict = pack(given, keep_input=True)
        return Message(content, dst_node_id=partition + 1, message_type=kind, group_id=str(number))

    def read(self, kind: str, reply: Message) -> Reply:
        """A FitRes or an EvaluateRes.

        Raises:
            RuntimeError: its status says that it failed.
        """
        if kind == "train":
            fitted = compat.recorddict_to_fitres(reply.content, keep_input=True)
            checked(fitted.status, "fit")
            return Reply(positions(fitted.parameters), fitted.num_examples, fitted.metrics)
        found = compat.recorddict_to_evaluateres(reply.content)
        if found.status.code == Code.EVALUATE_NOT_IMPLEMENTED:
            return Reply({}, None, {}, measured=False)
        checked(found.status, "evaluate")
        return Reply({}, found.num_examples, {"loss": found.loss, **found.metrics})

    @property
    def measures(self) -> bool:
        """Whether the strategy has an evaluate_fn, or an `evaluate` of the app's own."""
        own = not type(self.strategy).evaluate.__module__.startswith("flwr.")
        return own or getattr(self.strategy, "evaluate_fn", None) is not None

    def measure(self, number: int, arrays: Named) -> Mapping[str, Any]:
        """What that says: a loss, and metrics."""
        found = self.strategy.evaluate(number, ndarrays_to_parameters(list(arrays.values())))
        return {} if found is None else {"loss": found[0], **found[1]}

    @staticmethod
    def _clients(count: int) -> SimpleClientManager:
        made = {name: refusing(name) for name in ClientProxy.__abstractmethods__}
        proxy, manager = type("Nobody", (ClientProxy,), made), SimpleClientManager()
        for number in range(1, count + 1):
            manager.register(proxy(str(number)))
        return manager


def positions(parameters: Any) -> Named:  # noqa: ANN401 - Parameters
    """Arrays by their place in the list."""
    return {str(at): array for at, array in enumerate(parameters_to_ndarrays(parameters))}


def checked(status: Any, method: str) -> None:  # noqa: ANN401 - a Status
    """Make sure that a client did what it was asked.

    Raises:
        RuntimeError: it says that it did not.
    """
    if status.code != Code.OK:
        raise RuntimeError(f"{method} of the client ended as {status.code.name}: {status.message}")

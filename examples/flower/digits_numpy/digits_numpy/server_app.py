"""How the server averages, and with what it begins."""

from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from digits_numpy.task import Net, get_weights


def fit_config(server_round: int):
    return {"decay": 0.9 ** (server_round - 1)}


def server_fn(context: Context):
    strategy = FedAvg(on_fit_config_fn=fit_config, initial_parameters=ndarrays_to_parameters(get_weights(Net())))
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)

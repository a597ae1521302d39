"""What a client does: fit, and evaluate."""

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context
from torch import nn

from digits_numpy.task import Net, get_weights, load_data, set_weights


class Client(NumPyClient):
    def __init__(self, net, loaders, epochs, lr):
        self.net, (self.train_loader, self.test_loader), self.epochs, self.lr = net, loaders, epochs, lr

    def fit(self, parameters, config):
        set_weights(self.net, parameters)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr * config["decay"], momentum=0.9)
        for _ in range(self.epochs):
            for x, y in self.train_loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(x), y)
                loss.backward()
                optimizer.step()
        return get_weights(self.net), len(self.train_loader.dataset), {"train_loss": loss.item()}

    def evaluate(self, parameters, config):  # noqa: ARG002 - as NumPyClient has it
        set_weights(self.net, parameters)
        with torch.no_grad():
            x, y = next(iter(self.test_loader))
            found = self.net(x)
        accuracy = (found.argmax(1) == y).float().mean().item()
        return nn.functional.cross_entropy(found, y).item(), len(x), {"accuracy": accuracy}


def client_fn(context: Context):
    loaders = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    return Client(Net(), loaders, context.run_config["local-epochs"], context.run_config["lr"]).to_client()


app = ClientApp(client_fn)

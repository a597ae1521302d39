"""What a client does with a message."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_flower.task import Net, load_data
from digits_flower.task import test as test_fn
from digits_flower.task import train as train_fn

app = ClientApp()


def begin(msg: Message, context: Context):
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return net, load_data(context.node_config["partition-id"], context.node_config["num-partitions"]), device


@app.train()
def train(msg: Message, context: Context) -> Message:
    net, (loader, _), device = begin(msg, context)
    loss = train_fn(net, loader, context.run_config["local-epochs"], msg.content["config"]["lr"], device)
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    net, (_, loader), device = begin(msg, context)
    loss, accuracy = test_fn(net, loader, device)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(loader.dataset)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)

"""The model, its weights as a list of arrays, and the data of one partition."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Net = lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))  # noqa: E731 - as short as it can be


def get_weights(net):
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, weights):
    net.load_state_dict({name: torch.tensor(value) for name, value in zip(net.state_dict(), weights, strict=True)})


def load_data(partition_id: int, num_partitions: int):
    data, target = load_digits(return_X_y=True)
    x = torch.tensor(data[partition_id::num_partitions], dtype=torch.float32) / 16
    y = torch.tensor(target[partition_id::num_partitions])
    cut = len(x) // 5
    train_set, test_set = TensorDataset(x[cut:], y[cut:]), TensorDataset(x[:cut], y[:cut])
    return DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(test_set, batch_size=256)

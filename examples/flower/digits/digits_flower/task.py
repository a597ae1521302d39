"""The model, the data of one partition, and what is done with them."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.out = nn.Linear(32, 10)

    def forward(self, x):
        return self.out(torch.relu(self.norm(self.hidden(x))))


def load_data(partition_id: int, num_partitions: int):
    """Every num_partitions-th sample from the partition_id-th on; a fifth of them is kept to measure with."""
    data, target = load_digits(return_X_y=True)
    x = torch.tensor(data[partition_id::num_partitions], dtype=torch.float32) / 16
    y = torch.tensor(target[partition_id::num_partitions])
    cut = len(x) // 5
    train_set, test_set = TensorDataset(x[cut:], y[cut:]), TensorDataset(x[:cut], y[:cut])
    return DataLoader(train_set, batch_size=32, shuffle=True), DataLoader(test_set, batch_size=256)


def train(net, loader, epochs, lr, device):
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    total = 0.0
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net, loader, device):
    net.to(device).eval()
    loss, right = 0.0, 0
    with torch.no_grad():
        for x, y in loader:
            found = net(x.to(device))
            loss += nn.functional.cross_entropy(found, y.to(device), reduction="sum").item()
            right += (found.argmax(1) == y.to(device)).sum().item()
    return loss / len(loader.dataset), right / len(loader.dataset)

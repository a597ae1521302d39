"""Handwritten digits on all machines: `lydian submit examples/scripts/digits.py --rounds 5 --watch`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lydian

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
is_test = torch.arange(len(labels)) % 5 == 0
train_set = TensorDataset(images[~is_test].float() / 16, labels[~is_test])
test_x, test_y = images[is_test].float() / 16, labels[is_test]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def accuracy(model):
    return {"accuracy": (int((model(test_x).argmax(1) == test_y).sum()), len(test_y))}


for round in lydian.rounds(model, data=train_set, evaluate=accuracy):
    share = Subset(train_set, round.share())
    for _ in range(2):
        for x, y in DataLoader(share, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    round.report(samples=len(share), loss=loss)

print(accuracy(model))

"""A task of your own: plain PyTorch, no import of ours. Try it with `lydian submit --task examples/my_task.py`.

Tells malignant tumours from benign ones by 30 measurements of their cells (569 patients, ships with scikit-learn).
"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset


def model(config):
    return nn.Sequential(nn.Linear(30, config.get("width", 16)), nn.ReLU(), nn.Linear(config.get("width", 16), 2))


def dataset(config, split):
    measurements, benign = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    x = ((measurements - measurements.mean(0)) / measurements.std(0)).float()
    is_test = torch.arange(len(x)) % config.get("test_every", 5) == 0
    rows = is_test if split == "test" else ~is_test
    return TensorDataset(x[rows], benign[rows])


# The rest may be left out: the default optimizer is SGD by the job's lr, the default metrics are accuracy and loss.
def optimizer(model, config):
    return torch.optim.Adam(model.parameters(), lr=config.get("adam_lr", 0.01))


def metrics(model, batch, config):
    x, benign = batch
    taken_for_benign = model(x).softmax(1)[:, 1] > config.get("threshold", 0.5)
    right, malignant = taken_for_benign == benign, benign == 0
    return {"accuracy": (right.sum(), len(x)), "missed": ((taken_for_benign & malignant).sum(), malignant.sum())}

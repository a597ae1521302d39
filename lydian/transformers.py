"""Hugging Face's Trainer in rounds: `lydian.transformers.train(trainer)` where a script has `trainer.train()`.

With peft, `only="trainable"` has nothing but the adapters travel.
"""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

from lydian.loop import Only, Round, rounds


class Leaves(TrainerCallback):
    """Ends a training that nobody wants any more."""

    def __init__(self, round: Round) -> None:  # noqa: A002 - the word of a script
        self.round = round

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's
        """Look after each step."""
        control.should_training_stop = control.should_training_stop or self.round.stopping


def train(trainer: Trainer, *, data: Any = None, only: Only = None) -> None:  # noqa: ANN401 - a data set
    """Train in the rounds of a job; the Trainer's length is the round's. An eval_dataset measures the global model.

    Args:
        trainer: made as ever, with `save_strategy="no"`. It begins each round with a new optimiser and schedule.
        data: the training set, where it is to be shared: the Trainer's own is a part of it then. None: it is not.
        only: as lydian.rounds takes it.
    """
    evaluate = measured_by(trainer) if trainer.eval_dataset is not None else None
    for round in rounds(trainer.model, data=data, only=only, evaluate=evaluate):  # noqa: A001 - the word of a script
        if data is not None:
            share = round.share()
            trainer.train_dataset = data.select(share) if hasattr(data, "select") else Subset(data, share)
        trainer.optimizer = trainer.lr_scheduler = None
        leaves = Leaves(round)
        trainer.add_callback(leaves)
        done = trainer.train()
        trainer.remove_callback(leaves)
        round.report(samples=len(trainer.train_dataset), loss=done.training_loss)


def measured_by(trainer: Trainer) -> Any:  # noqa: ANN401 - lydian.loop.Evaluate
    """What trainer.evaluate() says, without what is about its speed; `eval_loss` is `loss`."""

    def evaluate(_: object) -> Mapping[str, tuple[float, float]]:
        found, count = trainer.evaluate(), len(trainer.eval_dataset)
        speed = ("runtime", "_per_second", "epoch", "model_preparation_time")
        means = {name.removeprefix("eval_"): value for name, value in found.items() if not name.endswith(speed)}
        return {name: (value * count, count) for name, value in means.items()}

    return evaluate

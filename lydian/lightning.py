"""Lightning in rounds: `lydian.lightning.fit(…)` where a script has `Trainer(…).fit(module, loader)`.

fit(lambda: Trainer(max_epochs=1), module, loader)
fit(lambda: Trainer(max_epochs=1), module, lambda share: DataLoader(Subset(train_set, share)), data=train_set)
"""

from collections.abc import Callable, Sized
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lydian.loop import Evaluate, Only, Round, rounds


class Leaves(Callback):
    """Ends a fit that nobody wants any more."""

    def __init__(self, round: Round) -> None:  # noqa: A002 - the word of a script
        self.round = round

    def on_train_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:
        """Look after each batch."""
        trainer.should_stop = trainer.should_stop or self.round.stopping


def fit(
    trainer: Callable[[], Trainer],
    module: LightningModule,
    loader: Any,  # noqa: ANN401 - whatever Trainer.fit takes, or a function
    *,
    data: int | Sized | None = None,
    only: Only = None,
    evaluate: Evaluate = None,
) -> None:
    """Fit a module in the rounds of a job. What it logs is reported; its loss is shown where it is called train_loss.

    Args:
        trainer: makes one for each round, since a Trainer that is through trains no more. Its length is the round's.
        module: what is trained.
        loader: of the training samples, or a datamodule; a function gets round.share() and makes one.
        data, only, evaluate: as lydian.rounds takes them; `loader` is a function where `data` is given.
    """
    if data is not None and not callable(loader):
        raise TypeError("lydian.lightning.fit(data=…) shares the data: give a function from round.share() to a loader")
    for round in rounds(module, data=data, only=only, evaluate=evaluate):  # noqa: A001 - the word of a script
        own = trainer()
        own.callbacks.append(Leaves(round))
        own.fit(module, loader(round.share()) if data is not None else loader)
        round.report(samples=len(own.train_dataloader.dataset), metrics=dict(own.callback_metrics))

"""What a training script imports to be trained by a fleet: three lines, and the script stays what it was.

    import lydian                                            # 1
    …
    for round in lydian.rounds(model):                       # 2: the model has the global weights when a round begins
        …the script's own training loop…
        round.report(samples=len(train_set), loss=loss)      # 3

Run by itself (`python train.py`) the script trains one round, or $LYDIAN_ROUNDS, and speaks with nobody. Submitted
(`lydian submit train.py`) it runs on each worker, in the process that trains there. docs/scripts.md tells all of it.

The standard library alone: no package of this repository is imported, and torch only where a function needs it.
"""

from lydian.loop import Round, config, data, device, rounds

__all__ = ["Round", "config", "data", "device", "rounds"]

"""Having many shards of one round trained by one command of the child."""

from common.messages import Submission
from worker import plan
from worker.child import TaskFailure
from worker.heart import Heart
from worker.spool import Trained, Untrained
from worker.training import Trainer, written_to

COMMON = ("base", "round", "epochs", "steps", "seconds", "total_steps", "job_rounds", "largest_shard")  # of one round
OWN = ("indices", "out", "seed")  # of each shard


class ManyTrainer(Trainer):
    """A trainer that also takes the shards of a round all at once."""

    stack: str = "auto"

    def carry_out_many(self, begun: list[Untrained], heart: Heart) -> list[Trained | TaskFailure]:
        """Download the base once, train all the shards, and spool what came out.

        Args:
            begun: train assignments of one round of one job.
            heart: that beats for all of them.

        Returns:
            For each one its result, or why there is none.

        Raises:
            TaskFailure: all of them failed: the task, or the child.
            TaskStopped: the child was stopped or killed.
            NoRoom: the disk has no room.
            OSError: the disk takes nothing.
        """
        first = begun[0].assignment
        self._make_sure_of_room(first)
        base, received = self._base(first, heart)
        child = self._child_for(first, heart)
        commands = [
            plan.train_command(
                held.assignment,
                base=base,
                indices=self._indices(child, held, heart),
                out=str(written_to(held)),
            )
            for held in begun
        ]
        done = self._ask(
            child,
            {
                "do": "train_many",
                **{name: commands[0][name] for name in COMMON if name in commands[0]},
                "shards": [{name: command[name] for name in OWN} for command in commands],
                "base_digest": first.base.digest if first.base else "",
                "stack": self.stack,
            },
            heart,
        )
        outcomes: list[Trained | TaskFailure] = []
        for held, result in zip(begun, done["results"], strict=True):
            if "error" in result:
                error = result["error"]
                outcomes.append(TaskFailure(error["code"], error["sentence"], error["detail"]))
                continue
            submission = Submission(
                attempt=held.assignment.attempt,
                digest=self._digest(held, base),
                samples=result["samples"],
                steps=result["steps"],
                seconds=result["seconds"],
                metrics=result["metrics"],
                bytes_down=received,
            )
            outcomes.append(self._spool.finish(held, submission))
            received = 0  # it was downloaded once
        return outcomes

"""Asking the accountant (server.accountant), in a process of its own: the event loop does other things meanwhile.

What a number of rounds costs follows from sample, noise and delta alone, so an answer is kept, and asked for some
rounds ahead: a process loads its library for several seconds.
"""

import asyncio
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import BadJobError, LydianError
from common.messages import JobSpec, PrivacySpent
from common.privacy import noise_norm
from server.buffering import Batch
from server.rounds import Aggregating, Job
from server.versions import clip_of

AHEAD = 16  # rounds that are asked for at once
EXACT = 320  # the last round whose own cost is told; of a later one, that of the last round of its sixteen
PATIENCE_S = 600.0  # an answer takes seconds; one that takes longer does not come
INSTALL = "pip install 'dp-accounting>=0.6.0'"
SAID = 400  # characters of the last line on stderr


class AccountantError(LydianError):
    """The accountant gave no answer. Nothing may be released whose cost is not known."""

    code = "no_accountant"


@dataclass(frozen=True)
class Mechanism:
    """What decides the cost of a round."""

    sample: float
    noise: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """What so many rounds cost."""

    epsilon: float
    by_rdp: float


@dataclass(frozen=True)
class Planned:
    """What a job will cost, found before it is taken."""

    epsilon: float  # of all its rounds
    affordable: int | None  # rounds within its budget; None: it has none


def mechanism_of(spec: JobSpec) -> Mechanism:
    """The mechanism of a job with privacy.level = worker."""
    section = spec.privacy
    return Mechanism(section.sample, section.noise or 0.0, section.delta or 0.0)


def is_installed() -> bool:
    """Whether the accountant's library is here. It is not loaded."""
    return importlib.util.find_spec("dp_accounting") is not None


class Accounting:
    """The answers that are known."""

    def __init__(self) -> None:
        self._known: dict[tuple[Mechanism, int], Spent] = {}

    async def plan(self, spec: JobSpec) -> Planned | None:
        """What a job will cost; None: it is not a job that the coordinator accounts for.

        Raises:
            BadJobError: it cannot be accounted for here, or its budget is below one round.
            AccountantError: no answer came.
        """
        section = spec.privacy
        if section.level != "worker":
            return None
        if not is_installed():
            raise BadJobError(
                "privacy.level = worker needs dp-accounting on the coordinator, which tells epsilon",
                advice=f"There: {INSTALL} (in a clone: pip install -e '.[privacy]').",
            )
        mechanism, rounds = mechanism_of(spec), spec.rounds
        found = await self._ask(mechanism, [1, rounds], {"budget": section.budget, "most": rounds})
        affordable: int | None = found.get("affordable")
        if affordable == 0:
            one = self._known[mechanism, 1].epsilon
            raise BadJobError(
                f"one round costs ε {one:.4g} at δ {mechanism.delta:g}, and privacy.budget is {section.budget:g}",
                advice="Raise privacy.noise or privacy.budget, or lower privacy.sample.",
            )
        return Planned(self._known[mechanism, rounds].epsilon, affordable)

    async def spent(self, spec: JobSpec, rounds: int) -> Spent:
        """What the first rounds of a job cost together. After round EXACT, a little more than that.

        Raises:
            AccountantError: no answer came.
        """
        mechanism, last = mechanism_of(spec), min(-(-rounds // AHEAD) * AHEAD, spec.rounds)
        counted = rounds if rounds <= EXACT else last
        if (mechanism, counted) not in self._known:
            await self._ask(mechanism, [*range(rounds, last + 1)] if rounds <= EXACT else [last], {})
        return self._known[mechanism, counted]

    async def _ask(self, mechanism: Mechanism, rounds: list[int], more: Mapping[str, Any]) -> dict[str, Any]:
        if not is_installed():
            raise AccountantError("dp-accounting is not installed on the coordinator any more", advice=f"{INSTALL}.")
        question = {
            "sample": mechanism.sample,
            "noise": mechanism.noise,
            "delta": mechanism.delta,
            "rounds": rounds,
            **more,
        }
        found = await _answer_of([sys.executable, "-m", "server.accountant"], question)
        for number, epsilon, by_rdp in found["spent"]:
            # Both are upper bounds of the same thing.
            self._known[mechanism, number] = Spent(min(epsilon, by_rdp), by_rdp)
        return found


def worker_level(job: Job, spent: Spent, next_clip: float | None) -> PrivacySpent:
    """What is told of a round with worker-level privacy."""
    section, clip = job.spec.privacy, clip_of(job)
    parameters = job.facts.parameters if job.facts else 0
    return PrivacySpent(
        level="worker",
        epsilon=spent.epsilon,
        epsilon_rdp=spent.by_rdp,
        delta=section.delta or 0.0,
        clip=clip,
        next_clip=next_clip,
        noise_norm=noise_norm(job.spec, clip, parameters),
    )


def example_level(job: Job, phase: Aggregating | Batch) -> PrivacySpent | None:
    """What is told of a round with example-level privacy: the worst over its workers, by their own accountants."""
    runs = [update.private for update in phase.accepted if update.private is not None]
    if not runs:
        return None
    before = job.spent.epsilon if job.spent is not None else 0.0
    return PrivacySpent(
        level="example",
        epsilon=max(before, *(run.epsilon for run in runs)),
        delta=max(run.delta for run in runs),
        clip=job.spec.privacy.clip or 0.0,
    )


async def _answer_of(command: list[str], question: Mapping[str, Any]) -> dict[str, Any]:
    """Start the process, ask, and wait; it ends with this call, however that ends."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        async with asyncio.timeout(PATIENCE_S):
            said, errors = await process.communicate(json.dumps(question).encode())
    except TimeoutError:
        raise AccountantError(f"the accountant gave no answer for {PATIENCE_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = (errors.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:SAID]
        raise AccountantError(f"the accountant ended with {process.returncode}: {last}")
    answer: dict[str, Any] = json.loads(said)
    if any(math.isnan(number) for row in answer["spent"] for number in row):
        raise AccountantError(f"the accountant's answer to {json.dumps(question)} is no number")
    return answer

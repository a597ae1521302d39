"""Which parts of a job go together: each rule that looks at more than one section, and the sentence to give for it.

Pure. A job asks once (`refusal`), when it is made: what is refused here never starts. The table that follows from these
rules is in docs/algorithms.md, and tests/test_combinations.py holds the two together. Where nobody has shown that two
parts work together, they are refused.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common import privacy
from common.robustness import WEIGHING

if TYPE_CHECKING:
    from common.messages import JobSpec


def refusal(spec: "JobSpec") -> str | None:
    """Why a job cannot be as it is, in a sentence; None: it can."""
    rules = (_script, _asynchronous, _late, _fednova, _robust, _schedule, _evaluations, _secure, _private, _drift)
    return next((why for rule in rules for why in rule(spec)), None)


# ---------------------------------------------------------------- scripts

INSTEAD = {
    "trainable_only": 'call lydian.rounds(model, only="trainable") in the script',
    "personal": "call lydian.rounds(model, only=…) in the script, with a function of the names that travel",
    "frozen": "set requires_grad_(False) in the script",
    "keep_optimizer": "make the optimiser before the loop over lydian.rounds, and it is kept from round to round",
}
"""Keys of [train] that a script has another way for. For all others: its own code."""


def _script(spec: "JobSpec") -> Iterator[str]:
    """A script trains by itself: what changes the training cannot come from outside."""
    if not spec.script:
        if spec.arguments:
            yield f"arguments = {list(spec.arguments)} are a script's, and this task is none: use [config]"
        return
    train = spec.train
    for key, field in type(train).model_fields.items():
        if (value := getattr(train, key)) != field.default:
            how = INSTEAD.get(key, "set it there, or hand it over with arguments or [config]")
            yield f"train.{key} = {value} does not reach the training of a script, which is its own: {how}"
    whose = "and a script's training is its own"
    if spec.privacy.level == "example":
        yield f'privacy.level = "example" clips the gradient of each sample in our training, {whose}: use a task file'
    if spec.aggregation.algorithm == "fednova":
        yield f"aggregation.algorithm = fednova weighs updates by the steps of our training, {whose}: use fedavg"
    if spec.evaluation.per_class:
        yield "evaluation.per_class is measured by our metrics: return accuracy/0 … from lydian.rounds(evaluate=…)"


# ---------------------------------------------------------------- rounds


def _asynchronous(spec: "JobSpec") -> Iterator[str]:
    """What asynchronous rounds have not, and what only they have."""
    given, data = spec.round, spec.data
    if given.mode == "sync":
        for name in ("buffer", "max_staleness"):
            if getattr(given, name) != type(given).model_fields[name].default:
                yield f"round.{name} is for asynchronous rounds: set round.mode = async, or leave it out"
        return
    nobody, one_model = "nobody waits for anybody there", "updates of one and the same model"
    missing = (
        ("round.quorum", given.quorum != "all", f"{nobody}, and round.buffer says how many updates make a version"),
        ("round.deadline", isinstance(given.deadline, float), f"{nobody}; leave it out"),
        ("round.late = use", given.late == "use", "every update is used, up to round.max_staleness"),
        ("data.fraction", data.fraction < 1, "every shard is trained, the one that counted least first"),
        ("aggregation.robust", spec.aggregation.robust != "none", f"its rules compare {one_model}"),
        ("aggregation.norm_outlier", spec.aggregation.norm_outlier is not None,
         f"it compares {one_model}; norm_bound does not"),
        ("train.keep_optimizer", spec.train.keep_optimizer, "a shard's state would come out of order"),
        ("train.personal", bool(spec.train.personal), "a shard's own tensors would come out of order"),
    )  # fmt: skip
    yield from (f"round.mode = async has no {key}: {why}" for key, is_set, why in missing if is_set)
    if given.buffer is not None and data.partition != "local" and data.shards != "auto" and given.buffer > data.shards:
        yield (
            f"round.buffer = {given.buffer} updates never come together from data.shards = {data.shards}, each of "
            f"which counts once from a version: set at least {given.buffer} shards, or a smaller buffer"
        )


def _late(spec: "JobSpec") -> Iterator[str]:
    if spec.round.late == "use" and spec.aggregation.update in ("fp32", "auto"):
        sends = f"aggregation.update = {spec.aggregation.update} sends whole models"
        yield f"round.late = use needs updates that are changes, and {sends}: set bf16, int8, int4 or topk"


def _evaluations(spec: "JobSpec") -> Iterator[str]:
    if spec.evaluation.patience is not None and spec.round.evaluate_every == 0:
        yield (
            f"evaluation.patience = {spec.evaluation.patience} counts evaluations, and with "
            "round.evaluate_every = 0 there is one, after the last round: set it to 1 or more"
        )


# ---------------------------------------------------------------- local steps


def _schedule(spec: "JobSpec") -> Iterator[str]:
    """A schedule over the whole job needs to know how many steps that has."""
    train, data = spec.train, spec.data
    if not train.scheduled or train.local_steps is not None:
        return
    unknown = {
        "train.local_seconds": train.local_seconds is not None,
        f"data.partition = {data.partition}": data.partition != "iid",
        "data.shards = auto": data.shards == "auto",
        "train.batch_size = auto": train.batch_size == "auto",
    }
    if any(unknown.values()):
        yield (
            f"train.{train.scheduled} counts the steps of the whole job, and with "
            f"{' and '.join(what for what, is_so in unknown.items() if is_so)} they are not known: set "
            "train.local_steps; or, with iid data and epochs, data.shards and train.batch_size to numbers"
        )


def _fednova(spec: "JobSpec") -> Iterator[str]:
    """FedNova must know what the gradients of a worker's steps add up to."""
    train, proximal = spec.train, spec.train.proximal
    if spec.aggregation.algorithm != "fednova":
        return
    reasons = (
        ("train.optimizer = adamw divides them by what it has seen", train.optimizer != "sgd"),
        ("train.batch_size = auto gives each worker a learning rate of its own", train.batch_size == "auto"),
        ("train.keep_optimizer begins a round with the momentum of the one before",
         train.keep_optimizer and train.momentum > 0),
        (f"train.{train.scheduled} changes what a step adds", bool(train.scheduled)),
        ("for train.momentum together with train.proximal no such sum is known", train.momentum > 0 and proximal > 0),
        ((f"train.proximal = {proximal:g} is so large that a step of train.lr goes beyond the model that the round "
         "began with"), train.lr * proximal >= 1),
    )  # fmt: skip
    for why in (reason for reason, holds in reasons if holds):
        yield (
            f"aggregation.algorithm = fednova weighs updates by what their gradients add up to, and {why}: "
            "change that, or use fedavg"
        )


def _drift(spec: "JobSpec") -> Iterator[str]:
    if spec.train.drift != "none":
        yield from (f"train.drift = {spec.train.drift} {why}" for why in _unfit_for_drift(spec))


def _unfit_for_drift(spec: "JobSpec") -> Iterator[str]:
    data, aggregation, method = spec.data, spec.aggregation, spec.train.drift
    gradients = "takes gradients from what an update says, and"
    if data.shards == "auto" and data.partition != "local":
        yield "keeps something of each shard, and data.shards = auto may cut others in each round: set a number"
    if spec.train.proximal:
        what = "has its own pull to the round's model" if method == "feddyn" else "would take the pull for a gradient"
        yield f"{what}, and train.proximal is {spec.train.proximal:g}: set it to 0"
    if spec.train.personal:
        yield "keeps a slot of all that is trained, and train.personal stays on the worker: leave one of them out"
    if spec.round.mode == "async":
        yield "sums over the rounds of all shards, and round.mode = async has none: set sync"
    if aggregation.robust != "none" or aggregation.norm_outlier is not None:
        yield "takes each shard's update into its slot, and a robust rule or norm_outlier does not: leave those out"
    if spec.secure.enabled:
        yield "needs the change of each shard, which secure.enabled hides: leave one of them out"
    if spec.round.late == "use":
        yield "needs every update to begin with the round's own model: set round.late = refuse"
    scaled = method == "scaffold" and aggregation.algorithm == "fedavgm" and aggregation.outer_momentum == 0
    if aggregation.algorithm != "fedavg" and not scaled:
        other = ", or fedavgm with outer_momentum = 0, for an outer_lr" if method == "scaffold" else ""
        yield f"has its own outer step, and aggregation.algorithm is {aggregation.algorithm}: set fedavg{other}"
    if aggregation.update not in ("fp32", "bf16", "int8"):
        yield f"{gradients} {aggregation.update} may say too little: choose fp32, bf16 or int8"
    if aggregation.feedback:
        yield f"{gradients} feedback adds those of earlier rounds: set it to false"


# ---------------------------------------------------------------- updates


def _robust(spec: "JobSpec") -> Iterator[str]:
    """A rule judges one round, and whatever closes that must be enough for it: as far as it is known beforehand."""
    rule = spec.aggregation
    if rule.robust != "none" and spec.round.late == "use":
        yield f"robust = {rule.robust} judges the updates of one round, and late = use mixes rounds: set refuse"
    for most, where, advice in _closing_updates(spec) if rule.needs > 1 else ():
        if most < rule.needs:
            yield f"{rule.needs_words}, and {where}: {advice}, or lower aggregation.faulty"


def _closing_updates(spec: "JobSpec") -> Iterator[tuple[int, str, str]]:
    """(updates, why no more, what to do) of each number that a round may close with."""
    shards, quorum = spec.data.shards, spec.round.quorum
    if isinstance(quorum, int):
        yield quorum, f"round.quorum = {quorum} closes a round with fewer", "raise round.quorum"
    if shards == "auto" or spec.data.partition == "local":
        started = spec.round.min_workers
        yield started, f"the job may start with round.min_workers = {started}", "raise round.min_workers"
        return
    from common.sharding import drawn_of  # numpy stays out of what only reads messages

    drawn = drawn_of(shards, spec.data.fraction)
    yield drawn, f"a round trains {drawn} of data.shards = {shards}", "raise data.shards or data.fraction"
    if isinstance(quorum, float):
        share = math.ceil(quorum * drawn)
        yield share, f"round.quorum = {quorum:g} closes a round with {share} of {drawn}", "raise round.quorum"


def _secure(spec: "JobSpec") -> Iterator[str]:
    """A secure sum has nothing that would have to see one update, nor a set that is not decided beforehand."""
    data, rules, aggregation = spec.data, spec.round, spec.aggregation
    if not spec.secure.enabled:
        return
    wrong = (
        (f"aggregation.robust = {aggregation.robust} compares updates", aggregation.robust != "none"),
        (f"aggregation.update = {aggregation.update} is no whole number that can be masked; leave it at fp32",
         aggregation.update != "fp32"),
        ("round.mode = async makes a version of whatever came", rules.mode == "async"),
        ("aggregation.norm_bound measures each update", aggregation.norm_bound is not None),
        ("aggregation.norm_outlier measures each update", aggregation.norm_outlier is not None),
        ("train.personal goes on from a round that may be begun anew", bool(spec.train.personal)),
        (f"aggregation.algorithm = {aggregation.algorithm} weighs each update by itself",
         aggregation.algorithm in WEIGHING),
        ("round.late = use adds an update to another round's sum", rules.late == "use"),
        ((f"round.keep_updates = {rules.keep_updates} keeps updates to average them again, and the shares that take "
         "the masks off are deleted; leave it at 0"), rules.keep_updates != 0),
        ((f"round.quorum = {rules.quorum} closes a round without whom it waits for; secure.threshold says how many "
         "may be missing"), rules.quorum != "all"),
        ("round.deadline in seconds ends a round below its quorum; leave it at auto",
         isinstance(rules.deadline, float)),
        (f"data.shards = {data.shards} gives one worker several updates of a sum; leave it at auto",
         data.shards != "auto"),
        (f"data.fraction = {data.fraction:g} may draw fewer than 3 workers; leave it at 1", data.fraction < 1),
        ("train.local_seconds weighs an update by what was done", spec.train.local_seconds is not None),
        (f"round.min_workers = {rules.min_workers}: a sum of fewer than 3 updates hides none; set 3 or more",
         rules.min_workers < 3),
    )  # fmt: skip
    found = [sentence for sentence, is_so in wrong if is_so]
    if found:
        yield f"secure.enabled cannot work with this job: {'; '.join(found)}"


def _private(spec: "JobSpec") -> Iterator[str]:
    if (why := privacy.refusal(spec)) is not None:
        yield why

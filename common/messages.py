"""What coordinator, workers and client say to each other: one frozen class a message.

Unknown fields are refused, bounds sit on the fields, and no torch is imported. docs/protocol.md tells the calls.
"""

import re
import shlex
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common import compatibility
from common.robustness import CUTTING, WEIGHING, Robust, least_updates

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,63}$")]
Attribute = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256, in hex")]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", description="of a signer's key: the first of its SHA-256")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Metrics = dict[str, tuple[float, float]]
"""Metric name -> (sum, count), so that means over workers are exact: the mean is sum / count."""

Kind = Literal["init", "train", "evaluate"]
State = Literal[
    "queued", "initialising", "training", "aggregating", "evaluating", "paused", "finished", "failed", "cancelled"
]
OVER: frozenset[str] = frozenset({"finished", "failed", "cancelled"})
TOGETHER = 1 << 20
"""Bytes of a model or an update up to which it travels in the call that speaks of it: a round trip less. One that is
larger travels alone, since it may have to be resumed."""
Trust = Literal["none", "listed", "signed", "any"]
SIGNATURES = 16
"""Signatures that a task file may come with."""
Order = Literal["work", "drain", "pause"]
"""An operator's to a worker: nothing but work; finish what is under way and take no more; out of the way at once."""


class Message(BaseModel):
    """Frozen, and refuses what it does not know. NaN and infinity travel as strings, since JSON has neither."""

    # A bound on every text: with one, pydantic also refuses half a surrogate pair, which could not be written again.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", str_max_length=1 << 24)


# ---------------------------------------------------------------- the job


REFERENCE_BATCH = 32
"""Samples a step that a job's learning rate is meant for with `batch_size = "auto"` (worker/task_batches.py)."""
ADAMW = {"lr": 4e-4, "weight_decay": 0.1}
"""What `optimizer = "adamw"` begins with. Source: OpenDiLoCo, arXiv 2407.07852, with betas 0.9 and 0.95."""


def _listed(given: object) -> object:
    """A list as the tuple that a frozen message holds, and one pattern as a list of one."""
    if isinstance(given, str) and given != "batchnorm":
        return (given,)
    return tuple(given) if isinstance(given, list) else given


def _words(given: object) -> object:
    """A command line as the words that a shell would make of it."""
    return tuple(shlex.split(given)) if isinstance(given, str) else tuple(given) if isinstance(given, list) else given


Pattern = Annotated[str, Field(min_length=1, max_length=200)]
"""Of names, as a shell matches them: * ? [seq]."""
Listed = BeforeValidator(_listed)


class Section(Message):
    """A part of a job. No number in it may be infinite, or none."""

    model_config = ConfigDict(allow_inf_nan=False)


class TrainSection(Section):
    """`[train]`: what a worker does with its shard."""

    local_epochs: int | None = Field(None, ge=1, description="passes over the shard in a round (default 1)")
    local_steps: int | None = Field(None, ge=1, description="optimiser steps in a round, instead of epochs")
    local_seconds: float | None = Field(None, gt=0, description="seconds of training in a round, instead of epochs")
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        32,
        description="samples a step; auto: up to 256, as each worker's memory allows, lr (meant for 32) following it",
    )
    precision: Literal["fp32", "auto", "bf16", "fp16"] = Field(
        "fp32",
        description="what forward and backward passes compute in, the weights being float32: auto is the best that a "
        "worker's device has; one that lacks bf16 or fp16 takes fp32",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="the default optimiser, unless the task has its own")
    lr: float = Field(0.1, gt=0, description="learning rate of the default optimiser (adamw: 0.0004 unless set)")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay of the mean of gradients")
    beta2: float = Field(0.95, ge=0, lt=1, description="adamw: decay of the mean of squared gradients")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the default optimiser (adamw: 0.1 unless set)")
    clip: float | None = Field(None, gt=0, description="greatest norm of a step's gradient; a longer one is cut to it")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field(
        "constant",
        description="learning rate over the whole job's steps: constant; linear or cosine, to 0; step (milestones); "
        "needs local_steps, or iid data with numbers for shards and batch_size",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of the whole job in which lr rises to its value")
    milestones: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="schedule = step: steps of the whole job from which on lr is multiplied with gamma once more"
    )
    gamma: float | None = Field(
        None, gt=0, le=1, description="schedule = step: what lr is multiplied with (default 0.1)"
    )

    keep_optimizer: bool = Field(
        False, description="a shard's optimiser state stays on its worker from round to round; false: fresh in each"
    )
    drift: Literal["none", "scaffold", "feddyn"] = Field(
        "none",
        description="against what unlike shards pull apart: none, scaffold or feddyn (plain sgd; a number of shards; "
        "each shard counts alike)",
    )
    dyn_alpha: float | None = Field(
        None, gt=0, description="feddyn: weight of the pull to the round's model (default 0.01)"
    )

    proximal: float = Field(0.0, ge=0, description="FedProx: mu of (mu/2)·‖w − w_global‖² in each local loss; 0: none")

    frozen: Annotated[tuple[Pattern, ...], Listed] = Field(
        (), max_length=1_000, description='parameters that are not trained, by their names, e.g. ["encoder.*"]'
    )
    personal: Annotated[Literal["batchnorm"] | tuple[Pattern, ...], Listed] = Field(
        (),
        max_length=1_000,
        description='tensors that never leave their worker, e.g. ["head.*"], or batchnorm (FedBN): all of those layers',
    )
    trainable_only: bool = Field(
        False, description="only what is trained travels, and each machine's model(config) must build the same rest"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_adamw(cls, given: Any) -> Any:  # noqa: ANN401 - whatever is to be validated
        """A learning rate that suits SGD would ruin AdamW: it has defaults of its own."""
        if isinstance(given, dict) and given.get("optimizer") == "adamw":
            return {**ADAMW, **given}
        return given

    @model_validator(mode="after")
    def _milestones(self) -> Self:
        given = self.milestones or []
        if self.schedule != "step" and (self.milestones is not None or self.gamma is not None):
            key = "gamma" if self.milestones is None else "milestones"
            raise ValueError(f"{key} belongs to schedule = step, and schedule is {self.schedule}")
        if self.schedule == "step" and (not given or given != sorted(set(given))):
            raise ValueError(f"schedule = step needs milestones, steps that rise: they are {given}")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [n for n in ("local_epochs", "local_steps", "local_seconds") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set; a round has one length: keep one of them")
        return self

    @model_validator(mode="after")
    def _trained_or_frozen(self) -> Self:
        both = [pattern for pattern in self.frozen if pattern in self.personal and self.personal != "batchnorm"]
        if both:
            sentence = f"{both[0]!r} is in frozen and in personal: what is never trained is nobody's own"
            raise ValueError(f"{sentence}; keep one of them")
        return self

    @model_validator(mode="after")
    def _steps_to_pull_back(self) -> Self:
        if self.proximal and self.local_steps == 1:
            sentence = (
                "proximal has no effect with local_steps = 1: the only step of a round begins at the global model"
            )
            raise ValueError(f"{sentence}; take more steps, or leave it out")
        return self

    @model_validator(mode="after")
    def _plain_sgd(self) -> Self:
        if self.dyn_alpha is not None and self.drift != "feddyn":
            raise ValueError(f"dyn_alpha is a key of feddyn, and train.drift is {self.drift}: leave one of them out")
        if self.drift == "none" or (self.optimizer == "sgd" and self.momentum == 0):
            return self
        other = f"optimizer = {self.optimizer}" if self.optimizer != "sgd" else f"momentum = {self.momentum:g}"
        raise ValueError(f"drift = {self.drift} needs plain SGD, and {other} is set: set sgd, and momentum = 0")

    @property
    def leaves_state(self) -> bool:
        """Whether a shard leaves something on its worker that its next round goes on from."""
        return self.keep_optimizer or bool(self.personal) or self.drift != "none"

    @property
    def scheduled(self) -> str:
        """The key by which the learning rate changes over the job's steps; empty: it does not."""
        return "warmup_steps" if self.warmup_steps > 0 else "schedule" if self.schedule != "constant" else ""

    @property
    def usual_batch(self) -> int:
        """Samples a step; where each worker finds its own, those that the learning rate is meant for."""
        return REFERENCE_BATCH if self.batch_size == "auto" else self.batch_size

    @property
    def new_keys(self) -> tuple[str, ...]:
        """Which of NEW_IN_TRAIN this job needs, and an old key that has a new value."""
        new = [name for name in NEW_IN_TRAIN if getattr(self, name) != type(self).model_fields[name].default]
        return (*new, *(["batch_size"] if self.batch_size == "auto" else []))


CLIENT_TERMS = ("proximal", "frozen", "personal", "trainable_only", "drift", "dyn_alpha")
"""Keys of [train] that a worker's child is told beside a task's configuration, and no task has to know of."""
NEW_IN_TRAIN = (
    "precision", "optimizer", "beta1", "beta2", "clip", "schedule", "warmup_steps", "milestones", "gamma",
    "keep_optimizer", *CLIENT_TERMS,
)  # fmt: skip
"""Keys of [train] that protocol 2 brought."""
KEYS_OF_ROBUST = ("robust", "faulty", "clip_norm", "norm_outlier")  # the coordinator's business alone
NEW_KEYS = {
    "round": ("fsync", "deadline", "late", "mode", "buffer", "max_staleness", "keep_updates"),
    "train": NEW_IN_TRAIN,
    "data": ("by",),
    "aggregation": (
        "outer_lr",
        "outer_momentum",
        "outer_beta1",
        "outer_beta2",
        "outer_tau",
        "download",
        "feedback",
        *KEYS_OF_ROBUST,
    ),
}
"""Section -> all keys of a job that a worker of protocol 1 would refuse as unknown, or whose new values it would."""
NEW_SECTIONS = ("evaluation", "secure", "privacy", "script", "arguments", "init")
"""Whole sections, and keys outside of any, that it would refuse."""


class DataSection(Section):
    """`[data]`: how the training set is cut into shards."""

    partition: Literal["iid", "quantity", "dirichlet", "labels", "natural", "local"] = Field(
        "iid",
        description="iid; quantity (unlike sizes, by alpha); dirichlet (label skew, by alpha); labels (k label shards "
        "each); natural (one shard an id, see by); local (own data)",
    )
    alpha: float = Field(0.5, gt=0, description="dirichlet, quantity: small is skewed, large is even")
    by: Attribute | None = Field(
        None, description="natural: the attribute of the task's dataset that has an id for each sample, e.g. users"
    )
    labels_per_shard: int = Field(2, ge=1, description="labels: label-sorted pieces a shard gets")
    shards: Literal["auto"] | Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        "auto",
        description="auto (one a live worker; iid: sized by its speed; natural: one an id) or a number of virtual "
        "clients",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of the shards that trains in a round")
    name: Name | None = Field(None, description="the data's name in `lydian work --data NAME=PATH` (default: the task)")

    @model_validator(mode="after")
    def _ids(self) -> Self:
        if (self.partition == "natural") != (self.by is not None):
            missing = 'needs by, the attribute of the task\'s dataset that has an id for each sample, e.g. by = "users"'
            needless = f"by is given, which partition = natural alone can use, and partition is {self.partition}"
            raise ValueError(needless if self.by is not None else f"partition = natural {missing}")
        return self


class RoundSection(Section):
    """`[round]`: when a round starts and when it closes."""

    mode: Literal["sync", "async"] = Field(
        "sync", description="sync: a round is averaged when its shards are in; async: whenever `buffer` updates are"
    )
    buffer: int | None = Field(
        None,
        ge=1,
        description="async: updates that make a version (default: half the workers at the start, at most 10)",
    )
    max_staleness: int = Field(
        20, ge=1, description="async: versions that an update may be behind the one that it lands in"
    )
    min_workers: int = Field(1, ge=1, description="live workers needed before the job starts")
    quorum: Literal["all"] | Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        "all", description="updates that close a round: all, a count (3) or a share (0.75)"
    )
    deadline: Literal["auto"] | Annotated[float, Field(gt=0)] | None = Field(
        "auto", description="seconds for a round to reach its quorum, extended once; auto (learned, and fails no job)"
    )
    late: Literal["refuse", "use"] = Field(
        "refuse",
        description="an update that comes after its round: refuse, or use (in a later round, weighing less; not fp32)",
    )
    evaluate_every: int = Field(1, ge=0, description="rounds between evaluations (0: only the last round)")
    keep_updates: Literal["all"] | Annotated[int, Field(strict=True, ge=0)] = Field(
        0,
        description="closed rounds of which the coordinator keeps the updates, so that `lydian verify` can prove them",
    )
    fsync: bool = Field(
        False, description="wait for the coordinator's disk before an update is acknowledged (its worker keeps a copy)"
    )


ADAPTIVE = ("outer_lr", "outer_beta1", "outer_beta2", "outer_tau")
OUTER_KEYS: dict[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedavgm": ("outer_lr", "outer_momentum"),
    "fedadagrad": ("outer_lr", "outer_beta1", "outer_tau"),
    "fedadam": ADAPTIVE,
    "fedyogi": ADAPTIVE,
    "diloco": ("outer_lr", "outer_momentum"),
    "fednova": (),
}
"""Algorithm -> the keys of [aggregation] that its outer step has. The steps themselves: server/optimizers.py."""


class AggregationSection(Section):
    """`[aggregation]`: how updates become the next model."""

    algorithm: Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco", "fednova"] = Field(
        "fedavg",
        description="the outer step: fedavg (the mean); fedavgm, fedadagrad, fedadam, fedyogi (optimisers over the "
        "mean change); diloco (Nesterov over it, for many local steps); fednova (the mean by local steps)",
    )
    outer_lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of the outer step (fedavgm 1, fedadagrad and fedadam 0.1, fedyogi 0.01, diloco 0.7)",
    )
    outer_momentum: float | None = Field(None, ge=0, lt=1, description="fedavgm, diloco: momentum of it (default 0.9)")
    outer_beta1: float | None = Field(
        None, ge=0, lt=1, description="fedadam, fedyogi, fedadagrad: decay of the mean change (0.9; fedadagrad 0)"
    )
    outer_beta2: float | None = Field(
        None, ge=0, lt=1, description="fedadam, fedyogi: decay of its square (default 0.99)"
    )
    outer_tau: float | None = Field(
        None, gt=0, description="fedadagrad, fedadam, fedyogi: added to the root of that square (default 0.001)"
    )
    robust: Robust = Field(
        "none",
        description="the rule that a few bad updates cannot turn, instead of the mean (docs/algorithms.md): none, "
        "clip, trimmed, median, krum, multikrum, bulyan, rfa or centered_clip",
    )
    faulty: int | None = Field(None, ge=1, description="robust: updates of a round that may be bad (default 1)")
    clip_norm: float | None = Field(
        None, gt=0, description="clip, centered_clip: cut a change to this norm (default: median)"
    )
    norm_outlier: float | None = Field(
        None,
        gt=1,
        description="refuse an update whose change is so many times as long as the median of its round (e.g. 10)",
    )
    update: Literal["fp32", "bf16", "int8", "int4", "topk", "auto"] = Field(
        "fp32",
        description="how updates travel: fp32 (whole, in the model's own dtypes), their changes in fewer bits, or auto "
        "(fp32 to int4, by the link that the first model came over)",
    )
    download: Literal["same", "fp32"] = Field(
        "same",
        description="how models travel: same (steps, encoded as updates are, where that is less) or fp32 (whole)",
    )
    feedback: bool | None = Field(
        None, description="add what the encoding left out to the next update (default: with topk, which needs it)"
    )
    norm_bound: float | None = Field(None, gt=0, description="refuse an update further than this from its base (L2)")

    @model_validator(mode="after")
    def _keys_of_the_step(self) -> Self:
        has = OUTER_KEYS[self.algorithm]
        for key in sorted({key for keys in OUTER_KEYS.values() for key in keys} - set(has)):
            if (value := getattr(self, key)) is not None:
                takes = f"takes {', '.join(has)}" if has else "has no such keys"
                others = " or ".join(name for name, keys in OUTER_KEYS.items() if key in keys)
                raise ValueError(
                    f"{key} = {value:g} is of no use to {self.algorithm}, which {takes}: "
                    f"leave it out, or set algorithm to {others}"
                )
        return self

    @model_validator(mode="after")
    def _robust_together(self) -> Self:
        if self.robust == "none" and self.faulty is not None:
            raise ValueError(f"faulty = {self.faulty} says nothing without a robust rule: set robust, or leave it out")
        if self.robust not in CUTTING and self.clip_norm is not None:
            raise ValueError(f"clip_norm = {self.clip_norm:g} is for robust = clip or centered_clip, not {self.robust}")
        if self.robust != "none" and self.algorithm in WEIGHING:
            raise ValueError(
                f"algorithm = {self.algorithm} weighs updates, and robust = {self.robust} gives each one voice: use one"
            )
        if self.robust not in ("none", "clip") and self.update == "topk":
            raise ValueError(
                f"robust = {self.robust} compares whole changes, and update = topk sends a few elements of each: "
                "use robust = clip, or update = int4"
            )
        return self

    @property
    def needs(self) -> int:
        """The least number of updates that a round of this job is averaged from."""
        return least_updates(self.robust, self.faulty or 1, self.clip_norm)

    @property
    def needs_words(self) -> str:
        """Which rule needs that many, for people."""
        against = "" if self.robust in CUTTING and self.clip_norm is not None else f" with faulty = {self.faulty or 1}"
        return f"robust = {self.robust}{against} needs {self.needs} updates"


class EvaluationSection(Section):
    """`[evaluation]`: on what a model is measured, and when that ends the job. How often: round.evaluate_every."""

    scope: Literal["global", "workers"] = Field(
        "global",
        description="global: one worker measures on the task's test split; workers: each of them on its own test data, "
        "and the mean over all samples counts",
    )
    per_class: bool = Field(False, description="also the accuracy of each class (accuracy/3), by the default metrics")
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations in a row without a better target_metric that end the job (default: none do)",
    )
    min_delta: float = Field(0.0, ge=0, description="what is better by no more is not, to patience")

    @model_validator(mode="after")
    def _patience(self) -> Self:
        if self.min_delta and self.patience is None:
            raise ValueError(f"min_delta = {self.min_delta:g} counts only where patience is set, and it is not")
        return self


class SecureSection(Section):
    """`[secure]`: secure aggregation. The coordinator learns the sum of the updates, and none of them."""

    enabled: bool = Field(False, description="workers mask their updates, so that only their sum can be read")
    threshold: float | None = Field(
        None, gt=0.5, le=1, description="share of a round's workers that must stay to its end (default: over 2/3)"
    )
    clip: float = Field(
        64.0, ge=1e-6, le=1e6, description="greatest change of one number in a round; more is cut to it"
    )
    bits: int = Field(38, ge=8, le=48, description="of one number with its sign; fewer leave room for more samples")


class PrivacySection(Section):
    """`[privacy]`: whose data the model must not give away, and by how much noise (docs/privacy.md)."""

    level: Literal["none", "worker", "example"] = Field(
        "none",
        description="what is hidden: worker (all that one shard or worker has; noise on the coordinator) or example "
        "(each single sample; noise on the workers, which need opacus)",
    )
    clip: float | None = Field(
        None,
        gt=0,
        description="worker: greatest norm of an update, a longer one is cut to it (adaptive: of the first round, "
        "0.1 unless set); example: greatest norm of one sample's gradient",
    )
    noise: float | None = Field(None, gt=0, description="standard deviation of the noise, in units of clip")
    delta: float | None = Field(None, gt=0, lt=1, description="the delta that epsilon is told for")
    budget: float | None = Field(
        None, gt=0, description="worker: greatest epsilon; the job ends before a round that would pass it"
    )
    sample: float = Field(
        1.0, gt=0, le=1, description="worker: chance of each shard, or with private data worker, to be in a round"
    )
    population: int | None = Field(
        None, ge=1, description="worker, with partition = local: workers that are expected, which the sum is divided by"
    )
    adaptive: bool = Field(False, description="worker: clip follows a quantile of the updates' norms")
    quantile: float = Field(0.5, gt=0, lt=1, description="adaptive: share of updates that clip is to leave whole")
    clip_lr: float = Field(0.2, gt=0, description="adaptive: learning rate of clip's logarithm")
    count_noise: float | None = Field(
        None, gt=0, description="adaptive: noise on how many were left whole (default: a 20th of the mean sample)"
    )


INIT = r"^(sha256:[0-9a-f]{64}|[A-Za-z0-9._-]{1,63}(@([0-9]{1,7}|best|newest))?)$"
"""What `init` is where it is sent: the client has made a file's digest of its path (common.begins)."""


class JobSpec(Message):
    """A whole job, as a job file says it. Every key is also a flag of `lydian submit`."""

    task: Name = Field(description="a built-in task, or the name of the task file")
    rounds: int = Field(5, ge=1, le=1_000_000, description="rounds of training")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds initialisation, partition, order of samples, dropout")
    name: Name | None = Field(None, description="shown to people (default: the task)")
    target: float | None = Field(None, allow_inf_nan=False, description="stop when target_metric reaches this")
    target_metric: str = Field("accuracy", description="higher is better, unless it is a loss, error or perplexity")
    script: bool = Field(False, description="the file is a training script that calls lydian.rounds (docs/scripts.md)")
    arguments: Annotated[tuple[Annotated[str, Field(max_length=4_000)], ...], BeforeValidator(_words)] = Field(
        (), max_length=1_000, description='script: its command line, e.g. "--width 64"; one text, or a list of words'
    )
    init: Annotated[str, Field(pattern=INIT)] | None = Field(
        None,
        description="what the model begins with, in place of what model(config) builds: a file of weights "
        "(safetensors) or a folder of `lydian pull`; or JOB, JOB@ROUND, JOB@best: a model of another job",
    )
    train: TrainSection = TrainSection()
    data: DataSection = DataSection()
    round: RoundSection = RoundSection()
    aggregation: AggregationSection = AggregationSection()
    evaluation: EvaluationSection = EvaluationSection()
    secure: SecureSection = SecureSection()
    privacy: PrivacySection = PrivacySection()
    config: dict[str, str | int | float | bool | list[str | int | float | bool]] = Field(
        default_factory=dict, description="handed to the task as it is"
    )

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        if (why := compatibility.refusal(self)) is not None:
            raise ValueError(why)
        return self

    @property
    def hides_data(self) -> bool:
        """Whether nothing of a worker's data may be shown: then what the task prints stays on its worker as well."""
        return self.secure.enabled or self.privacy.level != "none" or self.data.partition == "local"

    @property
    def beyond_protocol_1(self) -> str:
        """What of this job a worker of protocol 1 cannot do, or not even read; empty: nothing."""
        beyond = [f"train.{name}{' = auto' if name == 'batch_size' else ''}" for name in self.train.new_keys]
        known = {"update": "fp32", "algorithm": "fedavg"}
        values = {name: getattr(self.aggregation, name) for name in known}
        beyond += [f"aggregation.{name} = {value}" for name, value in values.items() if value != known[name]]
        if self.data.partition in ("quantity", "natural"):
            beyond.append(f"data.partition = {self.data.partition}")
        beyond += ["script"] if self.script else []
        beyond += ["init"] if self.init is not None else []
        if self.evaluation.scope != "global":
            beyond.append(f"evaluation.scope = {self.evaluation.scope}")
        if self.evaluation.per_class:
            beyond.append("evaluation.per_class")
        beyond += ["secure.enabled"] if self.secure.enabled else []
        beyond += ["privacy.level = example"] if self.privacy.level == "example" else []
        return beyond[0] if beyond else ""


class TaskSignature(Message):
    """What somebody's key says of a task file (common.signing). The coordinator passes it on, and checks nothing."""

    name: Name = Field(description="of the key")
    key: KeyId
    digest: Digest = Field(description="of the file that was signed")
    signature: str = Field(pattern=r"^[A-Za-z0-9_-]{86}$", description="Ed25519, in base64url")


_IMPORTS_LYDIAN = re.compile(r"^(?:import|from) lydian\b", re.MULTILINE)
_DEFINES_MODEL = re.compile(r"^def model\(", re.MULTILINE)


class JobRequest(Message):
    """`POST /v1/jobs`. The same key again gives the same job."""

    spec: JobSpec
    task_source: str | None = Field(None, max_length=1 << 20, description="the task file's text, unless built in")
    signatures: tuple[TaskSignature, ...] = Field((), max_length=SIGNATURES, description="of the task file")
    key: str = Field(min_length=1, max_length=200, description="idempotency key")

    @model_validator(mode="after")
    def _of_a_file(self) -> Self:
        if self.signatures and self.task_source is None:
            raise ValueError("signatures are of a task file, and none was sent: leave them out for a built-in task")
        if self.spec.script and self.task_source is None:
            raise ValueError("script = true is for a file that is sent, and none was: name the script as the task")
        source = self.task_source or ""
        if not self.spec.script and _IMPORTS_LYDIAN.search(source) and not _DEFINES_MODEL.search(source):
            raise ValueError("the file imports lydian, so it is a training script: set script = true")
        return self


# ---------------------------------------------------------------- the machine


class Gpu(Message):
    """One GPU as its driver reports it."""

    index: int
    name: str
    memory: Count = Field(description="bytes")
    driver: str
    capability: tuple[int, int] | None = Field(None, description="compute capability, e.g. (8, 9)")
    uuid: str = Field("", max_length=100, description="e.g. GPU-b6a9…; empty: not known")
    free: Count | None = Field(None, description="bytes of memory that nobody used when it was asked; None: not known")
    ecc_uncorrected: Count = Field(0, description="memory errors since the driver was loaded that could not be mended")


NoGpu = Literal["", "no_library", "no_driver", "not_loaded", "no_answer", "no_device"]


class GpuInventory(Message):
    """The NVIDIA GPUs of a machine, in the order of the PCI bus, as their driver reports them."""

    gpus: tuple[Gpu, ...] = ()
    missing: NoGpu = Field("", description="why there is none; empty: there are some")
    reason: str = Field("", description="why there is none, or what of them is not known, as a sentence")


class TorchBuild(Message):
    """What the child that trains says about its torch."""

    version: str
    device: str = Field(description="the device that the child trains on: cpu, cuda, cuda:1, mps, xpu")
    cuda: str | None = Field(None, description="CUDA version of the build, None for a CPU build")
    rocm: str | None = Field(None, description="HIP version of the build, None where it is not for AMD GPUs")
    architectures: tuple[str, ...] = Field((), description="what the build has kernels for, e.g. sm_86")
    threads: int = Field(ge=1, description="CPU threads that the child computes with")
    ranks: int = Field(1, ge=1, description="processes that train together, each on a device of its own kind")
    name: str = Field("", max_length=200, description="the device's name, where it has one")
    capability: tuple[int, int] | None = Field(None, description="CUDA: compute capability of the device")
    memory: Count = Field(0, description="bytes of the device's memory that this process may use; 0: not known")
    free: Count = Field(0, description="bytes of it that were free when the child started")
    dtypes: tuple[str, ...] = Field(
        (), description="of fp32, bf16, fp16: in which a matrix product and its gradient came out right on the device"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="what precision = auto is there")
    precision_reason: str = Field("", max_length=500)
    opacus: str = Field("", max_length=50, description="its version: what example-level privacy needs; empty: none")
    compiles: bool = Field(False, description="whether torch.compile can work there")
    compiles_reason: str = Field("", max_length=500)


class Hardware(Message):
    """The machine that a worker runs on."""

    hostname: str
    system: str = Field(description="e.g. Linux-6.1-x86_64")
    python: str
    cpu: str
    cores: int = Field(ge=1)
    memory: Count = Field(description="bytes")
    gpus: tuple[Gpu, ...] = ()
    torch: TorchBuild
    device_reason: str = Field(
        "", max_length=1_000, description="why not on a GPU that is there; empty: nothing to say"
    )


class MachineProbe(Message):
    """What `python -m worker.probe` found: GPUs, and what a training process says that ran a kernel."""

    inventory: GpuInventory
    build: TorchBuild | None = Field(None, description="None: no torch could be loaded")
    failure: str = Field("", description="why no kernel ran on the device that was asked for; empty: it ran")


class Link(Message):
    """What one stream between a caller and the coordinator carries, as the caller measured it (common.link)."""

    down: float = Field(gt=0, allow_inf_nan=False, description="bytes a second from the coordinator")
    up: float = Field(gt=0, allow_inf_nan=False, description="bytes a second to the coordinator")
    latency_s: float = Field(ge=0, allow_inf_nan=False, description="seconds from the smallest call to its answer")


class Described(Message):
    """What `python -m worker.describe` found out about a training set."""

    train_samples: Count
    no_classes: str = Field("", description="why the class of each sample was not written; empty: it was")


class Holding(Message):
    """An attempt that a worker has on its disk."""

    assignment: Name
    attempt: int = Field(ge=1)
    digest: Digest | None = Field(None, description="of the update; None: it is not trained to the end")


class Registration(Message):
    """`POST /v1/workers`: with a join token the first time, with the worker's own credential ever after."""

    name: Name
    protocol: int
    version: str
    start_id: str = Field(min_length=1, max_length=64, description="new at each start of the worker process")
    hardware: Hardware
    data: tuple[Name, ...] = Field((), description="names of data folders that the worker's owner offers")
    trust: Trust = Field("none", description="which task files that are not built in this worker runs")
    trusted: tuple[Digest, ...] = Field((), max_length=10_000, description="the task files that are listed")
    signers: tuple[KeyId, ...] = Field((), max_length=1_000, description="whose signatures count, with trust signed")
    place: str = Field("", max_length=64, description="machine and state folder, hashed: a copied folder has another")
    holding: tuple[Holding, ...] = Field((), max_length=10_000, description="what its spool has from an earlier life")
    no_masks: str = Field("", max_length=500, description="why it cannot mask its updates ([secure]); empty: it can")


class Welcome(Message):
    """The coordinator's answer to a registration."""

    worker_id: str
    credential: str | None = Field(
        None, repr=False, description="what to call with from now on; None: the token that it came with"
    )
    protocol: int
    heartbeat_s: float
    ttl_s: float
    reason: str


# ---------------------------------------------------------------- the work


class TaskRef(Message):
    """Which task file: a built-in one by name, or a user's by digest."""

    name: Name
    digest: Digest | None = Field(None, description="of the user's task file; None for a built-in task")
    signatures: tuple[TaskSignature, ...] = Field(
        (), max_length=SIGNATURES, description="that came with the file: what a worker with --trust signed goes by"
    )


class ModelRef(Message):
    """One version of the model."""

    digest: Digest
    size: Count = Field(description="bytes of the safetensors file")


class Beginning(ModelRef):
    """What a job begins with in place of what `model(config)` builds: decided when it was submitted."""

    job: Name | None = Field(None, description="the job whose model it is; None: a file that was sent for it")
    round: Count | None = Field(None, description="of that job")


class StepRef(Message):
    """The way from one version of a model to the next: an encoded file (common.deltas), applied to the first."""

    base: Digest = Field(description="of the model that it begins with")
    model: Digest = Field(description="of the model that it leads to")
    digest: Digest = Field(description="of the file")
    size: Count = Field(description="bytes of the file")


class PrivateSteps(Message):
    """Steps of DP-SGD, as an accountant counts them."""

    sample_rate: float = Field(gt=0, le=1, description="chance of each sample to be in a step")
    noise: float = Field(gt=0, description="standard deviation, in units of the clip")
    steps: Count


class PrivateRun(PrivateSteps):
    """What a worker ran on its shard in a round with example-level privacy, and what that comes to."""

    epsilon: float = Field(ge=0, description="of one sample, over all rounds up to this one")
    delta: float = Field(gt=0, lt=1)


class Slots(Message):
    """What a shard of a job with `train.drift` begins with, beside the model: two files, fetched like models.

    Each is bare float32: the trained tensors in the order of the model (common.slots). One that is not named is zeros.
    """

    own: Digest | None = Field(None, description="the shard's own slot; None: it begins fresh")
    total: Digest | None = Field(None, description="the sum of all slots; None: zeros, or the method has no use for it")
    size: Count = Field(0, description="bytes of each of them; 0: there is none")
    shards: int = Field(ge=1, description="of the job, not of the round: the mean of all slots is total / shards")


class Range(Message):
    """A shard as samples [start, stop) of the job's seeded order of the training set (common.sharding)."""

    start: Count
    stop: Count


class Assignment(Message):
    """One piece of work for one worker: (job, round, shard, attempt). `attempt` is the fencing token."""

    id: Name = Field(description="the same for every attempt")
    attempt: int = Field(ge=1)
    job: Name
    kind: Kind
    round: Count = Field(description="the round trained (1…), or whose model is evaluated; 0 for init")
    shard: Count = 0
    shards: int = Field(ge=1, description="parts of the training data: shards as it was cut, or workers with their own")
    samples: Range | None = Field(None, description="train: None means the worker's own data, all of it")
    train_samples: Count = Field(0, description="samples in the training set where the model was built; 0: not known")
    task: TaskRef
    spec: JobSpec
    base: ModelRef | None = Field(
        None, description="the model to train or evaluate; init: what the job begins with, None where nothing is given"
    )
    optimizer_of: Count = Field(
        0,
        description="keep_optimizer, personal: the round whose state of this shard the worker has and goes on from; "
        "0: none",
    )
    state_shard: Count | None = Field(
        None, description="with optimizer_of: the number that the shard had in that round; None: the same"
    )
    ttl_s: float
    max_bytes: Count = Field(description="the most an upload for this may have")
    together: Count = Field(
        0, description="an update of at most so many bytes may come with its submission, in one call"
    )
    steps: tuple[StepRef, ...] = Field((), description="the last steps to `base`, oldest first, as far as they pay")
    private_before: tuple[PrivateSteps, ...] = Field(
        (), description="example-level privacy: what the worst-off sample has been through in the rounds before"
    )
    slots: Slots | None = Field(
        None, description="train.drift: what the shard begins with; None: there is no such thing"
    )


class PollRequest(Message):
    """`POST /v1/workers/{w}/poll`. The same claim_key again gives the same assignment: a lost answer costs nothing."""

    start_id: str = Field(min_length=1, max_length=64)
    claim_key: str = Field(min_length=1, max_length=64)
    wait_s: float = Field(25.0, ge=0, le=60)
    loaded: tuple[Name, ...] = Field((), description="jobs of which it keeps data in memory, or an optimiser's state")
    holding: tuple[Holding, ...] = Field((), max_length=10_000, description="updates handed in and kept until settled")
    degraded: str = Field("", max_length=500, description="why the worker can take no work now; empty: it can")
    together: Count = Field(0, description="a base model of at most so many bytes may come with the answer; 0: none")
    models: tuple[Digest, ...] = Field((), max_length=100, description="models that the worker has")
    link: Link | None = Field(None, description="the last that it measured; None: none yet")
    resting: str = Field("", max_length=500, description="why its owner lets it take none now: no fault; empty: it may")
    obeys: Order = Field("work", description="the operator's order that it knows of: another one is answered at once")


class Preparation(Message):
    """A job that a worker without work is to load: import the task, read the data. No lease; nothing is answered."""

    job: Name
    task: TaskRef
    spec: JobSpec


class PollAnswer(Message):
    """Work, jobs that are over and may be forgotten, and what became of the updates that the worker keeps."""

    assignment: Assignment | None = None
    forget: tuple[Name, ...] = ()
    settled: tuple[Holding, ...] = Field((), description="kept updates that are needed no more: delete them")
    wanted: tuple[Holding, ...] = Field((), description="kept updates whose bytes are lost here: hand them in again")
    unmask: "tuple[Unmask, ...]" = Field((), description="kept updates whose sum is to be unmasked: open its shares")
    prepare: Preparation | None = Field(None, description="a job to load before there is work of it; never with work")
    order: Order = Field("work", description="an operator's, which holds until another comes")
    renew: bool = Field(False, description="register once more before anything else: a new credential waits")


class Progress(Message):
    """Where the worker stands with its assignment. Shown, never journalled."""

    doing: Literal["downloading", "loading", "measuring", "training", "evaluating", "uploading"]
    step: Count = 0
    steps: Count | None = Field(None, description="steps in all, when that is known")
    samples: Count = Field(0, description="samples done so far")
    samples_per_s: float | None = None
    loss: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="what a training computes in")
    memory_used: Count | None = Field(None, description="bytes of the device's memory that are taken, by whomever")
    temperature: float | None = Field(None, allow_inf_nan=False, description="of the device, °C; None: not told")
    power: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="that the device draws, watts; None: not told"
    )


class Heartbeat(Message):
    """`POST /v1/workers/{w}/heartbeat`: renews the lease of an assignment."""

    start_id: str = Field(min_length=1, max_length=64)
    assignment: Name
    attempt: int = Field(ge=1)
    progress: Progress
    held: str = Field("", max_length=500, description="why the work stands still for now; empty: it goes on")
    said: str = Field("", max_length=4_000, description="what the task wrote last; shown, never journalled")


class HeartbeatAnswer(Message):
    """What the worker is to do with the assignment."""

    order: Literal["continue", "drain", "pause", "superseded", "cancelled"]
    reason: str


class ModelFacts(Message):
    """What the worker that built the model found out; the coordinator, having no torch, cannot."""

    parameters: Count = Field(description="trainable numbers in the model")
    train_samples: Count = Field(description="samples in the task's train split on that worker")
    test_samples: Count = Field(description="samples in the task's test split; 0: there is none, nothing is evaluated")
    bounds: tuple[Count, ...] = Field((), description="shard k is [bounds[k], bounds[k+1]) of the job's order")


class Submission(Message):
    """`POST /v1/updates/{assignment}/submit`: this is my result, the bytes of which are already with you."""

    attempt: int = Field(ge=1)
    digest: Digest | None = Field(None, description="of the uploaded file; None for an evaluation")
    samples: Count = Field(0, description="samples in the shard that was trained")
    steps: Count = 0
    seconds: float = Field(0.0, ge=0, description="seconds of training")
    metrics: Metrics = Field(default_factory=dict, max_length=100)
    bytes_down: Count = Field(0, description="bytes downloaded for this assignment")
    private: PrivateRun | None = Field(None, description="what a training with example-level privacy ran")
    facts: ModelFacts | None = Field(None, description="init only")
    resumed_at: Count = Field(0, description="the step of the checkpoint it went on from; 0: none was needed")
    rate_sum: float | None = Field(
        None, allow_inf_nan=False, description="train.drift: sum of the learning rates of the steps that were taken"
    )


class Receipt(Message):
    """The coordinator's answer to a submission that counts."""

    repeat: bool = Field(description="it had been accepted before; nothing changed")
    reason: str = Field(description="where the round now stands, for the worker's log")


class GpuThen(Message):
    """One GPU at the moment of a failure, as its driver told; None: it did not."""

    index: Count
    name: str = Field(max_length=200)
    memory: Count = Field(description="bytes")
    free: Count | None = Field(None, description="bytes")
    busy: float | None = Field(None, ge=0, le=1, description="share of the last moments in which it computed")
    temperature: float | None = Field(None, allow_inf_nan=False, description="°C")
    processes: Count | None = Field(None, description="that computed on it, the training itself among them")


class Scene(Message):
    """The machine on which an attempt failed, as it was then."""

    python: str = Field(max_length=100)
    system: str = Field(max_length=200, description="e.g. Linux-6.1-x86_64")
    torch: TorchBuild | None = Field(None, description="None: the child had not come so far")
    driver: str = Field("", max_length=100, description="of the GPUs; empty: there is none")
    gpus: tuple[GpuThen, ...] = Field((), max_length=64)
    no_gpus: str = Field("", max_length=1_000, description="why none is told of, or what of them is not known")


class Abandon(Message):
    """`POST /v1/updates/{assignment}/abandon`: the worker will not finish this, and says why."""

    attempt: int = Field(ge=1)
    code: Literal["released", "task_failed", "task_exited", "task_stalled", "out_of_memory", "no_data", "not_trusted",
                  "unknown_task", "bad_task", "worker_error", "disk_full", "missing_package"]  # fmt: skip
    sentence: str = Field(max_length=2_000)
    detail: str = Field("", max_length=200_000, description="traceback and the last lines of the child's output")
    scene: Scene | None = Field(None, description="the machine then; None: nothing crashed, or an older worker")


# ---------------------------------------------------------------- secure aggregation (common.secure)

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="X25519, in hex")]
OpenShare = Annotated[str, Field(pattern=r"^[0-9a-f]{132}$", description="a number modulo 2^521 - 1, in hex")]
SealedShares = Annotated[str, Field(pattern=r"^[0-9a-f]{296}$", description="two shares and the tag, in hex")]
MEMBERS = 50
"""Members of one sum at most: every pair agrees on keys, and beyond that they cost more than the update."""


class SecureKeys(Message):
    """`POST /v1/updates/{assignment}/keys`: the worker will send a masked update, and these are its keys."""

    attempt: int = Field(ge=1)
    cipher_key: PublicKey = Field(description="with which its peers seal shares for it")
    mask_key: PublicKey = Field(description="with which each peer agrees on a mask")
    seed_check: Digest = Field(description="SHA-256 of the seed of its own mask, so that wrong shares are noticed")


class SecureMember(Message):
    """One who takes part in a sum: an attempt at a shard, with its keys."""

    shard: Count
    attempt: int = Field(ge=1)
    worker: Name
    cipher_key: PublicKey
    mask_key: PublicKey
    seed_check: Digest


class Roster(Message):
    """Who sums together, and how many of them it takes to unmask the sum. All keys are bound to its digest."""

    job: Name
    round: Count
    seal: Count = Field(description="how often this round was begun anew before")
    threshold: int = Field(ge=2)
    members: tuple[SecureMember, ...] = Field(max_length=MEMBERS, description="in the order of their shards")


class SecureShares(Message):
    """`POST /v1/updates/{assignment}/shares`: the worker's two secrets in shares, each pair sealed for one peer."""

    attempt: int = Field(ge=1)
    roster: Digest
    sealed: dict[Count, SealedShares] = Field(max_length=MEMBERS, description="by the peer's shard")


class Group(Message):
    """The members whose masks go into the updates: those whose shares are in."""

    roster: Digest
    shards: tuple[Count, ...] = Field(max_length=MEMBERS)


class Unmask(Message):
    """The coordinator asks a worker for its shares, since the updates that will be summed are decided."""

    assignment: Name
    attempt: int = Field(ge=1)
    roster: Digest
    survivors: tuple[Count, ...] = Field(max_length=MEMBERS, description="shards whose updates are summed")
    sealed: dict[Count, SealedShares] = Field(max_length=MEMBERS, description="what peers sealed for it, by shard")


class Reveal(Message):
    """`POST /v1/updates/{assignment}/reveal`: of each member one share, and never both of one."""

    attempt: int = Field(ge=1)
    roster: Digest
    seeds: dict[Count, OpenShare] = Field(max_length=MEMBERS, description="of members whose updates are summed")
    keys: dict[Count, OpenShare] = Field(max_length=MEMBERS, description="of members that dropped out")


# ---------------------------------------------------------------- what is shown


class PrivacySpent(Message):
    """What the model gives away of whoever is protected, once a round was averaged."""

    level: Literal["worker", "example"]
    epsilon: float = Field(ge=0, description="over all rounds so far; example: of the worst-off sample")
    epsilon_rdp: float | None = Field(None, description="the same by Rényi divergences: another upper bound")
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0, description="greatest norm in this round, of an update or of a sample's gradient")
    next_clip: float | None = Field(None, description="worker: of the next round")
    noise_norm: float | None = Field(None, description="worker: norm that the noise on the mean was expected to have")


class Submitter(Message):
    """Who submitted a job."""

    token: str = Field(max_length=200, description="the token's id")
    name: str = Field("", max_length=200, description="what the token was called then")


class JobView(Message):
    """One job as `lydian jobs` shows it."""

    id: str
    name: str
    task: str
    state: State
    reason: str
    submitted_at: str = Field(description="ISO 8601, the coordinator's clock")
    round: int = Field(description="rounds closed so far")
    rounds: int
    model: ModelRef | None = Field(None, description="the newest model")
    metrics: dict[str, float] = Field(default_factory=dict, description="newest evaluation")
    metrics_round: int | None = None
    best_round: int | None = None
    best_value: float | None = None
    parameters: int | None = None
    privacy: PrivacySpent | None = Field(None, description="of the newest round")
    warnings: tuple[str, ...] = Field((), description="what a person should know before trusting the result")
    slots: Count | None = Field(None, description="train.drift: shards that carry something; the others begin fresh")
    submitted_by: Submitter | None = Field(None, description="None: it was submitted before that was noted")
    begins_with: Beginning | None = Field(None, description="None: what model(config) builds")
    spec: JobSpec


class LogEntry(Message):
    """One trouble of a job, whole: what `lydian logs` prints."""

    id: int
    at: str
    worker: str
    where: str = Field(description="e.g. round 3, shard 2, attempt 1")
    code: str
    sentence: str
    detail: str
    cause: str = Field("", description="what usually does that, e.g. cuda_out_of_memory; empty: not known")
    advice: str = Field("", description="what to do about it; empty: nothing is known")
    scene: Scene | None = Field(None, description="the machine then")


class Output(Message):
    """What the task wrote last on one worker that is at work for a job, as its last heartbeat had it."""

    worker: str
    where: str = Field(description="e.g. round 3, shard 2, attempt 1")
    said: str = Field(description="its last lines; … at the beginning stands for what was cut off")


class TailnetNode(Message):
    """A machine of the tailnet, as tailscaled tells of it."""

    stable_id: str = Field(description="stays when name, addresses and owner change")
    name: str = Field(description="full name, without the last dot")
    owner: str = Field(description="the login of its user, or its tags; a tagged machine has no user")
    os: str = ""
    key_expiry: AwareDatetime | None = Field(None, description="when it drops off the tailnet; None: never")


class TailnetPath(Message):
    """The way that packets take between the coordinator and a worker."""

    kind: Literal["direct", "relay", "peer relay", "loopback", "other", "unknown"] = Field(
        description="other: not over the tailnet; unknown: tailscaled has not said"
    )
    via: str = Field("", description="direct: address and port; relay: its region (DERP); peer relay: where it is")


class WorkerSpeed(Message):
    """What was measured of a worker at one job that goes on, and what follows from it."""

    job: Name
    samples_per_s: float | None = Field(None, description="training; moving average; None: not measured yet")
    overhead_s: float | None = Field(None, description="transfers, loading and waiting of its last update, in seconds")
    share: float | None = Field(None, description="of the samples of the open round that were cut for it")
    evaluates: str = Field("", description="why it gets no shard and only evaluates; empty: it may train")
    expected_in_s: float | None = Field(None, description="until its update is expected; below 0: it falls behind")


class WorkerView(Message):
    """One worker as `lydian workers` shows it."""

    id: str
    name: str
    state: Literal["idle", "working", "gone", "draining", "paused", "resting", "degraded", "set aside"]
    reason: str
    last_seen_s: float = Field(description="seconds since its last call")
    version: str
    hardware: Hardware
    data: tuple[str, ...]
    trust: Trust
    labels: tuple[str, ...] = Field((), description="of the join token that let it in")
    assignment: str | None = None
    progress: Progress | None = None
    link: Link | None = Field(None, description="its line to the coordinator, as it measured it last")
    address: str | None = Field(None, description="where it called from last; None: not since the coordinator started")
    node: TailnetNode | None = Field(None, description="whose address that is, where Tailscale knows it")
    node_unknown: str = Field("", description="why node is not known")
    path: TailnetPath | None = Field(None, description="the way to it; None: it has not called")
    warnings: tuple[str, ...] = Field((), description="what about its line, its key or its identity needs a person")
    speeds: tuple[WorkerSpeed, ...] = Field((), description="at the jobs that go on, oldest first")


class Probed(Message):
    """`PUT /v1/probe`: what of the body came."""

    bytes: Count


TokenState = Literal["counts", "expired", "spent", "revoked"]
Label = Name


class TokenRequest(Message):
    """`POST /v1/tokens`."""

    scope: Literal["read", "submit", "admin", "join"] = "join"
    name: Name | Literal[""] = Field("", description="for people, to know it by")
    ttl_s: float | None = Field(None, gt=0, le=315_576_000, description="seconds that it counts; None: until revoked")
    uses: int | None = Field(None, ge=1, le=1_000_000, description="join: workers that it lets in; None: any number")
    labels: tuple[Label, ...] = Field((), max_length=16, description="join: what its workers are called")

    @model_validator(mode="after")
    def _only_workers_join(self) -> Self:
        if self.scope != "join" and (self.uses is not None or self.labels):
            raise ValueError(f"uses and labels are of join tokens, and this one is of scope {self.scope}")
        return self


class TokenAnswer(Message):
    """A token with a new secret: shown once, kept only as its hash."""

    token: str = Field(repr=False)
    id: str = ""
    url: str = Field("", description="join: where workers reach the coordinator; empty: it does not know")


class RotateRequest(Message):
    """`POST /v1/tokens/{token}/rotate`."""

    overlap_s: float = Field(
        86_400.0, ge=0, le=31_557_600, description="seconds that the first secret counts on, unless the second is used"
    )


class TokenView(Message):
    """A token as `lydian token list` shows it: never its secret."""

    id: str
    name: str
    scope: str
    state: TokenState
    created_at: str = Field(description="ISO 8601, the coordinator's clock; so are the others")
    expires_at: str | None = Field(None, description="None: never")
    revoked_at: str | None = None
    uses: int | None = Field(None, description="join: workers that it lets in; None: any number")
    joined: Count = Field(0, description="join: workers that it has let in")
    labels: tuple[str, ...] = ()
    worker: str | None = Field(None, description="work: the worker's id")
    rotating: bool = Field(False, description="a second secret was not used yet")
    last_used_at: str | None = Field(None, description="about; None: not known to have been")
    last_address: str | None = Field(None, description="where from")


class RevokeAnswer(TokenView):
    """A token that counts no more, and what became of its jobs."""

    open_jobs: tuple[str, ...] = Field((), description="that it submitted and that go on without it")
    ended_jobs: tuple[str, ...] = Field((), description="that it submitted and that this call ended")


class RotateAnswer(Message):
    """What became of a rotation."""

    token: str | None = Field(None, repr=False, description="with its second secret; None: its worker fetches that")
    id: str
    reason: str


class VersionView(Message):
    """`GET /version`."""

    version: str
    protocol: int


PollAnswer.model_rebuild()  # it names messages that stand below it

"""What a private job may be, and its numbers in words: shared by who writes the job, who takes it and who watches it.

Pure. `refusal` says why a job cannot keep the promise of its `[privacy]`; `warnings` says what the promise costs.

    level = worker     x <- x + (Σ clipped updates + N(0, (z S)² I)) / (q K)     noise once, on the coordinator
    level = example    DP-SGD in each worker: each sample's gradient is clipped, and noise is added every step

Sources: McMahan et al. 2017, arXiv 1710.06963 (worker); Abadi et al. 2016, arXiv 1607.00133 (example); Andrew et al.
2019, arXiv 1905.03871 (adaptive clip).
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from common.robustness import WEIGHING

if TYPE_CHECKING:
    from common.messages import JobSpec, PrivacySection

FIRST_CLIP = 0.1  # of an adaptive clip. Source: Andrew et al. 2019, section 3.1
COUNT_NOISE = 20  # the noise on the count is a 20th of the mean sample. Source: ibid.
FEW = 100  # members in a round below which worker-level privacy is warned of, whatever the model


# ---------------------------------------------------------------- numbers


def population(spec: "JobSpec") -> int:
    """Members that a round is sampled from: K. Fixed for the job, whoever is there."""
    if spec.data.partition == "local":
        return spec.privacy.population or 1
    return spec.data.shards if isinstance(spec.data.shards, int) else 1


def mean_sample(spec: "JobSpec") -> float:
    """Members of a round in the mean: q K, which the sum is divided by."""
    return spec.privacy.sample * population(spec)


def first_clip(section: "PrivacySection") -> float:
    """The bound of the first round: S."""
    return FIRST_CLIP if section.clip is None else section.clip


def count_noise(spec: "JobSpec") -> float:
    """Standard deviation of the noise on the number of updates that an adaptive clip left whole: σ_b."""
    given = spec.privacy.count_noise
    return mean_sample(spec) / COUNT_NOISE if given is None else given


def update_noise(spec: "JobSpec") -> float:
    """Standard deviation of the noise on the sum of updates, in units of the clip.

    With a fixed clip that is z. An adaptive one releases a count too, and both together must cost what z does:
    z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2). Source: Andrew et al. 2019, theorem 1.
    """
    noise = spec.privacy.noise or 0.0
    if not spec.privacy.adaptive:
        return noise
    return 1 / math.sqrt(noise**-2 - (2 * count_noise(spec)) ** -2)


def noise_norm(spec: "JobSpec", clip: float, parameters: int) -> float:
    """L2 norm that the noise on the mean change is expected to have: z S √P / (q K)."""
    return update_noise(spec) * clip * math.sqrt(parameters) / mean_sample(spec)


# ---------------------------------------------------------------- what cannot be kept


def refusal(spec: "JobSpec") -> str | None:
    """Why a job's `[privacy]` cannot be kept; None: it can."""
    match spec.privacy.level:
        case "none":
            reasons = _unused(spec.privacy)
        case "worker":
            reasons = _worker_level(spec)
        case _:
            reasons = _example_level(spec)
    return next(reasons, None)


def _set(section: "PrivacySection", *names: str) -> list[str]:
    """Those of the keys that were set to something else than their default."""
    fields = type(section).model_fields
    return [name for name in names if getattr(section, name) != fields[name].default]


def _unused(section: "PrivacySection") -> Iterator[str]:
    for name in _set(section, *(name for name in type(section).model_fields if name != "level")):
        yield f"privacy.{name} means nothing while privacy.level = none: set level to worker or example, or drop it"


def _needed(spec: "JobSpec") -> Iterator[str]:
    section = spec.privacy
    if section.noise is None:
        yield f"privacy.level = {section.level} needs privacy.noise, e.g. 1.0: without noise nothing is private"
    if section.delta is None:
        yield f"privacy.level = {section.level} needs privacy.delta, well below 1 / {_protected(spec)}, e.g. 1e-5"


def _protected(spec: "JobSpec") -> str:
    return "the number of samples" if spec.privacy.level == "example" else "the number of workers or shards"


def _worker_level(spec: "JobSpec") -> Iterator[str]:
    section, data, aggregation = spec.privacy, spec.data, spec.aggregation
    yield from _needed(spec)
    if section.clip is None and not section.adaptive:
        yield "privacy.level = worker needs privacy.clip, the greatest norm of an update, or privacy.adaptive = true"
    yield from _members(spec)
    if section.delta is not None and section.delta * population(spec) >= 1:
        yield (
            f"privacy.delta = {section.delta:g} allows that one of {population(spec)} members is given away whole: "
            f"set it well below {1 / population(spec):g}"
        )
    yield from _adaptive(spec)
    if aggregation.algorithm in WEIGHING:
        yield (
            f"privacy.level = worker weighs all updates alike, and aggregation.algorithm = {aggregation.algorithm} "
            "does not: use fedavg, fedavgm, fedadam, fedadagrad, fedyogi or diloco"
        )
    if aggregation.update == "topk":
        yield (
            "privacy.level = worker has noise on every number, and aggregation.update = topk sends 64 of 4096: "
            "use fp32, bf16, int8 or int4"
        )
    if data.fraction != 1.0:
        yield "privacy.level = worker samples at random for itself: set privacy.sample instead of data.fraction"
    yield from _beside(spec, NOT_BESIDE_WORKER)


def _members(spec: "JobSpec") -> Iterator[str]:
    data, section = spec.data, spec.privacy
    if data.partition == "local":
        if section.population is None:
            yield "privacy.level = worker with partition = local needs privacy.population, how many are expected"
    elif section.population is not None:
        yield "privacy.population is for partition = local; with others data.shards says how many there are"
    elif data.shards == "auto":
        yield (
            "privacy.level = worker hides one member of a fixed number, and data.shards = auto cuts anew for whoever "
            "is there: set data.shards to a number, or partition = local for data that the workers own"
        )


def _adaptive(spec: "JobSpec") -> Iterator[str]:
    section = spec.privacy
    if not section.adaptive:
        for name in _set(section, "quantile", "clip_lr", "count_noise"):
            yield f"privacy.{name} is for privacy.adaptive = true"
    elif section.noise is not None and section.noise >= 2 * count_noise(spec):
        yield (
            f"privacy.adaptive with {mean_sample(spec):g} members a round works for privacy.noise below "
            f"{2 * count_noise(spec):g}, twice the noise on the count, and it is {section.noise:g}: raise "
            "privacy.count_noise, take more members, or set a fixed privacy.clip"
        )


def _example_level(spec: "JobSpec") -> Iterator[str]:
    section, train = spec.privacy, spec.train
    yield from _needed(spec)
    if section.clip is None:
        yield "privacy.level = example needs privacy.clip, the greatest norm of one sample's gradient, e.g. 1.0"
    for name in _set(section, "budget", "sample", "population", "adaptive", "quantile", "clip_lr", "count_noise"):
        yield f"privacy.{name} is for level = worker; with level = example, rounds, steps, batch and noise decide"
    if train.batch_size == "auto":
        yield "privacy.level = example needs train.batch_size as a number: epsilon depends on it"
    if train.precision != "fp32":
        yield f"privacy.level = example computes in fp32, and not train.precision = {train.precision}"
    if train.clip is not None:
        yield "privacy.level = example clips each sample's gradient itself: drop train.clip, set privacy.clip"
    yield from _beside(spec, NOT_BESIDE_EXAMPLE)


PLAIN_VALUES = (None, False, 0, (), "none", "sync", "refuse", "global")
"""What a key may be that is named below: it does nothing then."""
_UNEVEN = "needs a sum to which each member adds at most its clipped update"
_ONCE = "counts what each member cost once a round"
_LOOP = "has a training loop of its own, which does not know it"
_BARE = "tells nothing of the data without noise"
NOT_BESIDE_WORKER = (
    ("aggregation", "robust", _UNEVEN),
    ("aggregation", "norm_outlier", _UNEVEN),
    ("round", "late", _ONCE),
    ("round", "mode", _ONCE),
    ("train", "drift", _UNEVEN),
    ("train", "frozen", "adds noise to all that a model has"),
    ("train", "personal", "adds noise to all that a model has"),
    ("train", "trainable_only", "adds noise to all that a model has"),
    ("secure", "enabled", "clips on the coordinator, which must see each update"),
    ("evaluation", "scope", _BARE),
)
"""(section, key, what the level is instead) of keys that would break its promise, some of which a job may not have."""
NOT_BESIDE_EXAMPLE = (
    ("round", "late", _ONCE),
    ("round", "mode", _ONCE),
    ("train", "drift", _LOOP),
    ("train", "proximal", _LOOP),
    ("train", "frozen", _LOOP),
    ("train", "personal", _LOOP),
    ("train", "trainable_only", _LOOP),
    ("evaluation", "scope", _BARE),
)


def _beside(spec: "JobSpec", keys: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Keys that a job has beside `[privacy]` and must not."""
    for section, key, instead in keys:
        value = getattr(getattr(spec, section, None), key, None)
        if value not in PLAIN_VALUES:
            yield f"privacy.level = {spec.privacy.level} {instead}: drop {section}.{key} = {value}"


# ---------------------------------------------------------------- what it costs, in words


def warnings(spec: "JobSpec", parameters: int | None, clip: float | None = None) -> tuple[str, ...]:
    """What a person should know before believing in a private job.

    Args:
        spec: the job.
        parameters: numbers that are trained; None: the model is not built yet.
        clip: the bound of the round under way, where it moves.
    """
    if spec.privacy.level != "worker":
        return ()
    bound, members = clip or first_clip(spec.privacy), mean_sample(spec)
    each = update_noise(spec) * bound / members
    numbers = f"noise on each number of the mean has standard deviation {each:.3g}"
    if parameters is None:
        if members >= FEW:
            return ()
        size = f"{numbers}, a norm of √parameters times that"
    else:
        norm = noise_norm(spec, bound, parameters)
        if norm <= bound:
            return ()
        size = f"{numbers}, over {parameters:,} parameters a norm of {norm:.3g}"
    said = f"worker-level privacy with {members:g} members a round: {size}, beside a change of at most {bound:.3g}"
    if members >= FEW:
        return (f"{said}: take more members, fewer parameters or less noise",)
    return (f"{said}. So few cannot hide one of them and learn: privacy.level = example hides single samples",)


def spent_words(epsilon: float, delta: float) -> str:
    """What was spent, for people: `ε 3.94 at δ 1e-05`."""
    return f"ε {shown_epsilon(epsilon)} at δ {delta:g}"


def shown_epsilon(epsilon: float) -> str:
    """Epsilon to two digits, never rounded down."""
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}" if math.isfinite(epsilon) else "∞"


def budget_words(spec: "JobSpec", affordable: int | None, epsilon: float | None) -> tuple[str, ...]:
    """What the planned rounds cost, and where the budget ends the job before."""
    section = spec.privacy
    if epsilon is None or section.delta is None:
        return ()
    if affordable is None or section.budget is None or affordable >= spec.rounds:
        return (f"{spec.rounds} rounds cost {spent_words(epsilon, section.delta)}",)
    ends = f"the budget of ε {section.budget:g} is spent after {affordable} of {spec.rounds} rounds, and the job ends"
    return (f"{ends} there: all of them would cost {spent_words(epsilon, section.delta)}",)

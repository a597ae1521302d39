"""Private rounds: what is refused, who is sampled, clip and noise by hand, the accountant's known answers."""

import asyncio
import math
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common import privacy
from common.derivation import LONGEST, derived_key, hkdf
from common.errors import BadJobError
from common.messages import JobSpec, PrivacySection
from common.weights import Array, Notes
from server import accountant, accounting
from server import privacy as numbers
from server.accounting import AccountantError, Accounting, Mechanism, Spent
from server.privacy import Noisy
from server.seeds import SeedLostError, Seeds

SEED = bytes(range(32))
WORKER = {"level": "worker", "clip": 2.0, "noise": 1.0, "delta": 1e-3}
EXAMPLE = {"level": "example", "clip": 1.0, "noise": 1.0, "delta": 1e-5}


def job(level: dict[str, Any] = WORKER, **keys: Any) -> JobSpec:
    """A private job; a section as a dictionary: job(data={"shards": 8}); keys of [privacy] by `private`."""
    private = keys.pop("private", {})
    return JobSpec.model_validate({"task": "digits", "data": {"shards": 4}, **keys, "privacy": {**level, **private}})


# ---------------------------------------------------------------- keys


def test_hkdf_gives_the_keys_of_its_standard() -> None:
    """RFC 5869, appendix A, test cases 1 to 3."""
    first = hkdf(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), size=42)
    assert first.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    long = hkdf(bytes(range(80)), salt=bytes(range(0x60, 0xB0)), info=bytes(range(0xB0, 0x100)), size=82)
    assert long.hex().startswith(
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c6"
    )
    assert (
        hkdf(b"\x0b" * 22, size=42).hex().startswith("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")
    )


@pytest.mark.parametrize("size", [0, LONGEST + 1])
def test_a_key_of_impossible_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"and not {size}"):
        hkdf(SEED, size=size)


def test_keys_of_unlike_purposes_have_nothing_in_common() -> None:
    purposes: list[tuple[int | str, ...]] = [("a", "b"), ("ab",), (1,), ("1",), ("a", 1), ("a", "1")]
    assert len({derived_key(SEED, *purpose) for purpose in purposes}) == len(purposes)
    assert derived_key(SEED, "a") != derived_key(SEED[::-1], "a")


# ---------------------------------------------------------------- what is refused at submit


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"private": {"level": "none"}}, "privacy.clip means nothing while privacy.level = none"),
        ({"private": {"noise": None}}, "needs privacy.noise"),
        ({"private": {"delta": None}}, "needs privacy.delta, well below 1 / the number of workers or shards"),
        ({"private": {"clip": None}}, "needs privacy.clip, the greatest norm of an update"),
        ({"data": {"shards": "auto"}}, "set data.shards to a number, or partition = local"),
        ({"data": {"partition": "local"}}, "needs privacy.population"),
        ({"private": {"population": 4}}, "privacy.population is for partition = local"),
        ({"private": {"delta": 0.25}}, "one of 4 members is given away whole: set it well below 0.25"),
        ({"private": {"quantile": 0.9}}, "privacy.quantile is for privacy.adaptive = true"),
        ({"private": {"adaptive": True}}, "works for privacy.noise below 0.4, twice the noise on the count"),
        ({"aggregation": {"update": "topk"}}, "has noise on every number"),
        (
            {"round": {"late": "use"}, "aggregation": {"update": "int8"}},
            "cost once a round: drop round.late = use",
        ),
        ({"data": {"shards": 4, "fraction": 0.5}}, "set privacy.sample instead of data.fraction"),
        ({"level": EXAMPLE, "private": {"clip": None}}, "the greatest norm of one sample's gradient"),
        ({"level": EXAMPLE, "private": {"delta": None}}, "1 / the number of samples"),
        ({"level": EXAMPLE, "private": {"budget": 3.0}}, "privacy.budget is for level = worker"),
        ({"level": EXAMPLE, "train": {"batch_size": "auto"}}, "needs train.batch_size as a number"),
        ({"level": EXAMPLE, "train": {"precision": "bf16"}}, "computes in fp32, and not train.precision = bf16"),
        ({"level": EXAMPLE, "train": {"clip": 1.0}}, "drop train.clip, set privacy.clip"),
        ({"level": EXAMPLE, "round": {"late": "use"}, "aggregation": {"update": "bf16"}}, "drop round.late = use"),
    ],
)
def test_a_job_that_could_not_keep_its_promise_is_refused_in_a_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        job(**keys)
    assert said in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("robust", "median"), ("algorithm", "fednova")])
def test_rules_that_are_no_plain_mean_are_refused(key: str, value: str) -> None:
    spec = job()
    changed = spec.model_copy(update={"aggregation": spec.aggregation.model_copy(update={key: value})})
    assert f"aggregation.{key} = {value}" in (privacy.refusal(changed) or "")


def test_a_job_without_privacy_is_as_it_was() -> None:
    plain = JobSpec(task="digits")
    assert privacy.refusal(plain) is None
    assert plain.privacy == PrivacySection()
    assert privacy.warnings(plain, 10_000) == ()


@pytest.mark.parametrize("level", ["worker", "example"])
def test_the_jobs_in_the_documentation_are_jobs(level: str) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs/privacy.md").read_text(encoding="utf-8")
    blocks = [block for block in text.split("## ") if block.lower().startswith(f"{level} level\n")]
    lines = [line[4:] for line in blocks[0].splitlines() if line.startswith("    ")]
    assert JobSpec.model_validate(tomllib.loads("\n".join(lines))).privacy.level == level


# ---------------------------------------------------------------- who is sampled


def test_everybody_is_sampled_with_chance_one_and_each_for_itself_with_less() -> None:
    members = [f"shard {k}" for k in range(2_000)]
    assert all(numbers.sampled(SEED, 1.0, 1, member) for member in members)
    drawn = [[numbers.sampled(SEED, 0.3, round_index, member) for member in members] for round_index in (1, 2)]
    assert [abs(sum(row) - 600) < 4 * math.sqrt(2_000 * 0.3 * 0.7) for row in drawn] == [True, True]
    assert drawn[0] != drawn[1]
    assert drawn[0] != [numbers.sampled(SEED[::-1], 0.3, 1, member) for member in members]


# ---------------------------------------------------------------- clip and noise


def mean(noisy: Noisy, changes: list[list[float]], first: int = 0) -> Array:
    arrays = [np.array(change, np.float32) for change in changes]
    out, scratch = np.empty(len(changes[0]) if changes else 3), np.empty(len(changes[0]) if changes else 3)
    return noisy.mean_change(arrays, "w", first, out=out, scratch=scratch)


def test_the_mean_of_clipped_changes_is_the_one_computed_by_hand() -> None:
    """Norms 5, 1 and 0 under a clip of 2: factors 0.4, 1, 1; then the divisor 0.5 x 4 = 2."""
    spec = job(private={"sample": 0.5})
    noisy = numbers.noisy(spec, 2.0, [5.0, 1.0, 0.0], SEED, 1)
    assert noisy.factors == (0.4, 1.0, 1.0)
    assert (noisy.deviation, noisy.divisor) == (2.0, 2.0)
    silent = Noisy(noisy.factors, 0.0, noisy.divisor, SEED, 1)
    found = mean(silent, [[3.0, 0.0, -4.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.allclose(found, [0.6, 0.5, -0.8], rtol=1e-15)


def test_noise_comes_once_in_units_of_the_clip_and_over_the_fixed_number() -> None:
    spec = job(private={"noise": 3.0})
    noise = numbers.gaussian(SEED, 7, "w", 0, 3)
    found = mean(numbers.noisy(spec, 2.0, [], SEED, 7), [])
    assert np.array_equal(found, noise * 6.0 / 4.0), "an empty sample is noise alone"


def test_too_many_changes_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        mean(Noisy((1.0,), 0.0, 1.0, SEED, 1), [[1.0], [1.0]])


@given(st.integers(0, 3 * numbers.PIECE), st.integers(1, 3 * numbers.PIECE))
def test_noise_is_the_same_whichever_block_asks_for_it(first: int, count: int) -> None:
    whole = numbers.gaussian(SEED, 1, "w", 0, 6 * numbers.PIECE)
    assert np.array_equal(numbers.gaussian(SEED, 1, "w", first, count), whole[first : first + count])


def test_noise_of_other_rounds_tensors_and_seeds_is_unrelated_and_normal() -> None:
    count = 4 * numbers.PIECE
    draws = [
        numbers.gaussian(SEED, 1, "w", 0, count),
        numbers.gaussian(SEED, 2, "w", 0, count),
        numbers.gaussian(SEED, 1, "b", 0, count),
        numbers.gaussian(SEED[::-1], 1, "w", 0, count),
    ]
    bound = 5 / math.sqrt(count)
    for draw in draws:
        assert abs(draw.mean()) < bound
        assert abs(draw.var() - 1) < 2 * bound
        assert abs((draw**4).mean() - 3) < 20 * bound
        assert abs((np.abs(draw) < 1).mean() - 0.682689) < bound
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < bound
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < bound


# ---------------------------------------------------------------- the clip that moves


ADAPTIVE = {"adaptive": True, "clip": None, "noise": 0.1}


def test_the_clip_moves_by_the_formula_of_its_paper() -> None:
    """Three of four updates are within C = 0.1: b = 3/4 + noise/4, and C shrinks by exp(-0.2 (b - 0.5))."""
    spec, norms = job(private=ADAPTIVE), [0.05, 0.01, 0.1, 7.0]
    assert privacy.first_clip(spec.privacy) == 0.1
    draw = float(np.random.Generator(np.random.Philox(
        key=int.from_bytes(derived_key(SEED, "count", 3, size=16), "little"))).standard_normal())  # fmt: skip
    b = 0.75 + 0.2 * draw / 4
    assert numbers.next_clip(spec, 0.1, norms, SEED, 3) == pytest.approx(0.1 * math.exp(-0.2 * (b - 0.5)), rel=1e-12)


def test_nobody_sampled_says_nothing_of_the_norms() -> None:
    spec = job(private={**ADAPTIVE, "count_noise": 0.3, "noise": 1e-9})
    moves = [numbers.next_clip(spec, 1.0, [], SEED, round_index) for round_index in range(1, 400)]
    assert abs(float(np.mean(np.log(moves)))) < 0.01


def test_a_fixed_clip_stays() -> None:
    assert numbers.next_clip(job(), 2.0, [9.0], SEED, 1) == 2.0


def test_an_adaptive_clip_pays_for_its_count_with_more_noise_on_the_sum() -> None:
    spec = job(private={**ADAPTIVE, "noise": 0.3, "count_noise": 0.25})
    sum_noise = privacy.update_noise(spec)
    assert sum_noise == pytest.approx(0.375)  # (0.3^-2 - 0.5^-2)^-1/2
    assert sum_noise**-2 + (2 * 0.25) ** -2 == pytest.approx(0.3**-2)


# ---------------------------------------------------------------- models


def test_running_statistics_are_refused_and_other_buffers_are_not() -> None:
    assert numbers.unfit(Notes(buffers=("positions",))) is None
    said = numbers.unfit(Notes(buffers=("n.var", "n.mean"), variances={"n.var": "n.mean"}))
    assert said is not None
    assert "n.var, 1 in all" in said
    assert "GroupNorm" in said


# ---------------------------------------------------------------- in words


def test_a_small_fleet_is_warned_with_its_own_numbers() -> None:
    spec = job(private={"noise": 4.0, "clip": 1.0})
    before, after = privacy.warnings(spec, None)[0], privacy.warnings(spec, 1_000_000)[0]
    assert "with 4 members a round: noise on each number of the mean has standard deviation 1, " in before
    assert "over 1,000,000 parameters a norm of 1e+03, beside a change of at most 1" in after
    assert "level = example" in after


def test_who_has_enough_members_is_not_warned() -> None:
    many = job(data={"shards": 10_000}, private={"delta": 1e-6})
    assert privacy.warnings(many, None) == ()
    assert privacy.warnings(many, 1_000) == ()
    assert "take more members" in privacy.warnings(many, 10**9)[0]


def test_a_bound_that_moved_is_the_one_in_the_words() -> None:
    assert "at most 0.5." in privacy.warnings(job(), 100, clip=0.5)[0]


def test_local_data_are_counted_by_population() -> None:
    spec = job(data={"partition": "local"}, private={"population": 40, "sample": 0.25})
    assert privacy.mean_sample(spec) == 10
    assert privacy.mean_sample(JobSpec(task="digits")) == 1


@pytest.mark.parametrize(("epsilon", "shown"), [(3.93494, "3.94"), (2.0, "2.00"), (math.inf, "∞")])
def test_epsilon_is_never_rounded_down(epsilon: float, shown: str) -> None:
    assert privacy.spent_words(epsilon, 1e-5) == f"ε {shown} at δ 1e-05"


def test_the_price_of_a_job_is_said_and_where_its_budget_ends() -> None:
    spec = job(rounds=10, private={"budget": 3.0})
    assert privacy.budget_words(spec, None, None) == ()
    assert privacy.budget_words(spec, 10, 2.5) == ("10 rounds cost ε 2.50 at δ 0.001",)
    (said,) = privacy.budget_words(spec, 4, 8.0)
    assert said.startswith("the budget of ε 3 is spent after 4 of 10 rounds, and the job ends there")


# ---------------------------------------------------------------- the accountant


@pytest.mark.parametrize(
    ("sample", "noise", "rounds", "delta", "by_rdp", "by_pld"),
    [
        (0.1, 1.0, 100, 1e-5, 7.9039, 7.0466),
        (0.1, 0.8, 60, 1e-5, 9.9631, 8.7123),
        (0.01, 1.1, 10_000, 1e-5, 5.6320, 5.1926),
        (1.0, 4.0, 50, 1e-5, 9.2350, 8.5959),
        (0.4, 2.0, 30, 1e-3, 4.5329, 3.9349),
    ],
)
def test_epsilon_is_the_known_one(
    sample: float, noise: float, rounds: int, delta: float, by_rdp: float, by_pld: float
) -> None:
    found = accountant.epsilons(sample, noise, delta, rounds)
    assert found == (pytest.approx(by_pld, abs=1e-3), pytest.approx(by_rdp, abs=1e-3))


def test_epsilon_beyond_meaning_is_told_without_its_distribution() -> None:
    by_pld, by_rdp = accountant.epsilons(1.0, 0.01, 1e-5, 1_000_000)
    assert by_pld == by_rdp > accountant.MEANINGLESS


@given(st.integers(1, 300), st.floats(0.0, 310.0))
def test_the_affordable_rounds_are_the_most_within_the_budget(most: int, budget: float) -> None:
    found = accountant.affordable(float, most, budget)
    assert found == min(most, int(budget))


def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Answers without a process: epsilon is a tenth of the rounds. Returns the questions."""
    questions = list[dict[str, Any]]()

    async def answer(command: list[str], question: dict[str, Any]) -> dict[str, Any]:
        questions.append(question)
        found: dict[str, Any] = {"spent": [[rounds, rounds / 10, rounds / 5] for rounds in question["rounds"]]}
        if question.get("budget") is not None:
            found["affordable"] = accountant.affordable(lambda n: n / 10, question["most"], question["budget"])
        return found

    monkeypatch.setattr(accounting, "_answer_of", answer)
    return questions


def test_rounds_are_asked_for_ahead_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, book, spec = asked(monkeypatch), Accounting(), job(rounds=20)
    for rounds in (1, 2, 16, 3):
        assert asyncio.run(book.spent(spec, rounds)) == Spent(rounds / 10, rounds / 5)
    assert [question["rounds"] for question in questions] == [[*range(1, 17)]]
    asyncio.run(book.spent(spec, 18))
    assert questions[-1]["rounds"] == [18, 19, 20]


def test_a_late_round_of_a_long_job_is_told_as_the_last_of_its_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, book, spec = asked(monkeypatch), Accounting(), job(rounds=1_000)
    assert asyncio.run(book.spent(spec, accounting.EXACT + 1)).epsilon == (accounting.EXACT + 16) / 10
    assert asyncio.run(book.spent(spec, 999)).epsilon == 100.0
    assert [question["rounds"] for question in questions] == [[accounting.EXACT + 16], [1_000]]


def test_a_job_is_planned_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch)
    plan = asyncio.run(Accounting().plan(job(rounds=10, private={"budget": 0.55})))
    assert plan == accounting.Planned(1.0, 5)
    assert asyncio.run(Accounting().plan(job(rounds=10))) == accounting.Planned(1.0, None)
    assert asyncio.run(Accounting().plan(job(EXAMPLE))) is None


def test_a_budget_below_one_round_is_refused_with_the_price_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch)
    with pytest.raises(BadJobError, match=r"one round costs ε 0\.1 at δ 0\.001, and privacy\.budget is 0\.05"):
        asyncio.run(Accounting().plan(job(private={"budget": 0.05})))


def test_without_its_library_a_job_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "is_installed", lambda: False)
    with pytest.raises(BadJobError) as caught:
        asyncio.run(Accounting().plan(job()))
    assert "pip install 'dp-accounting>=0.6.0'" in caught.value.advice
    with pytest.raises(AccountantError, match="not installed on the coordinator any more"):
        asyncio.run(Accounting().spent(job(), 1))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('no memory')", "ended with 1: no memory"),
        ("import sys; sys.exit(3)", "ended with 3: it said nothing"),
        ("print('{\"spent\": [[1, NaN, 2]]}')", "is no number"),
    ],
)
def test_an_accountant_that_fails_says_why(program: str, said: str) -> None:
    with pytest.raises(AccountantError) as caught:
        asyncio.run(accounting._answer_of([sys.executable, "-c", program], {}))
    assert said in str(caught.value)


def test_an_accountant_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "PATIENCE_S", 0.01)
    with pytest.raises(AccountantError, match=r"no answer for 0\.01 s"):
        asyncio.run(accounting._answer_of([sys.executable, "-c", "import threading; threading.Event().wait()"], {}))


def test_a_mechanism_is_what_the_job_says() -> None:
    assert accounting.mechanism_of(job(private={"sample": 0.5})) == Mechanism(0.5, 1.0, 1e-3)


# ---------------------------------------------------------------- secret seeds


def test_a_seed_is_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path)
    seeds.create("digits-1")
    file = tmp_path / "privacy" / "digits-1.seed"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert seeds.read("digits-1") == Seeds(tmp_path).read("digits-1")
    with pytest.raises(FileExistsError):
        seeds.create("digits-1")


def test_a_seed_that_is_lost_is_not_made_anew(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path)
    seeds.create("digits-1")
    (tmp_path / "privacy" / "digits-1.seed").write_bytes(b"short")
    for name in ("digits-1", "digits-2"):
        with pytest.raises(SeedLostError, match=f"the secret seed of {name} is gone"):
            seeds.read(name)


def test_seeds_of_jobs_that_ended_are_deleted(tmp_path: Path) -> None:
    seeds = Seeds(tmp_path)
    seeds.sweep(())
    for name in ("a", "b", "c"):
        seeds.create(name)
    seeds.remove("a")
    seeds.remove("a")
    seeds.sweep(["b"])
    assert [path.stem for path in (tmp_path / "privacy").iterdir()] == ["b"]

"""What the dashboard is made of, without a browser: rows, pasts, bars, the form, headers, and what is in the wheel."""

import hashlib
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.facts import (
    EvaluationGivenUp,
    Extended,
    Fact,
    Frozen,
    HandedOut,
    Late,
    LateMember,
    Lost,
    OpenedAnew,
)
from common.messages import (
    GpuThen,
    JobSpec,
    Link,
    PrivacySpent,
    Progress,
    Scene,
    TailnetPath,
    WorkerSpeed,
    WorkerView,
)
from server.pages import form, words
from server.pages.history import DETAILED_ROUNDS, POINTS, SHOWN_ROUNDS, History
from server.pages.markup import HERE, SECURITY, render, static_files
from server.pages.timeline import WIDE, draw
from server.pages.workers import MARKS, PAGE, SORTS, Row, choose, row_of
from tests.dashboard_kit import accepted, begun, closing, machine, opening, trouble, whole_round
from tests.rounds_kit import digest, spec
from tests.trust_kit import Fleet

ROOT = Path(__file__).resolve().parent.parent
T0 = "2026-01-01T00:00:00.000Z"


def at(seconds: float) -> str:
    return f"2026-01-01T00:00:{seconds:06.3f}Z"


def history(*facts: Fact, first: int = 1) -> History:
    """A history that took these facts, a second apart."""
    made = History()
    for number, fact in enumerate(facts, first):
        made.take(number, at(number % 60), fact)
    return made


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (words.size(None), "–"), (words.size(999), "999 B"), (words.size(6_700_000), "6.7 MB"),
        (words.size(1e18), "1000.0 PB"),
        (words.duration(None), "–"), (words.duration(-1), "–"), (words.duration(math.inf), "–"),
        (words.duration(0.424), "0.42 s"), (words.duration(12.34), "12.3 s"), (words.duration(72), "1 min 12 s"),
        (words.duration(7_500), "2 h 5 min"), (words.duration(273_600), "3 d 4 h"),
        (words.ago(-1), "not since the coordinator started"), (words.ago(59), "under a minute ago"),
        (words.ago(120), "2 min ago"), (words.ago(7_200), "2 h ago"), (words.ago(172_800), "2 d ago"),
        (words.rate(100_000), "0.80"), (words.rate(2_000_000), "16.0"), (words.rate(125e6), "1,000"),
        (words.measure(None), "–"), (words.measure(0.9123), "0.912"), (words.measure(1e-5), "1e-05"),
        (words.count(None), "–"), (words.count(60_000), "60,000"), (words.several(1, "job"), "1 job"),
        (words.several(2, "job"), "2 jobs"),
    ],
)  # fmt: skip
def test_a_number_is_shown_as_people_write_it(shown: str, wanted: str) -> None:
    assert shown == wanted


# ---------------------------------------------------------------- rows of the fleet


def view(name: str = "attic", state: str = "idle", **keys: object) -> WorkerView:
    given = {"gpu": "Tesla P40", "memory": 24 << 30} | {k: keys.pop(k) for k in ("gpu", "memory", "torch") if k in keys}
    fields = {
        "id": name, "name": name, "state": state, "reason": "waiting for work", "last_seen_s": 0.0, "version": "0.1.0",
        "hardware": machine(name, **given).hardware, "data": (), "trust": "none", **keys,
    }  # fmt: skip
    return WorkerView.model_validate(fields)


def test_a_row_says_what_is_known_and_nothing_of_what_is_not() -> None:
    progress = Progress(doing="training", step=3, steps=12, loss=0.31, samples_per_s=250.0)
    full = row_of(
        view(
            path=TailnetPath(kind="relay", via="fra"), progress=progress,
            link=Link(down=1.25e6, up=125e3, latency_s=0.1),
            speeds=(WorkerSpeed(job="j", samples_per_s=99.0),), warnings=("its key expires",),
        )
    )  # fmt: skip
    assert (full.device, full.memory, full.torch) == ("Tesla P40", 24 << 30, "2.14.1 · CUDA 13.0")
    assert (full.path, full.link) == ("relayed by fra", "↓ 10.0 ↑ 1.0 Mbit/s")
    assert (full.doing, full.part, full.rate) == ("training, step 3 of 12, loss 0.310", 0.25, 250.0)
    bare = row_of(view(gpu="", memory=0, speeds=(WorkerSpeed(job="j", samples_per_s=99.0), WorkerSpeed(job="k"))))
    assert (bare.device, bare.memory, bare.torch) == ("AMD Ryzen 7 5700X", 34 << 30, "2.14.1")
    assert (bare.path, bare.link, bare.doing, bare.part, bare.rate) == ("", "", "", None, 99.0)
    assert row_of(view(progress=Progress(doing="loading"))).doing == "loading"
    gone = row_of(view(state="gone", last_seen_s=7_300.0, progress=Progress(doing="loading", step=2)))
    assert (gone.used, gone.gauges) == (None, "")
    assert (gone.seen, gone.doing, gone.part, gone.rate) == ("2 h ago", "loading, step 2", None, None)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, ""), ({"temperature": 70.6}, "71 °C"), ({"power": 1182.4}, "1,182 W"),
        ({"temperature": 0.0, "power": 0.0}, "0 °C, 0 W"),
    ],
)  # fmt: skip
def test_a_gauge_that_tells_nothing_is_left_out_and_zero_is_told(told: dict[str, float], said: str) -> None:
    row = row_of(view(progress=Progress(doing="training", memory_used=5, **told)))
    assert (row.used, row.gauges) == (5, said)
    assert row_of(view()).used is None


@pytest.mark.parametrize(
    ("kind", "via", "said"),
    [
        ("direct", "100.64.0.1:1", "direct"), ("relay", "", "relayed"), ("peer relay", "x", "peer relay"),
        ("loopback", "", "this machine"), ("other", "", "no tailnet"), ("unknown", "", ""),
    ],
)  # fmt: skip
def test_a_path_is_told_in_a_word(kind: str, via: str, said: str) -> None:
    assert row_of(view(path={"kind": kind, "via": via})).path == said


def test_a_build_for_amd_and_several_cards_are_told() -> None:
    plain = view()
    build = plain.hardware.torch.model_copy(update={"cuda": None, "rocm": "6.4", "ranks": 2, "name": ""})
    hardware = plain.hardware.model_copy(update={"torch": build})
    row = row_of(plain.model_copy(update={"hardware": hardware}))
    assert (row.torch, row.device) == ("2.14.1 · ROCm 6.4", "cuda × 2")


ROWS = st.lists(
    st.builds(
        lambda number, state, memory: row_of(view(f"w{number}", state, memory=memory)),
        st.integers(0, 99), st.sampled_from(sorted(MARKS)), st.integers(1, 4),
    ),
    max_size=8,
    unique_by=lambda row: row.id,
)  # fmt: skip


@given(ROWS, st.sampled_from(sorted(SORTS)), st.randoms())
def test_the_order_of_rows_never_depends_on_the_order_in_which_they_come(
    rows: list[Row], sort: str, random: object
) -> None:
    mixed = list(rows)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert choose(mixed, sort=sort).rows == choose(rows, sort=sort).rows


def test_rows_are_found_by_every_word_and_a_page_beyond_the_last_is_the_last() -> None:
    rows = [
        row_of(view(f"box-{number:03}", gpu="Tesla P40" if number % 2 else "GTX 1080")) for number in range(2 * PAGE)
    ]
    found = choose(rows, find="p40 BOX-00")
    assert [row.name for row in found.rows] == ["box-001", "box-003", "box-005", "box-007", "box-009"]
    last = choose(rows, sort="name", page=99)
    assert (last.page, last.pages, last.first, len(last.rows)) == (2, 2, PAGE + 1, PAGE)
    nobody = choose(rows, state="gone")
    assert (nobody.found, nobody.all, nobody.pages, nobody.states) == (0, 2 * PAGE, 1, {"idle": 2 * PAGE})


# ---------------------------------------------------------------- the past of a job


def test_only_what_is_in_a_model_is_a_contribution() -> None:
    lost = trouble(1, "a", "its bytes are gone", code="lost")
    made = history(
        opening(1, 2), accepted(1, 0, "a", 1.0), lost, accepted(1, 0, "b", 1.0, attempt=2), accepted(1, 1, "c", 1.0),
        Frozen(round=1, shards=(0,), reason="the quorum is in"), closing(1, 1, 1.0, 0.5)[1],
    )  # fmt: skip
    assert [(worker, share.samples, part) for worker, share, part in made.ranked()] == [("b", 100, 1.0)]
    late = LateMember(round=1, shard=1, worker="c", worker_name="c", staleness=1, factor=0.5)
    for number, fact in enumerate(
        [opening(2, 1), accepted(2, 0, "b", 1.0), Frozen(round=2, shards=(0,), reason="all", late=(late,)),
         closing(2, 1, 1.0, 0.5)[1].model_copy(update={"late": (late,)})], 50
    ):  # fmt: skip
        made.take(number, at(number), fact)
    assert {worker: share.updates for worker, share, _ in made.ranked()} == {"b": 2, "c": 1}


def test_members_of_an_asynchronous_version_are_its_contributions() -> None:
    members = tuple(
        LateMember(round=1, shard=n, worker=w, worker_name=w, staleness=0, factor=1) for n, w in enumerate("ab")
    )
    frozen = Frozen(round=1, shards=(), reason="two are in", members=members)
    made = history(accepted(1, 0, "a", 1.0), accepted(1, 1, "b", 1.0), frozen, closing(1, 2, 1.0, 0.5)[1])
    assert [worker for worker, _, _ in made.ranked()] == ["a", "b"]


def test_a_round_that_was_not_seen_from_its_beginning_is_counted_and_not_drawn() -> None:
    made = history(closing(7, 2, 1.0, 0.5)[1])
    assert (made.rounds, made.ranked(), made.details) == (7, [], {})
    assert made.series()["rounds"] == [1, 2, 3, 4, 5, 6, 7]


def test_what_concerns_no_training_or_no_known_round_is_drawn_nowhere() -> None:
    measuring = trouble(1, "a", "no test data").model_copy(update={"kind": "evaluate"})
    made = history(Frozen(round=9, shards=(), reason="decided"), measuring)
    assert made.details == {}
    assert [event.kind for event in made.events] == ["trouble"]


def test_an_evaluation_that_comes_late_takes_its_place_in_the_curve() -> None:
    made = history(*whole_round(1, ["a"], 1.0, 0.1), *whole_round(2, ["a"], 1.0, 0.2))
    made.take(99, T0, closing(1, 1, 1.0, 0.7)[2])
    assert list(made.curves["accuracy"]) == [0.7, 0.2]


def test_a_fact_is_taken_once() -> None:
    facts = whole_round(1, ["a", "b"], 1.0, 0.5)
    made = history(*facts)
    for number, fact in enumerate(facts, 1):
        made.take(number, T0, fact)
    assert made.samples == 200


def test_a_round_begun_anew_forgets_its_updates() -> None:
    anew = OpenedAnew(round=1, seal=1, shards=(), reason="too few stayed")
    made = history(opening(1, 2), accepted(1, 0, "a", 1.0), anew, *closing(1, 1, 1.0, 0.5))
    assert made.ranked() == []
    assert "begins once more" in made.events[0].text


def test_the_log_has_what_a_person_should_hear_of() -> None:
    warned = closing(1, 1, 1.0, 0.5)[1].model_copy(update={"warning": "it went far"})
    made = history(
        begun(spec())[1], trouble(1, "a", "it broke", "Traceback"), Late(round=1, shard=0, attempt=1, worker="a"),
        Lost(round=1, shard=0, attempt=1, worker="a", worker_name="a", digest=digest(1), reason="no bytes"),
        Extended(round=1, reason="below the quorum"), EvaluationGivenUp(round=1, reason="nobody could"), warned,
    )  # fmt: skip
    assert [event.kind for event in made.events] == [
        "state",
        "trouble",
        "note",
        "trouble",
        "note",
        "trouble",
        "trouble",
    ]
    assert made.events[1].detail == "Traceback"


def test_a_trouble_comes_with_what_to_do_about_it_and_the_machine_then() -> None:
    gpu = GpuThen(index=0, name="P40", memory=24 << 30, free=1 << 30, temperature=81.4)
    scene = Scene(python="3.11.7", system="Linux-6.1", driver="580.95.05", gpus=(gpu,))
    known = trouble(1, "a", "no room", code="out_of_memory").model_copy(
        update={"cause": "too little memory", "advice": "Set a smaller batch_size.", "scene": scene}
    )
    first, second = history(known, trouble(1, "a", "it broke")).events
    assert first.text.endswith("no room (out_of_memory, too little memory)")
    assert first.more == (
        "what to do: Set a smaller batch_size.",
        "Python 3.11.7, NVIDIA driver 580.95.05, Linux-6.1",
        "GPU 0 P40: 1.1 GB free of 25.8 GB, 81 °C",
    )
    assert (second.text[-13:], second.more) == ("(task_failed)", ())


@pytest.mark.parametrize(
    ("keys", "over", "said"),
    [
        ({}, True, "has ended"), ({}, False, "Nobody at work has written"),
        ({"data": {"partition": "local"}}, False, "stays on its workers"),
        ({"privacy": {"level": "worker", "clip": 1.0, "noise": 1.0, "delta": 1e-5}}, False, "stays on its workers"),
    ],
)  # fmt: skip
def test_where_nothing_of_a_task_is_shown_it_is_said_why(keys: dict[str, object], over: bool, said: str) -> None:
    assert said in words.silence(spec(**keys), over=over)


def test_of_a_long_past_little_is_kept_and_all_of_its_curves() -> None:
    made = history(*(fact for number in range(1, 101) for fact in whole_round(number, ["a", "b"], 1 / number, 0.5)))
    assert (len(made.table()), len(made.details), made.rounds) == (SHOWN_ROUNDS, DETAILED_ROUNDS, 100)
    assert [fact.round for fact, _ in made.table()[:2]] == [100, 99]
    assert set(made.evaluated) == set(range(71, 101))
    assert len(made.curves["accuracy"]) == 100
    assert made.shares["a"].updates == 100


def test_rounds_of_many_attempts_are_kept_in_smaller_number() -> None:
    crowd = [f"w{number}" for number in range(900)]
    made = history(*(fact for number in range(1, 6) for fact in whole_round(number, crowd, 1.0, 0.5)))
    assert sorted(made.details) == [3, 4, 5]
    made.take(10**6, T0, HandedOut(kind="train", round=1, shard=0, attempt=2, worker="w0"))
    assert 1 not in made.details  # what is older than all that is kept stays forgotten


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(0, 39))
def test_a_thinned_curve_has_its_extremes_and_its_end(pieces: list[float], peak: int) -> None:
    made = History()
    rounds = 3 * POINTS
    values = [pieces[number % len(pieces)] for number in range(rounds)]
    values[peak * 70] = 99.0
    for number, value in enumerate(values, 1):
        made._set(number, {"loss": value})
    made.rounds = rounds
    series = made.series()
    shown, curve = series["rounds"], series["curves"]["loss"]  # type: ignore[index]
    assert len(shown) <= POINTS + 2  # type: ignore[arg-type]
    assert shown == sorted(set(shown))  # type: ignore[call-overload]
    assert shown[-1] == rounds  # type: ignore[index]
    assert (max(curve), min(curve)) == (99.0, min(values))
    assert all(value == values[index - 1] for index, value in zip(shown, curve, strict=True))  # type: ignore[call-overload]


def test_what_was_not_measured_is_null_and_so_is_what_is_not_finite() -> None:
    made = History()
    made.rounds = 3
    made._set(2, {"accuracy": 0.5, "accuracy/3": 0.1})
    made._set(3, {"loss": math.inf})
    made._set(0, {"accuracy": 0.1})
    assert made.series()["curves"] == {"accuracy": [None, 0.5, None], "loss": [None, None, None]}
    assert made.series(after=2) == {"rounds": [3], "until": 3, "curves": {"accuracy": [None], "loss": [None]}}
    for number in range(40):
        made._set(1, {f"metric-{number}": 1.0})
    assert len(made.curves) == 12


def test_a_curve_of_nothing_finite_can_be_thinned() -> None:
    made = History()
    made.rounds = 2 * POINTS
    made._set(2 * POINTS, {"loss": math.nan})
    assert made.series()["rounds"] == [1, 2 * POINTS]


def test_privacy_that_was_spent_has_a_curve() -> None:
    spent = PrivacySpent(level="worker", epsilon=1.5, delta=1e-5, clip=1.0)
    made = history(*whole_round(1, ["a"], 1.0, 0.5, privacy=spent))
    assert list(made.curves["epsilon"]) == [1.5]


# ---------------------------------------------------------------- bars


def test_bars_are_as_long_as_what_was_spent() -> None:
    made = History()
    quick = accepted(1, 0, "quick", 1.0, seconds=1.0, took_s=4.0, bytes_up=500)
    slow = accepted(1, 1, "slow", 1.0, seconds=6.0, took_s=8.0)
    plan: list[tuple[float, Fact]] = [
        (0, opening(1, 2)), (0, HandedOut(kind="train", round=1, shard=0, attempt=1, worker="quick")),
        (2, HandedOut(kind="train", round=1, shard=1, attempt=1, worker="slow")), (4, quick), (10, slow),
    ]  # fmt: skip
    plan += [(10, closing(1, 2, 1.0, 0.5)[0]), (11, closing(1, 2, 1.0, 0.5)[1])]
    for number, (when, fact) in enumerate(plan, 1):
        made.take(number, at(when), fact)
    picture = draw(made.details[1], {}, {"quick": Link(down=1, up=500, latency_s=0.5)}, now=0)
    assert (picture.seconds, picture.averaging, picture.open, picture.more) == (10.0, 1.0, False, 0)
    first, second = picture.lines
    assert (first.name, first.last, second.last) == ("slow", True, False)
    assert [(bar.kind, bar.x, bar.width) for bar in first.bars] == [("fetch", 200, 200), ("train", 400, 600)]
    assert [(bar.kind, bar.x, bar.width) for bar in second.bars] == [
        ("fetch", 0, 150), ("train", 150, 100), ("send", 250, 150), ("wait", 400, 600)
    ]  # fmt: skip
    assert second.words == "fetch 1.50 s, train 1.00 s, send 1.50 s, wait 6.00 s"


def test_an_open_round_shows_what_is_under_way_and_who_gave_back() -> None:
    made = History()
    out = [HandedOut(kind="train", round=1, shard=n, attempt=1, worker=w) for n, w in enumerate(("a", "b", "c"))]
    for number, fact in enumerate([opening(1, 3), *out], 1):
        made.take(number, at(0), fact)
    made.take(10, at(1), trouble(1, "a", "no data"))
    made.take(11, at(2), accepted(1, 1, "b", 1.0, took_s=None))
    began = made.details[1].opened
    picture = draw(made.details[1], {"c": "cellar"}, {}, now=began + 4)
    assert picture.open
    assert [(line.name, line.under_way, line.last, line.back) for line in picture.lines] == [
        ("cellar", True, True, ""), ("b", False, False, ""), ("a", False, False, "no data"),
    ]  # fmt: skip
    assert [bar.kind for bar in picture.lines[0].bars] == ["work"]
    assert [bar.kind for bar in picture.lines[2].bars] == ["back", "wait"]


def test_what_took_no_time_has_no_bar_and_of_many_rows_the_slowest_are_shown() -> None:
    crowd = [f"w{number:02}" for number in range(50)]
    made = History()
    for number, fact in enumerate(
        [opening(1, 50), *(accepted(1, n, w, 1.0, seconds=0, took_s=0) for n, w in enumerate(crowd))]
    ):
        made.take(number + 1, at(0), fact)
    picture = draw(made.details[1], {}, {}, now=made.details[1].opened)
    assert (len(picture.lines), picture.more) == (40, 10)
    assert [bar for line in picture.lines for bar in line.bars] == []


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50)), max_size=8))
def test_no_bar_ever_leaves_its_row(times: list[tuple[float, float, float]]) -> None:
    made = History()
    made.take(1, at(0), opening(1, len(times) or 1))
    for number, (when, seconds, took) in enumerate(times):
        made.take(number + 2, at(when), accepted(1, number, "w", 1.0, seconds=seconds, took_s=took))
    picture = draw(made.details[1], {}, {}, now=made.details[1].opened + 10)
    for bar in (bar for line in picture.lines for bar in line.bars):
        assert bar.x >= 0
        assert bar.width > 0
        assert bar.x + bar.width <= WIDE + 0.2


# ---------------------------------------------------------------- the form


def leaves() -> Iterator[str]:
    for name, value in JobSpec.model_fields.items():
        inner = getattr(value.annotation, "model_fields", None)
        yield from ([f"{name}.{key}" for key in inner] if inner else [name])


def test_every_key_of_a_job_has_a_field_with_help() -> None:
    fields = [field for section in form.sections() for field in section.fields]
    assert {field.path for field in fields} == set(leaves()) - {"task", "config"}
    assert [field.path for field in fields if not field.help] == []
    assert len({field.id for field in fields}) == len(fields)


def test_a_field_is_of_the_kind_that_its_schema_says() -> None:
    fields = {field.path: field for section in form.sections() for field in section.fields}
    shown = {path: (fields[path].kind, fields[path].default, fields[path].options) for path in (
        "rounds", "name", "train.optimizer", "train.batch_size", "train.frozen", "train.keep_optimizer", "target",
    )}  # fmt: skip
    assert shown == {
        "rounds": ("number", "5", ()), "name": ("text", "", ()), "target": ("number", "", ()),
        "train.optimizer": ("choice", "sgd", ("sgd", "adamw")), "train.batch_size": ("number", "32", ("auto",)),
        "train.frozen": ("list", "", ()), "train.keep_optimizer": ("choice", "false", ("true", "false")),
    }  # fmt: skip
    assert fields["train.lr"].label == "lr"


# ---------------------------------------------------------------- HTTP


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    running = Fleet(tmp_path_factory.mktemp("pages") / "state")
    yield running
    running.close()


@pytest.mark.parametrize("path", ["/", "/submit", "/jobs/x", "/static/app.js", "/ui/jobs", "/ui/fleet"])
def test_every_answer_to_a_page_has_the_headers_that_keep_it_to_itself(path: str, fleet: Fleet) -> None:
    answer = fleet.call("GET", path, fleet.admin)
    assert answer.status == 200
    assert {name: answer.headers.get(name.lower()) for name in SECURITY} == SECURITY
    assert "set-cookie" not in answer.headers
    assert answer.headers["cache-control"] == ("no-store" if path.startswith("/ui/") else "no-cache")


@pytest.mark.parametrize("path", ["/ui/jobs", "/ui/fleet?sort=name", "/ui/jobs/{job}/rounds", "/static/app.css"])
def test_what_reads_as_before_is_not_sent_again(path: str, fleet: Fleet) -> None:
    asked = path.format(job=fleet.job)
    first = fleet.call("GET", asked, fleet.admin)
    again = fleet.call("GET", asked, fleet.admin, headers={"If-None-Match": first.headers["etag"]})
    assert (first.status, again.status, again.body) == (200, 304, b"")


def test_a_shell_is_the_same_whether_there_is_such_a_job_or_not(fleet: Fleet) -> None:
    there, absent = fleet.call("GET", f"/jobs/{fleet.job}"), fleet.call("GET", "/jobs/nothing")
    assert there.body.replace(fleet.job.encode(), b"nothing") == absent.body
    assert fleet.call("GET", "/jobs/%3Cscript%3E").status == 400


@pytest.mark.parametrize("file", ["..%2fmarkup.py", "base.html", "VENDORED.md", "htmx.LICENSE", "nothing.js"])
def test_nothing_but_the_files_of_the_shell_is_served(file: str, fleet: Fleet) -> None:
    assert fleet.call("GET", f"/static/{file}").status == 404


def test_every_part_of_a_job_can_be_asked_for_and_no_other(fleet: Fleet) -> None:
    for part in ("head", "actions", "now", "output", "timeline", "timeline?round=1", "rounds", "shares", "log"):
        assert fleet.call("GET", f"/ui/jobs/{fleet.job}/{part}", fleet.admin).status == 200
    assert fleet.call("GET", f"/ui/jobs/{fleet.job}/journal", fleet.admin).status == 400
    assert fleet.call("GET", f"/ui/jobs/{fleet.job}/series", fleet.admin).json() == {
        "rounds": [],
        "until": 0,
        "curves": {},
    }


def test_a_stream_begins_with_the_version_of_every_part(fleet: Fleet) -> None:
    said = fleet.call("GET", f"/ui/live?job={fleet.job}", fleet.admin).body.decode()
    assert set(re.findall(r'"(\w+)": "', said)) == {
        "head", "actions", "now", "output", "timeline", "rounds", "shares", "log", "curves"
    }  # fmt: skip
    assert set(re.findall(r'"(\w+)": "', fleet.call("GET", "/ui/live", fleet.admin).body.decode())) == {"fleet", "jobs"}


# ---------------------------------------------------------------- files


def test_no_page_has_a_script_a_style_or_a_handler_in_it() -> None:
    for path in (HERE / "templates").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|hx-on|javascript:|<script(?![^>]*\ssrc=)|\|\s*safe", text), (
            path.name
        )


def test_what_is_put_into_a_page_is_escaped() -> None:
    assert "<b>" not in render("job.html", job='"><b>')


def test_what_is_not_ours_is_what_is_written_down() -> None:
    for folder in (HERE / "static/vendor", ROOT / "tests/axe"):
        written = (folder / "VENDORED.md").read_text(encoding="utf-8")
        for path in (*folder.glob("*.js"), *folder.glob("*.css")):
            assert path.name in written
            assert hashlib.sha256(path.read_bytes()).hexdigest() in written


def test_a_wheel_has_every_template_and_static_file(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as packed:
        held = set(packed.namelist())
    wanted = {path.relative_to(ROOT).as_posix() for path in HERE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert len(wanted) > 25
    assert wanted - held == set()
    assert not any(name.startswith("tests/") for name in held)
    assert set(static_files()) >= {
        "app.js",
        "app.css",
        "charts.js",
        "submit.js",
        "theme.js",
        "htmx.min.js",
        "uPlot.min.css",
    }

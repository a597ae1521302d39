"""What `--init` says: a file or a job, and which model of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.begins import FILE, Wanted, is_file, parse, short, words
from common.cautions import cautions
from common.messages import Beginning, JobSpec

DIGEST = "3b1c55e0d2f4" + "0" * 52
OF_FILE = Beginning(digest=DIGEST, size=9)
OF_JOB = Beginning(digest=DIGEST, size=9, job="digits-4f2a", round=2)


@pytest.mark.parametrize("said", ["w.safetensors", "./w", "../w", "~/w", "a/b", "run/", ".", "W.SAFETENSORS", "w.pt"])
def test_what_looks_like_a_path_is_a_file(said: str) -> None:
    assert is_file(said)


@pytest.mark.parametrize("said", ["digits-4f2a", "digits-4f2a@1", "w@best", "v1.2", f"{FILE}{DIGEST}"])
def test_what_looks_like_no_path_is_a_job(said: str) -> None:
    assert not is_file(said)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("digits-4f2a", Wanted(job="digits-4f2a")),
        ("digits-4f2a@newest", Wanted(job="digits-4f2a")),
        ("digits-4f2a@0", Wanted(job="digits-4f2a", which="0")),
        ("digits-4f2a@007", Wanted(job="digits-4f2a", which="7")),
        ("my.run@best", Wanted(job="my.run", which="best")),
        (f"{FILE}{DIGEST}", Wanted(digest=DIGEST)),
    ],
)
def test_a_job_says_which_model_it_begins_with(said: str, wanted: Wanted) -> None:
    assert parse(JobSpec(task="digits", init=said).init or "") == wanted


@pytest.mark.parametrize("said", ["", "@1", "a@", "a@worst", "a@-1", "a@1@2", "a/b", "sha256:12", "a b", "a@12345678"])
def test_what_names_neither_is_refused(said: str) -> None:
    with pytest.raises(ValidationError):
        JobSpec(task="digits", init=said)


@given(st.text(max_size=40))
def test_whatever_a_spec_takes_can_be_parsed(said: str) -> None:
    try:
        spec = JobSpec(task="digits", init=said)
    except ValidationError:
        return
    wanted = parse(spec.init or "")
    assert bool(wanted.digest) != bool(wanted.job)
    assert wanted.which in ("newest", "best") or wanted.which == str(int(wanted.which))


def test_it_is_said_short_in_a_table_and_whole_in_a_sentence() -> None:
    assert (short(OF_FILE), short(OF_JOB)) == ("file 3b1c55e0d2f4…", "digits-4f2a@2")
    assert words(OF_FILE) == "the file 3b1c55e0d2f4…"
    assert words(OF_JOB) == "the model of digits-4f2a after round 2"


def test_a_private_job_is_told_that_its_epsilon_is_not_that_of_what_it_begins_with() -> None:
    private = {"level": "example", "clip": 1.0, "noise": 1.0, "delta": 1e-5}
    spec = JobSpec.model_validate({"task": "digits", "init": "digits-4f2a@best", "privacy": private})
    assert any("init = digits-4f2a@best gives away" in sentence for sentence in cautions(spec))
    assert cautions(JobSpec(task="digits", init="digits-4f2a")) == ()


def test_a_worker_of_protocol_1_is_given_no_such_job() -> None:
    assert JobSpec(task="digits", init="digits-4f2a").beyond_protocol_1 == "init"

"""Small models and updates in the call that speaks of them: what is written is read, and nothing else is."""

import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequestError, UnavailableError
from common.messages import ModelFacts, ModelRef, PollAnswer, Submission
from common.together import HEADER_CHARACTERS, answer_and_model, read_submission, submission_header
from tests.scripted_coordinator import assignment

names = st.text(max_size=20)


@given(st.integers(1, 9), st.dictionaries(names, st.tuples(st.floats(allow_nan=False), st.floats(0, 1)), max_size=5))
def test_a_submission_comes_back_from_its_header_in_plain_characters(
    attempt: int, metrics: dict[str, tuple[float, float]]
) -> None:
    submission = Submission(attempt=attempt, digest="0" * 64, metrics=metrics)
    header = submission_header(submission)
    assert header is not None
    assert header.isascii()
    assert header.isprintable()
    assert read_submission(header) == submission


def test_a_submission_that_is_too_long_for_a_header_gets_none() -> None:
    facts = ModelFacts(parameters=1, train_samples=9, test_samples=0, bounds=tuple(range(HEADER_CHARACTERS)))
    assert submission_header(Submission(attempt=1, facts=facts)) is None


@pytest.mark.parametrize("value", ["", "no base64!", base64.b64encode(b"{}").decode(), "AAAA", "=" * 50])
def test_a_header_that_is_no_submission_is_refused(value: str) -> None:
    with pytest.raises(BadRequestError, match="the header Lydian-Submission holds no submission"):
        read_submission(value)


@given(st.binary(max_size=200))
def test_a_model_of_any_bytes_comes_whole_after_its_answer(model: bytes) -> None:
    digest = hashlib.sha256(model).hexdigest()
    answer = PollAnswer(assignment=assignment(base=ModelRef(digest=digest, size=len(model))))
    assert answer_and_model(answer.model_dump_json().encode() + b"\n" + model) == (answer, digest, model)


@pytest.mark.parametrize("work", [None, assignment()])
def test_a_model_that_was_not_named_is_not_taken(work: object) -> None:
    answer = PollAnswer.model_validate({"assignment": work})
    with pytest.raises(UnavailableError, match="came with a model of 3 bytes") as caught:
        answer_and_model(answer.model_dump_json().encode() + b"\nabc")
    assert caught.value.code == "unreadable"

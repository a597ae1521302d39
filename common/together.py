"""Small models and updates in the call that speaks of them, so that a round trip is saved each way.

    PollAnswer, newline, bytes of the base model                      an answer of type WITH_MODEL
    PUT of a whole update, with its Submission in a header            SUBMISSION: base64 of its JSON

Both are offers: who cannot use them sends and asks for bytes alone, as for anything larger (messages.TOGETHER), and so
does whoever has tried once in vain: a broken call of this kind begins anew, and only bytes that travel alone resume.
"""

import base64
import binascii
import hashlib

from common.errors import BadRequestError, UnavailableError
from common.messages import PollAnswer, Submission

WITH_MODEL = "application/vnd.lydian.work-with-model"
SUBMISSION = "Lydian-Submission"
HEADER_CHARACTERS = 8_192  # of the header's value: what servers and proxies take


def submission_header(submission: Submission) -> str | None:
    """The header's value; None: the submission is too long for one."""
    value = base64.b64encode(submission.model_dump_json().encode()).decode()
    return value if len(value) <= HEADER_CHARACTERS else None


def read_submission(value: str) -> Submission:
    """The submission in a header.

    Raises:
        BadRequestError: it is none.
    """
    try:
        return Submission.model_validate_json(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError) as error:  # pydantic's is a ValueError
        why = str(error).splitlines()[0]
        raise BadRequestError(f"the header {SUBMISSION} holds no submission: {why}") from error


def answer_and_model(body: bytes) -> tuple[PollAnswer, str, memoryview]:
    """An answer of type WITH_MODEL, taken apart: the answer, the model's digest, and the model, which is no copy.

    Raises:
        ValueError: the answer does not read (pydantic's ValidationError is one).
        UnavailableError: the model is not the one that the assignment names (`unreadable`).
    """
    end = body.find(b"\n")
    end = end if end >= 0 else len(body)
    answer, model = PollAnswer.model_validate_json(body[:end]), memoryview(body)[end + 1 :]
    base = answer.assignment.base if answer.assignment else None
    found = hashlib.sha256(model).hexdigest()
    if base is None or base.digest != found:
        wanted = "none was named" if base is None else f"{base.digest[:12]}… was named"
        raise UnavailableError(
            f"work came with a model of {len(model)} bytes whose SHA-256 is {found[:12]}…, where {wanted}",
            code="unreadable",
            advice="It was damaged on its way: ask again.",
        )
    return answer, found, model

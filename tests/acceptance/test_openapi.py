"""A real coordinator does what its OpenAPI document says: called with what fits it, and with what does not.

schemathesis makes the calls of the document; each answer must have a status, a type and a shape that is written there,
nothing is answered with 500, and what does not fit the document is refused. Seeded: one commit, one verdict.
"""

import itertools
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.acceptance.kit import LocalFleet, size
from tests.acceptance.played import Played

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e '.[dev]'")

pytestmark = pytest.mark.acceptance

POSITIVE = schemathesis.GenerationMode.POSITIVE
EACH = size(4, 400)  # calls of each route that fit, and as many that do not; the tokens take turns


@dataclass
class Stage:
    """A coordinator in the middle of a job, and who may call it."""

    fleet: LocalFleet
    document: dict[str, Any]
    tokens: dict[str, str | None]
    known: dict[str, str]  # parameter of a path -> one that is there


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("openapi")
    many = str(1_000_000)  # of what is limited: every call is to be answered by what it asks
    limits = {"LYDIAN_STRIKES": many, "LYDIAN_STRANGER_CALLS_PER_S": many, "LYDIAN_STRANGER_CALLS_BURST": many}
    with LocalFleet(folder, LYDIAN_POLL_S="0.02", **limits) as fleet, Played(fleet, "one") as one:
        over = fleet.submit(rounds=1, data={"shards": 2})
        fleet.api.cancel(over)
        fleet.submit(rounds=2, data={"shards": 2})
        one.init()
        work = one.poll()
        assert work.base is not None
        tokens = {
            "admin": fleet.admin_token, "join": (fleet.state / "join.token").read_text().strip(), "work": one.token,
            "foreign": f"lyd_admin_0123456789ab_{'x' * 43}", "none": None,
        }  # fmt: skip
        headers = {"Authorization": f"Bearer {fleet.admin_token}"}
        answer = httpx2.get(f"{fleet.url}/openapi.json", headers=headers, timeout=60)
        document = answer.raise_for_status().json()
        known = {"job": over, "worker": one.id, "assignment": work.id, "digest": work.base.digest}
        yield Stage(fleet, document, tokens, known)


def checks() -> list[Any]:
    from schemathesis import openapi  # noqa: F401 - its checks enter themselves
    from schemathesis.specs.openapi import checks as of_openapi

    names = (
        "status_code_conformance", "content_type_conformance", "response_schema_conformance", "negative_data_rejection",
    )  # fmt: skip
    return [schemathesis.checks.not_a_server_error, *(getattr(of_openapi, name) for name in names)]


def test_every_call_answers_as_the_document_says_for_every_token(stage: Stage) -> None:
    schema = schemathesis.openapi.from_dict(stage.document)
    schema.config.update(base_url=stage.fleet.url)
    wanted, wrong, turns = checks(), list[str](), itertools.count()
    for found in schema.get_all_operations():
        operation = found.ok()
        # What has no parameter, no body and no token can be called in one way only.
        modes = list(schemathesis.GenerationMode) if "security" in operation.definition.raw else [POSITIVE]
        for mode in modes:
            wrong += faults(stage, operation, mode, wanted, turns)
    assert stage.fleet.coordinator is not None
    assert stage.fleet.coordinator.popen.poll() is None, "a call ended the coordinator"
    assert httpx2.get(f"{stage.fleet.url}/healthz", timeout=60).json() == {"status": "ok"}
    assert "Traceback" not in stage.fleet.coordinator.said()
    assert not wrong, "\n\n".join(wrong)


def test_an_answer_that_is_not_in_the_document_is_seen(stage: Stage) -> None:
    path = "/v1/jobs/{job}"
    document = {**stage.document, "paths": {path: {"get": deepcopy(stage.document["paths"][path]["get"])}}}
    del document["paths"][path]["get"]["responses"]["401"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=stage.fleet.url)
    (found,) = schema.get_all_operations()
    seen = faults(stage, found.ok(), POSITIVE, checks(), itertools.count(3))  # the turn of a token that is not known
    assert [title.partition("\n")[0] for title in seen] == ["GET /v1/jobs/{job}: Undocumented status code 401"]


def faults(stage: Stage, operation: Any, mode: Any, wanted: list[Any], turns: Iterator[int]) -> list[str]:
    """What is wrong with the answers to one kind of call, once for each kind of fault."""
    seen: dict[str, str] = {}
    quick = settings(
        max_examples=EACH, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quick
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        turn = next(turns)
        who, token = list(stage.tokens.items())[turn % len(stage.tokens)]
        mended = mode is not POSITIVE and "{digest}" in operation.path  # nothing else of such a call can be wrong
        if (turn % 3 and not mended) or operation.path.endswith("/events"):  # that of a job that goes on does not end
            case.path_parameters = {
                name: stage.known.get(name, value) for name, value in (case.path_parameters or {}).items()
            }
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        answer = case.call(headers=headers, timeout=60)
        try:
            case.validate_response(answer, checks=wanted)
        except schemathesis.errors.FailureGroup as failures:
            for failure in failures.exceptions:
                title = f"{operation.label}: {failure.title}"
                told = f"{answer.request.method} {answer.request.url} as {who}: {failure}"
                seen.setdefault(f"{title} {answer.status_code}", told[:2_000])

    try:
        call()
    except Exception as error:  # noqa: BLE001 - the others are to be heard of too
        seen[f"{operation.label}: {type(error).__name__}"] = str(error)[:1_000]
    return [f"{title}\n{text}" for title, text in seen.items()]

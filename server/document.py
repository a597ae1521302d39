"""The OpenAPI document, with what FastAPI cannot know: who is refused with what, and answers that are not JSON.

    FastAPI's document ──described──▶ errors of our one shape, the bearer token, bytes, events

FastAPI writes of each call that it answers 422 with a shape of its own, and nothing of all else that is refused. What
a call may answer is said here, by rules that follow from what a call is, and one table of what is a call's own.
tests/acceptance/test_openapi.py calls a real coordinator with what the document says, and with what it does not.
"""

from collections.abc import Iterator
from copy import deepcopy
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from common.together import HEADER_CHARACTERS, WITH_MODEL

JSON, BYTES, EVENTS, TEXT = "application/json", "application/octet-stream", "text/event-stream", "text/plain"
WITHOUT_TOKEN = frozenset({"/healthz", "/version"})
REFUSAL = "Refusal"

_UPDATE = (409, 410, 422, 507)
OWN_ERRORS: dict[tuple[str, str], tuple[int, ...]] = {
    ("post", "/v1/jobs"): (404, 409, 422, 507),
    ("post", "/v1/jobs/{job}/cancel"): (409,),
    ("post", "/v1/jobs/{job}/pause"): (409,),
    ("post", "/v1/jobs/{job}/resume"): (409,),
    ("post", "/v1/tokens/{token}/rotate"): (409,),
    ("post", "/v1/tokens/{token}/revoke"): (409,),
    ("get", "/v1/jobs/{job}/model"): (416,),
    ("get", "/v1/models/{digest}"): (416,),
    ("put", "/v1/models/{digest}"): (409, 422, 507),
    ("get", "/v1/tasks/{digest}"): (416,),
    ("post", "/v1/workers"): (409, 422, 426),
    ("post", "/v1/workers/{worker}/poll"): (409,),
    ("post", "/v1/workers/{worker}/heartbeat"): (409, 410),
    ("post", "/v1/workers/{worker}/leave"): (409,),
    **{("post", f"/v1/workers/{{worker}}/{order}"): (409,) for order in ("drain", "pause", "resume", "readmit")},
    ("head", "/v1/updates/{assignment}"): _UPDATE,
    ("put", "/v1/updates/{assignment}"): _UPDATE,
    ("post", "/v1/updates/{assignment}/submit"): _UPDATE,
    ("post", "/v1/updates/{assignment}/abandon"): _UPDATE,
    ("post", "/v1/updates/{assignment}/keys"): _UPDATE,
    ("post", "/v1/updates/{assignment}/shares"): _UPDATE,
    ("post", "/v1/updates/{assignment}/reveal"): _UPDATE,
}
"""Beyond what every call of its kind may be refused with (`_errors`): (method, path) -> statuses."""

ANSWERS: dict[tuple[str, str], dict[int, tuple[str, tuple[str, ...]]]] = {
    ("get", "/metrics"): {200: ("for Prometheus", (TEXT,))},
    ("get", "/v1/jobs/{job}/events"): {200: ("server-sent events; data is one JSON object", (EVENTS,))},
    ("get", "/v1/jobs/{job}/model"): {200: ("safetensors", (BYTES,)), 206: ("a range of it", (BYTES, "multipart/*"))},
    ("get", "/v1/models/{digest}"): {200: ("safetensors", (BYTES,)), 206: ("a range of it", (BYTES, "multipart/*"))},
    ("get", "/v1/tasks/{digest}"): {200: ("a task file", (BYTES,)), 206: ("a range of it", (BYTES, "multipart/*"))},
    ("get", "/v1/probe"): {200: ("so many bytes", (BYTES,))},
    ("head", "/v1/updates/{assignment}"): {200: ("the ranges that are here, in Lydian-Ranges", ())},
    ("head", "/v1/models/{digest}"): {200: ("the ranges that are here, in Lydian-Ranges", ())},
}
"""Answers that are not JSON: (method, path) -> status -> what it is, and its types."""

RANGE = {"name": "Range", "in": "header", "required": False, "schema": {"type": "string"}}
CONTENT_RANGE = {"name": "Content-Range", "in": "header", "required": False, "schema": {"type": "string"}}
RAW = {"content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}, "required": False}


def described(app: FastAPI) -> dict[str, Any]:
    """The whole document. Made once for an application."""
    made: dict[str, Any] | None = getattr(app.state, "document", None)
    if made is None:
        made = app.state.document = _complete(deepcopy(app.openapi()))
    return made


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is never answered
        schemas.pop(unused, None)
    schemas[REFUSAL] = _refusal()
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            _describe(method, path, call)
    return document


def _refusal() -> dict[str, Any]:
    said = {
        "code": {"type": "string", "description": "stable, for programs"},
        "sentence": {"type": "string", "description": "what happened, with the values"},
        "advice": {"type": "string", "description": "what to do"},
    }
    about = "Every error has this shape."
    return {
        "type": "object", "description": about, "properties": said, "required": [*said], "additionalProperties": False
    }  # fmt: skip


def _describe(method: str, path: str, call: dict[str, Any]) -> None:
    answers: dict[str, Any] = call["responses"]
    answers.pop("422", None)  # FastAPI's
    for given in call.get("parameters", ()):  # it may be absent, but nothing in a URL is null
        either = [one for one in given["schema"].pop("anyOf", ()) if one != {"type": "null"}]
        given["schema"] |= either[0] if either else {}
    for status, (what, kinds) in ANSWERS.get((method, path), {}).items():
        answers[str(status)] = _answer(what, kinds)
    if path.endswith("/poll"):
        answers["200"]["content"][WITH_MODEL] = {}
    for status in _errors(method, path):
        answers[str(status)] = _error(status, with_body=method != "head")
    if path not in WITHOUT_TOKEN:
        call["security"] = [{"token": []}]
    if (method, path) == ("put", "/v1/updates/{assignment}"):
        call["requestBody"] = RAW
        call["parameters"] = [*call["parameters"], CONTENT_RANGE]
        for given in call["parameters"]:
            if given["name"] == "Lydian-Submission":
                given["schema"] = {"type": "string"}
                given["description"] = f"base64 of the JSON of a Submission; at most {HEADER_CHARACTERS} characters"
    if (method, path) in (("put", "/v1/probe"), ("put", "/v1/models/{digest}")):
        call["requestBody"] = RAW
    if (method, path) == ("put", "/v1/models/{digest}"):
        call["parameters"] = [*call["parameters"], CONTENT_RANGE]
    if any(status == 206 for status in ANSWERS.get((method, path), {})):
        call["parameters"] = [*call["parameters"], RANGE]


def _errors(method: str, path: str) -> Iterator[int]:
    """What a call may be refused with, by what it is."""
    yield from (400, 403, 429)  # by its Host and Origin, and by how often it is made (server.gate)
    if path in WITHOUT_TOKEN:
        return
    yield from (401, 503)
    if "{" in path:
        yield 404
    if method in ("post", "put"):
        yield from (408, 413)
    yield from OWN_ERRORS.get((method, path), ())


def _answer(what: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {"description": what, **({"content": {kind: {} for kind in kinds}} if kinds else {})}


def _error(status: int, *, with_body: bool) -> dict[str, Any]:
    shape = {"content": {JSON: {"schema": {"$ref": f"#/components/schemas/{REFUSAL}"}}}} if with_body else {}
    return {"description": HTTPStatus(status).phrase, **shape}

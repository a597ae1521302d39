"""A job that begins with a model that exists, of a job or of a file, byte by byte; and one that does not fit."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from client.job_file import INIT, flag_layer, read_job
from client.pulling import pull_model
from client.sending import submit
from common.messages import JobRequest, JobView
from common.weights import file_digest
from tests.acceptance.kit import LocalFleet, closed_rounds, of_type

pytestmark = pytest.mark.acceptance


def begin(fleet: LocalFleet, init: str, seed: int) -> JobView:
    """Submit one round as the command does."""
    flags = {("task",): "digits", INIT: init, ("rounds",): "1", ("seed",): str(seed), ("data", "shards"): "2"}
    job = read_job(None, flag_layer(flags), {})
    return submit(fleet.api, job, JobRequest(spec=job.spec, key=f"{init}-{seed}"))


def first_model(fleet: LocalFleet, job: str) -> str:
    """The digest of what round 1 of a job began with, once that job is over."""
    fleet.finish(job)
    facts = fleet.facts(job)
    (built,), (opened,) = of_type(facts, "initialised"), of_type(facts, "opened")
    assert built["digest"] == opened["base"]
    return str(opened["base"])


def test_a_job_begins_with_another_jobs_round_or_with_a_file_byte_by_byte_or_fails_in_words(
    crew: LocalFleet, tmp_path: Path
) -> None:
    first = crew.submit(rounds=2, data={"shards": 2}, round={"min_workers": 2})
    crew.finish(first)
    digest = next(closed["digest"] for closed in closed_rounds(crew.facts(first)) if closed["round"] == 1)

    second = begin(crew, f"{first}@1", seed=8)
    assert second.begins_with is not None
    assert (second.begins_with.job, second.begins_with.round, second.begins_with.digest) == (first, 1, digest)
    assert first_model(crew, second.id) == digest

    pull_model(crew.api, first, tmp_path / "model.safetensors", which="1", force=False)
    assert file_digest(tmp_path / "model.safetensors") != digest, "as users have it, without our notes"
    third = begin(crew, f"{tmp_path}/", seed=9)
    assert third.begins_with is not None
    assert third.begins_with.job is None
    assert first_model(crew, third.id) == digest
    given = third.begins_with.digest
    assert not (crew.state / "blobs" / given[:2] / given).exists(), "it has a model of its own since"

    other = load_file(tmp_path / "model.safetensors") | {"6.bias": np.zeros(5, np.float32)}
    save_file(other, tmp_path / "other.safetensors")
    failed = begin(crew, str(tmp_path / "other.safetensors"), seed=0)
    reason = crew.finish(failed.id, "failed").reason
    misfit = "does not fit the one that model(config) builds: '6.bias' is float32 [5], not float32 [10]; 2 workers"
    assert misfit in reason
    assert {(back.code, back.cause) for back in crew.api.logs(failed.id)} == {("bad_task", "init_misfit")}

"""What `lydian pull FOLDER/` writes beside the weights."""

import json
from dataclasses import replace
from typing import Any

import pytest

from client.stories import Story, config_json, model_card, story_of, task_digest
from common.facts import FACT
from common.messages import Beginning, JobView, VersionView

DIGEST = "ab" * 32
SPEC = {"task": "my_task", "rounds": 3, "config": {"width": 64}, "train": {"local_epochs": 1, "lr": 0.05}}
VIEW = JobView.model_validate(
    {
        "id": "my_task-1", "name": "clothes", "task": "my_task", "state": "training", "reason": "round 3",
        "submitted_at": "2026-01-01T00:00:00Z", "round": 2, "rounds": 3, "parameters": 1234, "spec": SPEC,
    }
)  # fmt: skip
FACTS: list[dict[str, Any]] = [
    {"type": "submitted", "spec": SPEC, "task_digest": "cd" * 32, "key": "k"},
    {
        "type": "initialised", "attempt": 1, "worker": "w-1", "digest": "0" * 64, "size": 10,
        "facts": {"parameters": 1234, "train_samples": 60_000, "test_samples": 10},
    },
    *(
        {
            "type": "accepted", "round": number, "shard": 0, "attempt": 1, "worker": "w-1", "worker_name": name,
            "digest": "1" * 64, "samples": 100, "steps": 4, "seconds": 1.0, "metrics": {}, "bytes_down": 1,
            "bytes_up": 1,
        }
        for number, name in ((1, "gpu-box"), (2, "attic"), (3, "too-late"))
    ),
    *(
        {
            "type": "round", "round": number, "seconds": 1.0, "workers": 1, "shards": 1, "samples": 100,
            "bytes_down": 1, "bytes_up": 1, "digest": f"{number}" * 64, "size": 10,
        }
        for number in (1, 2)
    ),
    {
        "type": "evaluation", "round": 2, "attempt": 1, "worker": "w-1", "metrics": {"accuracy": 0.91},
        "samples": 10_000, "seconds": 0.1, "best": True,
    },
]  # fmt: skip
NOW = {"type": "now", "state": "training", "reason": "1 of 2", "round": 3, "rounds": 3, "received": 1, "shards": 2}


class Played:
    """A coordinator whose job still trains: after its facts comes where it stands, and the stream stays open."""

    def events(self, job: str) -> Any:
        for number, fact in enumerate(FACTS, start=1):
            yield {"id": number, "at": "2026-01-01T00:00:00Z", **fact}
        yield NOW
        raise AssertionError("nobody reads on: the stream of a job that trains does not end")

    def version(self) -> VersionView:
        return VersionView(version="0.1.0", protocol=2)


def story(round_index: int = 2) -> Story:
    return story_of(Played(), VIEW, round_index)  # type: ignore[arg-type]


def test_the_facts_of_these_tests_are_facts() -> None:
    for fact in FACTS:
        FACT.validate_python(fact)


def test_a_story_has_what_led_to_its_round_and_nothing_after() -> None:
    found = story()
    assert [one.round for one in found.closed] == [1, 2]
    assert found.workers == ("gpu-box", "attic")
    assert found.task_digest == "cd" * 32
    assert found.evaluated is not None
    assert story(1).workers == ("gpu-box",)
    assert story(1).evaluated is None
    assert task_digest(Played(), "my_task-1") == "cd" * 32  # type: ignore[arg-type]


def test_the_card_tells_data_rounds_workers_metrics_and_digests() -> None:
    card = model_card(story(), DIGEST)
    assert card.startswith("---\nlibrary_name: pytorch\n")
    for part in (
        "# clothes", "after round 2 of 3", "gpu-box, attic", "60,000", "1,234", "| accuracy | 0.910 |",
        "10,000 held-out samples", "No differential privacy", f"`{DIGEST}`", f"`{'2' * 64}`", f"`{'cd' * 32}`",
        "fedavg", "lr = 0.05", "0.1.0", 'load_file("model.safetensors")', "from task import model",
    ):  # fmt: skip
        assert part in card, part


def test_the_card_of_a_private_job_has_its_epsilon() -> None:
    spent = {"level": "worker", "epsilon": 3.21, "delta": 1e-5, "clip": 1.0}
    first, last = story().closed
    card = model_card(
        replace(story(), closed=(first, type(last).model_validate({**last.model_dump(), "privacy": spent}))), DIGEST
    )
    assert "ε = 3.21" in card
    assert "for each worker" in card


def test_a_round_that_was_not_measured_says_so_and_a_model_as_built_has_no_rounds() -> None:
    assert "The model of round 1 was not evaluated." in model_card(story(1), DIGEST)
    built = model_card(replace(story(0), built=story().built), DIGEST)
    assert f"`{'0' * 64}`" in built


def test_a_name_cannot_become_markup() -> None:
    evil = replace(story(), workers=("[click](http://x)", "<script>", "a|b"))
    card = model_card(evil, DIGEST)
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert "[click](http" not in card.replace("\\[click\\]", "")


def test_config_json_is_the_least_that_tells_what_the_weights_are_of() -> None:
    found = json.loads(config_json(story()))
    assert (found["task"], found["config"], found["parameters"], found["round"]) == ("my_task", {"width": 64}, 1234, 2)
    assert found["task_file"] == "task.py"
    assert json.loads(config_json(replace(story(), task_digest=None)))["task_file"] is None


@pytest.mark.parametrize("key", [{"trainable_only": True}, {"personal": ["head.*"]}])
def test_a_model_that_is_not_whole_is_loaded_without_strictness(key: dict[str, Any]) -> None:
    spec = {**SPEC, "train": {"local_epochs": 1, **key}, "data": {"shards": 2}}
    view = JobView.model_validate({**VIEW.model_dump(mode="json"), "spec": spec})
    assert "strict=False" in model_card(replace(story(), view=view), DIGEST)


def test_a_model_says_what_it_began_with() -> None:
    before = Beginning(digest="ef" * 32, size=10, job="digits-4f2a", round=7)
    for beginning, row in (
        (before, f"| Began with | the model of job `digits-4f2a` after round 7, SHA-256 `{before.digest}` |"),
        (Beginning(digest=before.digest, size=10), f"| Began with | a file, SHA-256 `{before.digest}` |"),
    ):
        found = replace(story(), view=VIEW.model_copy(update={"begins_with": beginning}))
        assert row in model_card(found, DIGEST)
        told = {"digest": before.digest, "job": beginning.job, "round": beginning.round}
        assert json.loads(config_json(found))["began_with"] == told
    assert "Began with" not in model_card(story(), DIGEST)
    assert json.loads(config_json(story()))["began_with"] is None

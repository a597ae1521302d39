"""A training script on two workers, from its first line to what stands below its loop."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

pytestmark = pytest.mark.acceptance

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "digits.py"
JOB: dict[str, Any] = {"script": True, "rounds": 2, "data": {"shards": 2}, "round": {"min_workers": 2},
                       "aggregation": {"update": "int8"}}  # fmt: skip


def test_two_workers_run_a_script_to_its_end_and_once_more_to_the_same_bytes(crew: LocalFleet, tmp_path: Path) -> None:
    before = {log: len(log.read_bytes()) for log in crew.folder.glob("w?/child.log")}
    first = crew.submit(SCRIPT, **JOB)
    facts = crew.facts(first)
    rounds = closed_rounds(facts)
    assert [closed["samples"] for closed in rounds] == [1_437, 1_437]
    assert {fact["shard"] for fact in of_type(facts, "accepted")} == {0, 1}
    assert [fact["metrics"]["accuracy"] > 0.5 for fact in of_type(facts, "evaluation")][-1]
    again = crew.submit(SCRIPT, **JOB)
    models = [crew.finish(job).model for job in (first, again)]
    assert models[0] is not None
    assert models[0] == models[1]

    def below() -> bool:
        logs = crew.folder.glob("w?/child.log")
        return any(b"'accuracy'" in log.read_bytes()[before.get(log, 0) :] for log in logs)

    wait_for("a script to have come below its loop", below)

    never = tmp_path / "never.py"
    never.write_text("import lydian\nprint('nothing here')\n")
    reason = crew.finish(crew.submit(never, script=True), state="failed").reason
    assert "never.py came to its end and never to `for round in lydian.rounds(model):`" in reason

"""A training script on two workers, from its first line to what stands below its loop."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.kit import LocalFleet, closed_rounds, of_type, wait_for

pytestmark = pytest.mark.acceptance

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "scripts" / "digits.py"
JOB: dict[str, Any] = {"script": True, "rounds": 2, "data": {"shards": 2}, "round": {"min_workers": 2},
                       "aggregation": {"update": "int8"}}  # fmt: skip


def test_two_workers_run_a_script_to_its_end_and_once_more_to_the_same_bytes(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.start_workers(2, "--trust", "any")
        first = fleet.submit(SCRIPT, **JOB)
        facts = fleet.facts(first)
        rounds = closed_rounds(facts)
        assert [closed["samples"] for closed in rounds] == [1_437, 1_437]
        assert {fact["shard"] for fact in of_type(facts, "accepted")} == {0, 1}
        assert [fact["metrics"]["accuracy"] > 0.5 for fact in of_type(facts, "evaluation")][-1]
        again = fleet.submit(SCRIPT, **JOB)
        models = [fleet.finish(job).model for job in (first, again)]
        assert models[0] is not None
        assert models[0] == models[1]

        logs = [tmp_path / name / "child.log" for name in fleet.workers]
        wait_for("a script to have come below its loop", lambda: any("'accuracy'" in log.read_text() for log in logs))

        never = tmp_path / "never.py"
        never.write_text("import lydian\nprint('nothing here')\n")
        reason = fleet.finish(fleet.submit(never, script=True), state="failed").reason
        assert "never.py came to its end and never to `for round in lydian.rounds(model):`" in reason

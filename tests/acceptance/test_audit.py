"""A real fleet whose record is read, checked and anchored, and whose model is proven, by the commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.acceptance.kit import LocalFleet


def lydian(fleet: LocalFleet, *arguments: str) -> tuple[int, str]:
    """Exit code of a command, and what it printed."""
    environment = {**os.environ, "LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": fleet.admin_token}
    command = [sys.executable, "-m", "client.main", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_fleets_record_holds_its_model_is_proven_and_a_changed_byte_is_named(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("w1")
        job = fleet.submit(rounds=2, round={"keep_updates": "all"}, data={"shards": 2}, aggregation={"update": "int8"})
        fleet.finish(job)
        code, text = lydian(fleet, "audit", "--job", job, "--action", "update.accepted", "--json")
        rows = [json.loads(line) for line in text.splitlines()]
        assert (code, [row["result"] for row in rows]) == (0, ["counts"] * 4), text
        assert {(row["worker"], row["peer"]) for row in rows} == {(fleet.api.workers()[0].id, "127.0.0.1")}
        code, text = lydian(fleet, "audit", "--action", "worker", "--last", "1")
        assert (code, text.split()[:2], "worker.joined" in text) == (0, ["ROW", "AT"], True), text
        code, head = lydian(fleet, "audit", "head")
        assert code == 0
        code, text = lydian(fleet, "audit", "verify", "--since", head.strip())
        assert (code, "1 anchor found in it" in text) == (0, True), text
        code, text = lydian(fleet, "verify", job, "--state-dir", str(fleet.state))
        assert (code, "2 of 2 rounds proven, 0 wrong" in text) == (0, True), text
        digest = next(row["detail"] for row in rows).partition(",")[0]
        update = fleet.state / "blobs" / digest[:2] / digest
        update.write_bytes(update.read_bytes()[:-1] + b"!")
        code, text = lydian(fleet, "verify", job, "--state-dir", str(fleet.state), "--round", "1")
        assert (code, "the update of round 1, shard" in text, "was changed" in text) == (1, True, True), text

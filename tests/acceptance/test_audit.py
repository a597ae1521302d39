"""A real fleet whose record is read, checked and anchored, and whose model is proven, by the commands."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from client.main import app
from tests.acceptance.kit import LocalFleet
from tests.acceptance.played import Played, update


def lydian(fleet: LocalFleet, *arguments: str) -> tuple[int, str]:
    """Exit code of a command that runs in this process, and what it printed."""
    environment = {"LYDIAN_URL": fleet.url, "LYDIAN_TOKEN": fleet.admin_token}
    ended = CliRunner().invoke(app, arguments, env=environment)
    return ended.exit_code, ended.output


def verify(job: str, fleet: LocalFleet, *arguments: str) -> tuple[int, str]:
    """The same of `lydian verify`, which becomes another program."""
    command = [sys.executable, "-m", "client.main", "verify", job, "--state-dir", str(fleet.state), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_fleets_record_holds_its_model_is_proven_and_a_changed_byte_is_named(tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet, Played(fleet, "one") as one:
        job = fleet.submit(rounds=2, round={"keep_updates": "all"}, data={"shards": 2})
        one.init()
        for number in range(4):
            one.hand_in(one.poll(), update(number))
        fleet.finish(job)
        code, text = lydian(fleet, "audit", "--job", job, "--action", "update.accepted", "--json")
        rows = [json.loads(line) for line in text.splitlines()]
        assert (code, [row["result"] for row in rows]) == (0, ["counts"] * 4), text
        assert {(row["worker"], row["peer"]) for row in rows} == {(one.id, "127.0.0.1")}
        code, text = lydian(fleet, "audit", "--action", "worker", "--last", "1")
        assert (code, text.split()[:2], "worker.joined" in text) == (0, ["ROW", "AT"], True), text
        code, head = lydian(fleet, "audit", "head")
        assert code == 0
        code, text = lydian(fleet, "audit", "verify", "--since", head.strip())
        assert (code, "1 anchor found in it" in text) == (0, True), text
        code, text = verify(job, fleet)
        assert (code, "2 of 2 rounds proven, 0 wrong" in text) == (0, True), text
        digest = rows[0]["detail"].partition(",")[0]
        stored = fleet.state / "blobs" / digest[:2] / digest
        stored.write_bytes(stored.read_bytes()[:-1] + b"!")
        code, text = verify(job, fleet, "--round", "1")
        assert (code, "the update of round 1, shard" in text, "was changed" in text) == (1, True, True), text

"""A secure round of real processes: some die before their update, some after it, and the sum is the plain one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.fixed import Fixed
from common.weights import load, read_layout
from tests.acceptance.kit import LocalFleet, of_type, wait_for

pytest.importorskip("cryptography")
pytestmark = pytest.mark.acceptance

STARTS_S = 200.0  # a bound for five workers that load torch on a busy machine; nothing is asserted about it
TASK = Path(__file__).with_name("secure_task.py")


def plain_sum(base: Path, trained: dict[Path, int], fixed: Fixed) -> str:
    """The digest of base + the mean of the changes, in whole numbers, from the models that were trained."""
    layout, old, total = read_layout(base), load(base), sum(trained.values())
    new = {path: load(path) for path in trained}
    digest = hashlib.sha256(layout.header)
    for tensor in layout.tensors:
        value = old[tensor.name]
        if tensor.is_float:
            numbers = np.zeros(value.shape, np.int64)
            for path, samples in trained.items():
                change = new[path][tensor.name].astype(np.float64) - value.astype(np.float64)
                numbers += np.rint(change * 2.0**fixed.fraction).astype(np.int64) * samples
            mean = numbers.astype(np.float64) / float(total) * 2.0**-fixed.fraction
            value = (value.astype(np.float64) + mean).astype(np.float32)
        digest.update(value.tobytes())
    return digest.hexdigest()


def test_workers_that_die_before_and_after_their_update_leave_the_plain_sum_of_all_that_came(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    with LocalFleet(tmp_path, ttl_s=20.0) as fleet:
        job = fleet.submit(
            TASK,
            rounds=1,
            seed=5,
            secure={"enabled": True, "threshold": 0.6},
            round={"min_workers": 5},
            train={"local_epochs": 2, "batch_size": 8, "lr": 0.1},
            config={"dump": str(dump)},
        )
        pids = {name: fleet.start_worker(name, "--trust", "any").popen.pid for name in ("w1", "w2", "w3", "w4", "w5")}
        agreed = "of 5 masked updates are in"
        wait_for("all to agree on masks", lambda: agreed in fleet.api.job(job).reason, STARTS_S)
        assert fleet.coordinator is not None
        fleet.coordinator.kill()  # what was agreed on is in its journal
        fleet.start_coordinator()
        for name in ("w1", "w2", "w3", "w4"):
            (dump / f"{pids[name]}.go").touch()
        wait_for("four updates", lambda: "4 of 5 masked updates are in" in fleet.api.job(job).reason)
        fleet.workers["w4"].kill_all()  # its update is in
        wait_for("the fifth to have trained", (dump / f"{pids['w5']}.safetensors").exists)
        fleet.workers["w5"].kill_all()  # its update is not
        view = fleet.finish(job)
        facts = fleet.facts(job)
    assert view.model is not None
    accepted = {fact["worker_name"]: fact["samples"] for fact in of_type(facts, "accepted")}
    assert accepted.keys() == {"w1", "w2", "w3", "w4"}
    (opened,) = of_type(facts, "opened")
    base = next((tmp_path / "state").rglob(f"{opened['base']}*"))
    trained = {dump / f"{pids[name]}.safetensors": samples for name, samples in accepted.items()}
    assert view.model.digest == plain_sum(base, trained, Fixed(64.0, 38))
    assert [fact["left_out"] for fact in of_type(facts, "round")] == [1]

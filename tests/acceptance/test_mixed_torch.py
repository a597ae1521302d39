"""Workers with different torch versions finish a job together. Builds the second environment: make test-mixed-torch."""

import subprocess
from pathlib import Path

import pytest

from tests.acceptance.kit import LocalFleet, of_type

pytestmark = [pytest.mark.acceptance, pytest.mark.mixed_torch, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent.parent
LEGACY = ROOT / ".venv-legacy"


@pytest.fixture(scope="module")
def legacy_python() -> Path:
    """The interpreter of an environment with requirements_legacy_gpu.txt; kept for the next time."""
    subprocess.run(["sh", "deploy/environment.sh", str(LEGACY), "legacy"], cwd=ROOT, check=True)
    return LEGACY / "bin" / "python"


def test_workers_on_the_legacy_and_the_newest_torch_finish_a_job_together(legacy_python: Path, tmp_path: Path) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.start_worker("new")
        fleet.start_worker("old", python=legacy_python)
        fleet.await_workers(2)
        versions = {worker.name: worker.hardware.torch.version for worker in fleet.api.workers()}
        assert versions["old"].startswith("2.7.1")
        assert not versions["new"].startswith("2.7.")
        job = fleet.submit(rounds=3, data={"shards": "auto"}, round={"min_workers": 2}, train={"local_epochs": 5})
        view = fleet.finish(job)
        assert view.metrics["accuracy"] > 0.5
        assert {a["worker_name"] for a in of_type(fleet.facts(job), "accepted")} == {"new", "old"}

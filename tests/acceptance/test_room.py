"""What does not fit is refused before a byte of it is read; what does costs no memory, however many come at once.

A real coordinator; the workers are played by the test, since bytes are the subject and not training.
"""

import json
import threading
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from common.messages import ModelFacts, Submission
from common.weights import Notes, file_digest, load, save
from tests.acceptance.kit import PATIENCE_S, LocalFleet, size
from tests.acceptance.played import Played

pytestmark = pytest.mark.acceptance

UPLOADS = 8
NUMBERS = size(8, 256) << 20  # parameters of the model: 32 MiB [1 GiB], which is more, eight times, than may be held
MEMORY = 250_000_000  # bytes, at the most: the process and a few blocks


def peak_bytes(fleet: LocalFleet) -> int:
    """The most memory that the coordinator ever held."""
    assert fleet.coordinator is not None
    status = Path(f"/proc/{fleet.coordinator.popen.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc/PID/status, to see a process's peak memory")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def model_file(folder: Path, number: int) -> Path:
    """An update whose numbers are all alike, so that the mean of several is known."""
    file = folder / f"update-{number}"
    save(file, {"w": np.full(NUMBERS, number, dtype=np.float32)}, Notes())
    return file


@pytest.mark.timeout(3600)
def test_eight_large_uploads_at_once_are_averaged_in_a_memory_that_knows_no_model(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleet = stack.enter_context(LocalFleet(tmp_path, ttl_s=600.0, anew=True))  # nobody beats for these workers
        workers = [stack.enter_context(Played(fleet, f"w{number}")) for number in range(UPLOADS)]
        job = fleet.submit(rounds=1, data={"shards": UPLOADS})
        first, initial = workers[0].poll(), model_file(tmp_path, 0)
        workers[0].api.upload(first.id, first.attempt, initial)
        facts = ModelFacts(parameters=NUMBERS, train_samples=UPLOADS, test_samples=0, bounds=tuple(range(UPLOADS + 1)))
        submission = Submission(attempt=first.attempt, digest=file_digest(initial), facts=facts)
        workers[0].api.submit(first.id, submission)
        initial.unlink()

        together, sent = threading.Barrier(UPLOADS), list[int]()

        def hand_in(number: int) -> None:
            worker, file = workers[number], model_file(tmp_path, number)
            work = worker.poll(wait_s=30.0)
            digest = file_digest(file)
            together.wait()
            sent.append(worker.api.upload(work.id, work.attempt, file))
            file.unlink()
            worker.api.submit(work.id, Submission(attempt=work.attempt, digest=digest, samples=1))

        threads = [threading.Thread(target=hand_in, args=(number,)) for number in range(UPLOADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(sent) == UPLOADS, "an upload failed; its thread's traceback is above"
        fleet.finish(job)
        peak = peak_bytes(fleet)
        mean = load(fleet.pull(job))["w"]
        assert mean.shape == (NUMBERS,)
        assert np.all(mean == np.float32(sum(range(UPLOADS)) / UPLOADS))
        print(f"\n{UPLOADS} uploads at once, {sum(sent)} bytes, averaged: the coordinator never held {peak} bytes more")
        assert sum(sent) > MEMORY
        assert peak <= MEMORY


def test_an_upload_that_does_not_fit_is_refused_before_its_body_comes_and_pauses_its_job_with_the_numbers(
    tmp_path: Path,
) -> None:
    announced = 1 << 20
    with ExitStack() as stack:
        fleet = stack.enter_context(LocalFleet(tmp_path, LYDIAN_RESERVE_BYTES=str(1 << 50)))
        worker = stack.enter_context(Played(fleet, "w"))
        job = fleet.submit(rounds=1, data={"shards": 1})
        work = worker.poll()
        with closing(HTTPConnection("127.0.0.1", fleet.port, timeout=PATIENCE_S)) as line:
            line.putrequest("PUT", f"/v1/updates/{work.id}?attempt={work.attempt}")
            line.putheader("Content-Length", str(announced))
            line.putheader("Authorization", f"Bearer {worker.token}")
            line.endheaders()
            answer = line.getresponse()  # not one byte of the body was sent
            said = json.loads(answer.read())
        assert (answer.status, said["code"]) == (507, "disk_full")
        assert f"{announced} bytes do not fit" in said["sentence"]
        view = fleet.api.job(job)
        assert view.state == "paused"
        assert f"{announced} bytes do not fit" in view.reason
        assert not list((fleet.state / "blobs").glob("**/*.part"))

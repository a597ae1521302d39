"""`--init FILE` on the submitter's machine: what is found and refused, what the job says of it, how it is sent."""

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from client import sending
from client.given import checked, located
from client.job_file import INIT, Setting, flag_layer, read_job
from common.errors import BadJobError, ConflictError, NotFoundError, UnavailableError
from common.messages import JobRequest, JobSpec


def weights(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    save_file({"w": np.ones(3, np.float32)}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refused(path: Path) -> BadJobError:
    with pytest.raises(BadJobError) as raised:
        checked(located(path))
    assert raised.value.code == "bad_init"
    return raised.value


def test_a_file_or_a_folder_with_one_is_named_in_the_job_by_its_digest(tmp_path: Path) -> None:
    digest = weights(tmp_path / "run" / "model.safetensors")
    for said in (f"{tmp_path}/run/", f"{tmp_path}/run/model.safetensors"):
        job = read_job(None, flag_layer({("task",): "digits", INIT: said}), {})
        assert (job.spec.init, job.model) == (f"sha256:{digest}", tmp_path / "run" / "model.safetensors")


def test_a_job_file_names_a_file_beside_it_and_a_flag_goes_before_it(tmp_path: Path) -> None:
    digest = weights(tmp_path / "old.safetensors")
    file = tmp_path / "job.toml"
    file.write_text('task = "digits"\ninit = "old.safetensors"\n')
    assert read_job(file, {}, {}).spec.init == f"sha256:{digest}"
    job = read_job(file, flag_layer({INIT: "digits-4f2a@best"}), {})
    assert (job.spec.init, job.model) == ("digits-4f2a@best", None)


def test_what_names_neither_a_file_nor_a_job_is_refused_in_words() -> None:
    for said in ("a b", "digits@worst", 7):
        with pytest.raises(BadJobError, match=r"init = .* in --set: a file or folder of weights"):
            read_job(None, flag_layer({("task",): "digits"}), {INIT: Setting(said, "--set")})


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors", "weights.pkl"])
@pytest.mark.parametrize("kind", ["zip", "pickle"])
def test_a_pickle_is_refused_whatever_it_is_called_with_how_to_turn_it_into_safetensors(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / name
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/data.pkl", b"")
    else:
        path.write_bytes(pickle.dumps({"w": [1.0]}))
    error = refused(path)
    assert "is a pickle, which may run code when it is read" in str(error)
    assert f'torch.load("{name}", weights_only=True)' in error.advice


def test_what_cannot_be_used_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    assert "is no safetensors file that can be used: the header claims" in str(refused(tmp_path / "text.safetensors"))
    save_file({}, tmp_path / "none.safetensors")
    assert "has no tensors" in str(refused(tmp_path / "none.safetensors"))
    assert "there is no file" in str(refused(tmp_path / "gone.safetensors"))
    assert "--init digits-4f2a" in refused(tmp_path / "digits-4f2a").advice
    (tmp_path / "empty").mkdir()
    assert "has no model.safetensors" in str(refused(tmp_path / "empty"))
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("{}")
    assert "has its model in several files" in str(refused(tmp_path / "empty"))


# ---------------------------------------------------------------- sending


class Line:
    """A coordinator as `sending` calls it: the line breaks after each of `pieces`, and submitting meets `refusals`."""

    def __init__(self, pieces: tuple[int, ...] = (), refusals: tuple[Exception, ...] = ()) -> None:
        self.pieces, self.refusals, self.sent = list(pieces), list(refusals), list[str]()

    def send_model(self, digest: str, source: Path, *, on_bytes: Any) -> None:
        self.sent.append(digest)
        if self.pieces:
            on_bytes(self.pieces.pop(0))
            raise UnavailableError("the line broke")

    def submit_job(self, request: JobRequest) -> str:
        if self.refusals:
            raise self.refusals.pop(0)
        return "taken"


def submit(line: Line, tmp_path: Path, init: str = "") -> Any:
    digest = weights(tmp_path / "w.safetensors")
    said = init or str(tmp_path / "w.safetensors")
    job = read_job(None, flag_layer({("task",): "digits", INIT: said}), {})
    assert init or job.spec == JobSpec(**{**job.spec.model_dump(), "init": f"sha256:{digest}"})
    return sending.submit(line, job, JobRequest(spec=job.spec, key="k"))  # type: ignore[arg-type]


def test_a_file_is_sent_on_as_long_as_each_try_brings_something(tmp_path: Path) -> None:
    line = Line(pieces=(10, 20))
    assert submit(line, tmp_path) == "taken"
    assert len(line.sent) == 3
    with pytest.raises(UnavailableError) as raised:
        submit(Line(pieces=(10, 10)), tmp_path)
    assert raised.value.advice.startswith("What came is kept for an hour")


def test_a_file_that_was_deleted_before_the_job_came_is_sent_once_more(tmp_path: Path) -> None:
    for error in (NotFoundError("gone", code="unknown_model"), ConflictError("half", code="incomplete")):
        line = Line(refusals=(error,))
        assert submit(line, tmp_path) == "taken"
        assert len(line.sent) == 2
    with pytest.raises(ConflictError):
        submit(Line(refusals=(ConflictError("used", code="key_reused"),)), tmp_path)


def test_who_names_a_folder_as_a_job_is_told_how_to_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-4f2a").mkdir()
    line = Line(refusals=(NotFoundError("there is no job", code="unknown_job"),))
    with pytest.raises(NotFoundError) as raised:
        submit(line, tmp_path, "digits-4f2a")
    assert raised.value.advice == "For the one that lies here, say --init ./digits-4f2a"

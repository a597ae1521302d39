"""`lydian init`: the two files that one begins with, and that they train."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from client.beginning import begin, job_toml, key_lines
from client.job_file import Layer, build_spec, file_layer, read_job
from client.job_keys import Key, job_keys
from common.errors import BadJobError, LydianError
from common.messages import JobSpec

KEYS = [key for key in job_keys().values() if not key.open]


def test_every_key_stands_in_the_file_once_with_what_it_is() -> None:
    text = job_toml()
    for key in KEYS:
        section = text if len(key.path) == 1 else text.partition(f"\n[{key.path[0]}]\n")[2]
        section = section.partition("\n[")[0]
        assert len(re.findall(rf"^#?{key.path[-1]} = ", section, re.MULTILINE)) == 1, key.dotted
    for section in JobSpec.model_fields:
        assert text.count(f"\n[{section}]\n") <= 1


def test_the_file_is_a_job_as_it_stands(tmp_path: Path) -> None:
    job = read_job(begin(tmp_path / "mine", force=False), {}, {})
    assert job.spec.task == "task"
    assert job.task_source == (tmp_path / "mine" / "task.py").read_text()
    assert job.spec == JobSpec(task="task", train={"local_epochs": 1})  # nothing but defaults


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.dotted)
def test_a_key_that_loses_its_comment_sign_is_read(key: Key) -> None:
    (line,) = [line for line in key_lines(key) if re.match(rf"#?{key.path[-1]} = ", line)]
    table = f"[{key.path[0]}]\n" if len(key.path) > 1 else ""
    layer = file_layer(f"{table}{line.removeprefix('#')}\n", "job.toml")
    assert list(layer) == [key.path]
    assert tomllib.loads(line.removeprefix("#"))
    # A rule over several keys may want another one beside it; the value itself is allowed.
    assert f"{key.allowed} is allowed" not in refusal({**file_layer('task = "digits"', "job.toml"), **layer})


def refusal(layer: Layer) -> str:
    """Why these settings are no job; empty: they are one."""
    try:
        build_spec(layer)
    except BadJobError as error:
        return str(error)
    return ""


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path: Path) -> None:
    begin(tmp_path, force=False)
    (tmp_path / "task.py").write_text("mine")
    with pytest.raises(LydianError, match="exists already"):
        begin(tmp_path, force=False)
    assert (tmp_path / "task.py").read_text() == "mine"
    begin(tmp_path, force=True)
    assert (tmp_path / "task.py").read_text() != "mine"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LydianError, match="cannot be written"):
        begin(tmp_path / "file" / "inside", force=False)


def test_the_task_file_learns_what_it_shows(tmp_path: Path, one_thread: None) -> None:
    import torch

    begin(tmp_path, force=False)
    namespace: dict[str, object] = {}
    sys.path.insert(0, str(tmp_path))
    try:
        import task as namespace_of_task
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("task", None)
    namespace = vars(namespace_of_task)
    model, dataset = namespace["model"], namespace["dataset"]
    torch.manual_seed(0)
    net, (x, y), (u, v) = model({}), dataset({}, "train").tensors, dataset({}, "test").tensors  # type: ignore[operator]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert (net(u).argmax(1) == v).float().mean() > 0.8

"""A file of weights in a model that was just built: what fits, what is said where it does not, and the bytes after."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.weights import file_digest, publish
from worker import task_given, task_host, task_parts

WHOLE = task_parts.WHOLE


class Net(nn.Module):
    def __init__(self, classes: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.twin = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, classes)
        if tied:
            self.twin.weight = self.body[0].weight


def built(seed: int, **more: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**more)


def parts_of(model: nn.Module, **train: Any) -> Any:
    task_parts.freeze(model, train.get("frozen", ()))
    return task_parts.parts_of(train, model, task_host.state_of(model)[1].aliases)


def written(model: nn.Module, path: Path, parts: Any = WHOLE) -> Path:
    task_host.save_state(model, path, parts)
    return path


def misfit(model: nn.Module, file: Path, parts: Any = WHOLE) -> str:
    with pytest.raises(task_host.TaskError) as raised:
        task_given.put(task_host, model, file, parts)
    assert raised.value.code == "bad_task"
    return str(raised.value).partition("model(config) builds: ")[2]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("as_users_have_it", [False, True])
def test_a_model_that_begins_with_a_file_is_written_as_that_model_was(
    tmp_path: Path, tied: bool, as_users_have_it: bool
) -> None:
    first = written(built(1, tied=tied), tmp_path / "first")
    file = first
    if as_users_have_it:
        file = tmp_path / "pulled"
        publish(first, file)
    other = built(2, tied=tied)
    task_given.put(task_host, other, file, WHOLE)
    assert file_digest(written(other, tmp_path / "second")) == file_digest(first)


def test_a_tied_weight_may_be_in_the_file_under_its_other_name_alone(tmp_path: Path) -> None:
    state = built(1, tied=True).state_dict()
    state = {name: tensor for name, tensor in state.items() if name != "body.0.weight"}
    save_file(state, tmp_path / "file")
    model = built(2, tied=True)
    task_given.put(task_host, model, tmp_path / "file", WHOLE)
    assert torch.equal(model.body[0].weight, state["twin.weight"])
    assert model.twin.weight is model.body[0].weight


def test_numbers_of_a_narrower_kind_are_taken_and_of_a_wider_kind_are_not(tmp_path: Path) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in built(1).state_dict().items()}
    save_file(half, tmp_path / "half")
    model = built(2)
    task_given.put(task_host, model, tmp_path / "half", WHOLE)
    assert torch.equal(model.head.weight, half["head.weight"].float())
    save_file(built(1).double().state_dict(), tmp_path / "double")
    assert misfit(model, tmp_path / "double").startswith("'body.0.weight' is float64 [4, 4], not float32 [4, 4]; ")


def test_the_first_differences_are_named_in_the_order_of_the_model(tmp_path: Path) -> None:
    state = built(1, classes=5).state_dict()
    del state["body.0.bias"]
    save_file({**state, "old": torch.ones(1)}, tmp_path / "file")
    said = misfit(built(2), tmp_path / "file")
    assert said == (
        "'body.0.bias' is missing; 'head.weight' is float32 [5, 4], not float32 [3, 4]; "
        "'head.bias' is float32 [5], not float32 [3]; and 1 more"
    )


def test_two_tensors_of_a_file_are_not_put_into_one_of_the_model(tmp_path: Path) -> None:
    file = written(built(1), tmp_path / "file")
    assert misfit(built(2, tied=True), file) == (
        "'twin.weight' is another than 'body.0.weight', and the model has one tensor for both"
    )


def test_what_stays_with_its_worker_begins_as_it_was_built_whether_the_file_has_it_or_not(tmp_path: Path) -> None:
    whole = written(built(1), tmp_path / "whole")
    for file in (whole, written(built(1), tmp_path / "part", parts_of(built(1), personal=("head.*",)))):
        model = built(2)
        task_given.put(task_host, model, file, parts_of(model, personal=("head.*",)))
        assert torch.equal(model.head.weight, built(2).head.weight)
        assert torch.equal(model.twin.weight, built(1).twin.weight)


def test_what_does_not_travel_must_be_in_the_file_as_it_is_built_or_not_at_all(tmp_path: Path) -> None:
    train = {"trainable_only": True, "frozen": ("body.0.*",)}
    model = built(1)
    parts = parts_of(model, **train)
    with torch.no_grad():
        model.head.weight.add_(1)
    for name, kept in (("whole", WHOLE), ("part", parts)):
        file, other = written(model, tmp_path / name, kept), built(1)
        task_given.put(task_host, other, file, parts_of(other, **train))
        assert torch.equal(other.head.weight, model.head.weight)
    other = built(2)
    assert misfit(other, tmp_path / "whole", parts_of(other, **train)).startswith(
        "'body.0.weight' is not as model(config) builds it, and with train.trainable_only it does not travel; "
    )
    with pytest.raises(task_host.TaskError, match="where the job began") as raised:
        task_given.put(task_host, other, tmp_path / "part", parts_of(built(2), **train))
    assert raised.value.code == "no_data"
    assert "head.weight" in load_file(tmp_path / "part")

"""A Flower app's arrays as a model that travels, and what a worker without Flower says. Needs no Flower."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.packing import app_of, pack
from lydian.flower import add, counted, numbers
from lydian.flower_arrays import Arrays, Mean
from tests.test_packing import FILES
from tests.test_script import Desk

NAMED = {"type.weight": np.ones((2, 3), np.float32), "type": np.zeros((), np.float64), "0": np.array([True]),
         "bn.running_var": np.ones(3, np.float16), "bn.num": np.array(7)}  # fmt: skip


def test_arrays_keep_names_order_shapes_and_dtypes_whatever_they_are_called() -> None:
    model = Arrays(NAMED)
    assert set(model.state_dict()) == set(NAMED)
    back = model.arrays()
    assert list(back) == list(NAMED)
    for name, array in NAMED.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(back[name], array)
    assert {name for name, _ in model.named_parameters()} == {"type.weight", "type"}, "no statistics, no whole numbers"


def test_new_values_are_written_in_place_and_a_wider_float_is_cut_to_the_models() -> None:
    model = Arrays(NAMED)
    weight = model.state_dict(keep_vars=True)["type.weight"]
    version = weight._version
    model.put({**NAMED, "type.weight": np.full((2, 3), 0.1, np.float64)}, "the client")
    assert weight._version > version
    assert torch.equal(weight.detach(), torch.full((2, 3), 0.1))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"type.weight": np.ones((3, 2), np.float32)}, r"'type.weight' as float32 \[3, 2\], and the model .* \[2, 3\]"),
        ({"bn.num": np.array(0.5)}, r"'bn.num' as float64 \[\], and the model .* as int64 \[\]"),
        ({"more": np.ones(1)}, "an array 'more', which the model that the job began with has not"),
        ({"type": np.array("text")}, "the array 'type' is of <U4, which no tensor can hold"),
    ],
)
def test_arrays_of_another_model_are_refused_naming_the_first(change: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Arrays(NAMED).put({**NAMED, **change}, "the client")


def test_arrays_that_are_missing_are_refused_and_so_is_a_model_of_none() -> None:
    with pytest.raises(ValueError, match="the client gave 4 arrays and not 'type', of which there are 5"):
        Arrays(NAMED).put({name: array for name, array in NAMED.items() if name != "type"}, "the client")
    with pytest.raises(ValueError, match="begins with no arrays"):
        Arrays({})


def test_several_clients_of_a_worker_are_averaged_by_their_samples() -> None:
    mean = Mean()
    mean.add({"w": np.array([1, 2], np.float32), "n": np.array(3)}, 1)
    mean.add({"w": np.array([5, 2], np.float32), "n": np.array(2)}, 3)
    assert mean.samples == 4
    assert mean.arrays()["w"].tolist() == [4.0, 2.0]
    assert (mean.arrays()["w"].dtype, mean.arrays()["n"].tolist()) == (np.float32, 3)
    with pytest.raises(ValueError, match="'w' in unlike shapes"):
        mean.add({"w": np.zeros(3, np.float32)}, 1)


@given(st.floats(width=32, allow_nan=False), st.integers(1, 1 << 40))
def test_the_mean_of_one_client_is_never_another_number(value: float, samples: int) -> None:
    mean = Mean()
    mean.add({"w": np.array(value, np.float32)}, samples)
    assert mean.arrays()["w"] == np.float32(value)


def test_metrics_are_numbers_and_lists_and_weigh_by_samples() -> None:
    assert numbers({"a": 1, "b": [1.5, 2], "c": "text", "d": np.float32(2)}) == {"a": 1, "b/0": 1.5, "b/1": 2, "d": 2}
    sums: dict[str, tuple[float, float]] = {}
    add(sums, {"a": 0.5}, 2)
    add(sums, {"a": 1.0, "b": 1}, 3)
    assert sums == {"a": (4.0, 5), "b": (3.0, 3)}


@pytest.mark.parametrize("samples", [None, 0, -1, 0.5, [3]])
def test_a_weight_that_is_none_is_refused(samples: object) -> None:
    with pytest.raises(ValueError, match="num-examples"):
        counted(samples, "train")
    assert counted(3.0, "train") == 3


def test_a_worker_with_several_devices_says_that_an_app_trains_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = Desk(tmp_path).fails(pack(app_of(FILES, "DIR")))
    assert "a Flower app trains on one device, and this worker has 2 that train together" in error["sentence"]


def test_a_worker_without_flower_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "flwr", None)
    error = Desk(tmp_path).fails(pack(app_of(FILES, "DIR")))
    assert error["code"] == "missing_package"
    assert "Flower is not installed here: pip install 'flwr>=1.42' in the worker's environment" in error["sentence"]

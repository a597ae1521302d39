"""examples/experiments: what is made of a simulation's facts. The scripts themselves: tests/acceptance."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "examples" / "experiments"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses, and for the scripts, which import it by this name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs() -> Iterator[ModuleType]:
    yield loaded("runs")
    del sys.modules["runs"]


@pytest.fixture
def mcmahan(runs: ModuleType) -> Iterator[ModuleType]:
    yield loaded("mcmahan")
    del sys.modules["mcmahan"]


def closed(number: int, up: int) -> dict[str, object]:
    return {"type": "round", "round": number, "bytes_up": up, "bytes_down": 1_000}


def measured(number: int, accuracy: float) -> dict[str, object]:
    return {"type": "evaluation", "round": number, "metrics": {"accuracy": accuracy, "loss": 1.0}}


def test_a_point_has_the_bytes_of_all_rounds_up_to_its_own_however_late_it_was_measured(runs: ModuleType) -> None:
    facts = [closed(1, 1), closed(2, 2), measured(1, 0.5), closed(3, 4), measured(3, 0.7)]
    run = runs.run_of(facts, seed=3)
    assert run == runs.Run(3, (runs.Point(1, 0.5, 1), runs.Point(3, 0.7, 7)))
    assert run.last.bytes_up == 7


def test_a_target_is_reached_in_the_first_round_that_has_it_even_if_later_ones_fall_back(runs: ModuleType) -> None:
    run = runs.run_of([measured(2, 0.8), measured(1, 0.79), measured(3, 0.6)], seed=0)
    assert run.first_at(0.8) == 2
    assert run.first_at(0.81) is None


def test_one_value_has_no_spread(runs: ModuleType) -> None:
    assert runs.spread([0.5]) == "0.5000"
    assert runs.spread([1, 2, 3], ".1f") == "2.0 ± 1.0"


def test_a_row_has_no_mean_where_one_seed_never_got_there(runs: ModuleType, mcmahan: ModuleType) -> None:
    def run(seed: int, *accuracies: float) -> object:
        return runs.run_of([measured(at, accuracy) for at, accuracy in enumerate(accuracies, 1)], seed)

    found = {
        ("iid", 1): [run(0, 0.1, 0.2, 0.3, 0.9), run(1, 0.1, 0.2, 0.3, 0.9)],
        ("iid", 5): [run(0, 0.9), run(1, 0.1, 0.2, 0.9)],
        ("labels", 1): [run(0, 0.9), run(1, 0.1)],
        ("labels", 5): [run(0, 0.9), run(1, 0.9)],
    }
    assert mcmahan.table_of(found, 0.8, most=4).splitlines()[2:] == [
        "| evenly | 1 | 4, 4 | 4.0 ± 0.0 | 1 |",
        "| evenly | 5 | 1, 3 | 2.0 ± 1.4 | 1/2.0 |",
        "| two labels a client | 1 | 1, never in 4 | – | – |",
        "| two labels a client | 5 | 1, 1 | 1.0 ± 0.0 | – |",
    ]


def test_the_task_without_its_files_says_what_to_install(tmp_path: Path) -> None:
    task = loaded("fashion_mlp")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        task.dataset({"data": {"fashion-mnist": str(tmp_path)}}, "train")

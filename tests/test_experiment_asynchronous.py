"""The experiment of docs/algorithms.md: the same command prints the same numbers, whatever runs beside it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.util.spec_from_file_location("asynchronous", ROOT / "examples/experiments/asynchronous.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "asynchronous", module)  # where dataclasses look for their module
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "HORIZON_S", 25.0)
    return module


@pytest.mark.parametrize("way", ["sync, quorum 0.75", "async", "private data, async"])
def test_the_same_seed_gives_the_same_versions_at_the_same_times(experiment: Any, way: str) -> None:
    digits, speeds = experiment.Digits.load(), (1.0, 1.0, 1.0, 0.2)
    first, again = (list(experiment.Fleet(digits, speeds, experiment.WAYS[way], 3).run()) for _ in range(2))
    assert first == again
    assert len(first) > 1
    assert first[-1][1] > first[0][1]

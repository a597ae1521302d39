"""The cap on the memory of the device that training takes: what torch is told, and where it can be told nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker import task_host


@pytest.mark.parametrize(
    ("device", "most", "told"),
    [
        ("cuda:1", 0.5, (0.5, torch.device("cuda:1"))),
        ("cuda", 6e9, (0.25, torch.device("cuda"))),
        ("cuda", 96e9, (1.0, torch.device("cuda"))),  # more than there is
        ("mps", 0.5, (0.5,)),
        ("mps", 6e9, (0.5,)),
    ],
)
def test_torch_is_told_the_share_of_the_device_that_it_may_take(
    monkeypatch: pytest.MonkeyPatch, device: str, most: float, told: tuple[Any, ...]
) -> None:
    calls: list[tuple[Any, ...]] = []
    for backend in (torch.cuda, torch.mps):
        monkeypatch.setattr(backend, "set_per_process_memory_fraction", lambda *given: calls.append(given))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 10**9))
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 10**9)
    task_host.limit_memory(torch.device(device), most)
    assert calls == [told]


def test_without_a_cap_torch_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: pytest.fail("it was told"))
    task_host.limit_memory(torch.device("cuda"), 1.0)


def test_a_cap_that_no_torch_could_keep_is_refused_and_not_forgotten() -> None:
    with pytest.raises(task_host.TaskError, match="--max-gpu-memory cannot be kept") as refused:
        task_host.limit_memory(torch.device("cpu"), 0.5)
    assert refused.value.code == "worker_error"

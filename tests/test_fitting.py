"""Which device a worker ends up on: the trainer's children are played, since the cards are not here."""

import pytest

from common.messages import GpuInventory, TorchBuild
from tests.fake_gpus import A100, GTX_1080, NEW_TORCH, RTX_4090, build, told
from worker.child import TaskFailure
from worker.fitting import UnfitError, fit_device

NO_KERNEL = TaskFailure("worker_error", "no kernel image is available")


class PlayedTrainer:
    """Children on devices: what each says of its torch, or why it cannot."""

    def __init__(self, asked: str, **hellos: TorchBuild | TaskFailure) -> None:
        self.hellos = {name.replace("_", ":"): hello for name, hello in hellos.items()}
        self.started = [asked]
        self.closed = False

    def ready(self) -> "PlayedTrainer":
        return self

    @property
    def hello(self) -> TorchBuild:
        said = self.hellos[self.started[-1]]
        if isinstance(said, TaskFailure):
            raise said
        return said

    def use(self, device: str) -> None:
        self.started.append(device)

    def close(self) -> None:
        self.closed = True


def fitted(trainer: PlayedTrainer, found: GpuInventory) -> tuple[str, str]:
    """The device and the reason."""
    result = fit_device(trainer, trainer.started[0], found)  # type: ignore[arg-type] # played
    return result.build.device, result.reason


@pytest.fixture(autouse=True)
def no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def test_a_device_that_works_is_kept_and_no_other_child_started() -> None:
    trainer = PlayedTrainer("auto", auto=build(NEW_TORCH, "cuda"))

    assert fitted(trainer, told(RTX_4090)) == ("cuda", "")
    assert trainer.started == ["auto"]


def test_the_first_card_that_fits_is_taken_where_the_first_one_runs_no_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = PlayedTrainer("auto", auto=NO_KERNEL, cpu=build(NEW_TORCH), cuda_1=build(NEW_TORCH, "cuda:1"))
    device, reason = fitted(trainer, told(GTX_1080, RTX_4090))

    assert device == "cuda:1"
    assert "GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up: install requirements_legacy_gpu.txt" in reason
    assert f"training on cuda:1: {reason}" in caplog.text
    assert trainer.started == ["auto", "cpu", "cuda:1"]


def test_a_card_that_is_failing_is_left_though_a_kernel_ran_on_it() -> None:
    trainer = PlayedTrainer("auto", auto=build(NEW_TORCH, "cuda"), cuda_1=build(NEW_TORCH, "cuda:1"))
    device, reason = fitted(trainer, told({**A100, "ecc": 1}, A100))

    assert device == "cuda:1"
    assert "uncorrected memory error" in reason


def test_where_the_other_card_runs_no_kernel_either_the_cpu_is_taken_with_both_reasons() -> None:
    trainer = PlayedTrainer("auto", auto=NO_KERNEL, cpu=build(NEW_TORCH), cuda_1=NO_KERNEL)
    device, reason = fitted(trainer, told(GTX_1080, RTX_4090))

    assert device == "cpu"
    assert "is sm_61" in reason
    assert reason.endswith("no kernel image is available")
    assert trainer.started == ["auto", "cpu", "cuda:1", "cpu"]


def test_the_cpu_is_not_started_twice_where_no_card_fits() -> None:
    trainer = PlayedTrainer("auto", auto=NO_KERNEL, cpu=build(NEW_TORCH))

    assert fitted(trainer, told(GTX_1080))[0] == "cpu"
    assert trainer.started == ["auto", "cpu"]


@pytest.mark.parametrize(
    ("trainer", "found", "code", "lasting"),
    [
        (PlayedTrainer("cuda", cuda=NO_KERNEL, cpu=build(NEW_TORCH)), told(GTX_1080), "no_code", True),
        (PlayedTrainer("cuda", cuda=build(NEW_TORCH, "cuda")), told({**A100, "ecc": 1}), "ecc", False),
        (PlayedTrainer("cuda", cuda=build(NEW_TORCH, "cuda")), told({**A100, "free": 0}), "gpu_full", False),
        (PlayedTrainer("mps", mps=NO_KERNEL, cpu=build(NEW_TORCH)), GpuInventory(), "broken_device", False),
    ],
)
def test_a_device_that_was_asked_for_and_cannot_be_used_is_refused_and_its_child_ended(
    trainer: PlayedTrainer, found: GpuInventory, code: str, lasting: bool
) -> None:
    with pytest.raises(UnfitError) as refused:
        fitted(trainer, found)

    assert (refused.value.code, refused.value.lasting) == (code, lasting)
    assert refused.value.advice.endswith(".")
    assert trainer.closed


def test_a_cpu_that_does_not_work_is_an_error_as_it_was() -> None:
    with pytest.raises(TaskFailure, match="no kernel image"):
        fitted(PlayedTrainer("cpu", cpu=NO_KERNEL), GpuInventory())


def test_a_torch_that_does_not_work_at_all_is_an_error_as_it_was() -> None:
    with pytest.raises(TaskFailure, match="no kernel image"):
        fitted(PlayedTrainer("auto", auto=NO_KERNEL, cpu=NO_KERNEL), GpuInventory())


def test_the_cards_that_the_environment_hides_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    trainer = PlayedTrainer("auto", auto=NO_KERNEL, cpu=build(NEW_TORCH))

    assert fitted(trainer, told(GTX_1080, RTX_4090))[0] == "cpu"

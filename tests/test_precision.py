"""What a device trains in: the tables with every kind of device, and the half precisions on the CPU, which has them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common.messages import TorchBuild
from worker import task_batches, task_device, task_precision
from worker.task_precision import PRECISIONS, Device, best, choose, compiles, unless_unfit

CPU = torch.device("cpu")


def cuda(major: int, minor: int) -> Device:
    return Device("cuda", capability=(major, minor))


TABLE = {
    "sm_50": (cuda(5, 0), "fp32", "compute capability 5.0: half precision needs 7.0"),
    "sm_52": (cuda(5, 2), "fp32", "compute capability 5.2: half precision needs 7.0"),
    "sm_60": (cuda(6, 0), "fp32", "compute capability 6.0: half precision needs 7.0"),
    "sm_61": (cuda(6, 1), "fp32", "compute capability 6.1: half precision needs 7.0"),
    "sm_70": (cuda(7, 0), "fp16", "compute capability 7.0: bfloat16 needs 8.0"),
    "sm_75": (cuda(7, 5), "fp16", "compute capability 7.5: bfloat16 needs 8.0"),
    "sm_80": (cuda(8, 0), "bf16", "compute capability 8.0"),
    "sm_86": (cuda(8, 6), "bf16", "compute capability 8.6"),
    "sm_89": (cuda(8, 9), "bf16", "compute capability 8.9"),
    "sm_90": (cuda(9, 0), "bf16", "compute capability 9.0"),
    "sm_100": (cuda(10, 0), "bf16", "compute capability 10.0"),
    "sm_120": (cuda(12, 0), "bf16", "compute capability 12.0"),
    "unknown": (Device("cuda"), "fp32", "cuda: half precision needs 7.0"),
    "gfx906": (Device("rocm", architecture="gfx906"), "fp32", "gfx906 has no matrix units for bfloat16"),
    "gfx900": (Device("rocm", architecture="gfx900"), "fp32", "gfx900 has no matrix units for bfloat16"),
    "gfx90a": (Device("rocm", architecture="gfx90a"), "bf16", "gfx90a has matrix units for bfloat16"),
    "gfx942": (Device("rocm", architecture="gfx942"), "bf16", "gfx942 has matrix units for bfloat16"),
    "gfx1030": (Device("rocm", architecture="gfx1030"), "fp32", "gfx1030 has no matrix units for bfloat16"),
    "gfx1100": (Device("rocm", architecture="gfx1100"), "bf16", "gfx1100 has matrix units for bfloat16"),
    "xpu": (Device("xpu"), "bf16", "Intel GPUs have matrix units for bfloat16"),
    "mps": (Device("mps"), "fp32", "half precision is not known to pay on mps"),
    "cpu": (Device("cpu"), "fp32", "the processor has neither amx_bf16 nor avx512_bf16"),
    "cpu with amx": (Device("cpu", features={"avx2", "amx_bf16"}), "bf16", "the processor has amx_bf16"),
    "cpu with avx512": (Device("cpu", features={"avx512_bf16"}), "bf16", "the processor has avx512_bf16"),
}

ANY_DEVICE = st.builds(
    replace,
    st.sampled_from([device for device, _, _ in TABLE.values()]),
    works=st.sets(st.sampled_from(["bf16", "fp16"])).map(lambda some: {"fp32", *some}),
)


@pytest.mark.parametrize("name", TABLE)
def test_auto_is_what_the_table_says_of_the_device(name: str) -> None:
    device, precision, reason = TABLE[name]
    assert best(device) == choose("auto", device) == (precision, reason)


@given(ANY_DEVICE, st.sampled_from(["auto", *PRECISIONS]))
def test_nothing_is_ever_chosen_that_came_out_wrong_and_there_is_always_a_reason(device: Device, asked: str) -> None:
    precision, reason = choose(asked, device)
    assert precision in device.works
    assert reason
    assert asked != "fp32" or precision == "fp32"


def test_what_came_out_wrong_is_named() -> None:
    lame = replace(cuda(8, 6), works=("fp32", "fp16"))
    assert best(lame) == ("fp32", "compute capability 8.6, but bf16 came out wrong in the test of this device")
    sentence = "the job asks for bf16, which came out wrong in the test of compute capability 8.6"
    assert choose("bf16", lame) == ("fp32", sentence)
    fp32 = "auto would be fp32: compute capability 8.6, but bf16 came out wrong in the test of this device"
    assert choose("fp16", lame) == ("fp16", f"the job asks for it; {fp32}")
    assert choose("bf16", cuda(8, 6)) == ("bf16", "the job asks for it")
    assert choose("fp16", Device("mps")) == ("fp32", "the job asks for fp16, and torch cannot scale losses on mps")


def test_a_model_that_half_precision_would_break_is_trained_in_float32() -> None:
    chosen = ("bf16", "why")
    assert unless_unfit(chosen, dtypes={"float32"}, plain_optimizer=False) == chosen
    half = unless_unfit(chosen, dtypes={"float32", "bfloat16"}, plain_optimizer=True)
    assert half == ("fp32", "the model's parameters are bfloat16: it is trained as the task made it")
    scaled = unless_unfit(("fp16", "why"), dtypes={"float32"}, plain_optimizer=False)
    assert scaled == ("fp32", "fp16 needs a scaled loss, and the task's optimiser is no torch.optim.Optimizer")
    assert unless_unfit(("fp16", "why"), dtypes={"float32"}, plain_optimizer=True) == ("fp16", "why")
    assert unless_unfit(("fp32", "why"), dtypes={"float64"}, plain_optimizer=True) == ("fp32", "why")


@pytest.mark.parametrize(
    ("device", "triton", "compiler", "answer"),
    [
        (cuda(6, 1), True, "/g++", (False, "Triton needs compute capability 7.0, and this is compute capability 6.1")),
        (Device("cuda"), True, "/g++", (False, "Triton needs compute capability 7.0, and this is cuda")),
        (cuda(7, 0), True, "/g++", (True, "Triton and /g++")),
        (cuda(12, 0), False, "/g++", (False, "Triton is not installed")),
        (cuda(12, 0), True, "", (False, "there is no C++ compiler: install g++ or clang++, or set CXX")),
        (Device("rocm", architecture="gfx90a"), False, "/g++", (False, "Triton is not installed")),
        (Device("xpu"), True, "/g++", (True, "Triton and /g++")),
        (Device("mps"), True, "/g++", (False, "torch.compile is a prototype on mps")),
        (Device("cpu"), False, "/g++", (True, "/g++")),
        (Device("cpu"), True, "", (False, "there is no C++ compiler: install g++ or clang++, or set CXX")),
    ],
)
def test_whether_torch_can_compile_is_said_with_its_reason(
    device: Device, triton: bool, compiler: str, answer: tuple[bool, str]
) -> None:
    assert compiles(device, triton=triton, compiler=compiler) == answer


# ---------------------------------------------------------------- this device


def test_hello_has_what_this_cpu_can_do() -> None:
    device, build = task_device.ready_device("cpu", 0, task_precision)
    told = TorchBuild.model_validate(build)
    assert device == CPU
    assert set(told.dtypes) >= {"fp32", "bf16"}
    assert told.precision in told.dtypes
    assert told.capability is None
    assert 0 < told.free <= told.memory
    assert told.precision_reason
    assert told.compiles_reason


def test_what_a_child_of_protocol_1_said_of_its_torch_is_still_read() -> None:
    old = {"version": "2.7.1", "device": "cuda", "cuda": "12.6", "architectures": ["sm_60"], "threads": 2}
    told = TorchBuild.model_validate(old)
    assert (told.precision, told.dtypes, told.compiles, told.memory) == ("fp32", (), False, 0)


def test_a_dtype_that_computes_wrong_numbers_or_has_no_kernel_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.__matmul__

    def faulty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.float16:
            raise RuntimeError("\"addmm\" not implemented for 'Half'")
        return real(a, b) * (2 if a.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", faulty)
    assert task_device.working_dtypes(CPU) == ("fp32",)
    with pytest.raises(RuntimeError, match=r"came out wrong in torch.bfloat16: 896 and a gradient of 1024 instead of"):
        task_device.run_kernel(CPU, torch.bfloat16)


def test_the_memory_of_a_control_group_counts_where_it_is_the_smaller(tmp_path: Path) -> None:
    meminfo, own = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    600 kB\n")
    assert task_device.cpu_memory(meminfo, own, tmp_path) == (600 << 10, 1000 << 10)
    own.write_text("0::/outer/inner\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text(f"{500 << 10}\n")
    (tmp_path / "outer" / "memory.current").write_text(f"{100 << 10}\n")
    (tmp_path / "outer" / "inner" / "memory.max").write_text("max\n")
    (tmp_path / "outer" / "inner" / "memory.current").write_text("5\n")
    assert task_device.cpu_memory(meminfo, own, tmp_path) == (400 << 10, 500 << 10)


def test_a_system_without_proc_has_a_little_memory_and_no_flags(tmp_path: Path) -> None:
    assert task_device.cpu_memory(tmp_path / "none") == (task_device.UNKNOWN_FREE, task_device.UNKNOWN_FREE)
    assert task_device.cpu_features(tmp_path / "none") == frozenset()
    meter = task_device.Meter(CPU, tmp_path / "none", tmp_path)
    assert (meter.begin(), meter.peak()) == (None, None)


class Card:
    """torch.cuda as far as it is asked here, with one card."""

    def __init__(self, capability: tuple[int, int] = (7, 5), gcn: str = "") -> None:
        self.capability, self.gcn = capability, gcn

    def get_device_capability(self, _: Any) -> tuple[int, int]:
        return self.capability

    def get_device_properties(self, _: Any) -> Any:
        return type("Properties", (), {"gcnArchName": self.gcn, "total_memory": 4 << 30})()


def test_a_card_of_amd_is_known_by_its_architecture_and_not_by_the_number_that_torch_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_device, "working_dtypes", lambda _: PRECISIONS)
    monkeypatch.setattr(torch, "cuda", Card((9, 0), "gfx90a:sramecc+:xnack-"))
    cuda0 = torch.device("cuda:0")
    assert task_device.facts_of(cuda0, task_precision) == cuda(9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert task_device.facts_of(cuda0, task_precision) == Device("rocm", architecture="gfx90a")


def test_memory_is_asked_of_what_this_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    card: Any = Card()
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(torch, "accelerator", type("Old", (), {})())  # 2.7: without memory functions
    assert task_device.memory(torch.device("cuda")) == (0, 4 << 30)
    card.mem_get_info = lambda _: (1 << 30, 4 << 30)
    assert task_device.memory(torch.device("cuda")) == (1 << 30, 4 << 30)


# ---------------------------------------------------------------- steps in half precision


def trained(precision: str, steps: int = 20) -> tuple[list[float], nn.Module, task_batches.Stepper]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 8)
    batch = (x, x[:, :4].argmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    stepper = task_batches.Stepper(CPU, precision, task_device)
    losses = []

    def loss_of(part: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = model(part[0])
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        assert logits.dtype == half.get(precision, torch.float32)
        return nn.functional.cross_entropy(logits, part[1])

    for _ in range(steps):
        losses.append(float(stepper.gradients(loss_of, batch, 64, lambda: optimizer.zero_grad(set_to_none=True))))
        stepper.step(optimizer, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0) and None)
    return losses, model, stepper


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights_to_nearly_the_same_place(precision: str) -> None:
    plain, reference, _ = trained("fp32")
    losses, model, stepper = trained(precision)
    assert stepper.used == precision
    assert stepper.skipped == 0
    assert all(map(math.isfinite, losses))
    assert losses == pytest.approx(plain, rel=0.05, abs=0.02)
    assert losses[-1] < losses[0] / 2
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert ours.dtype == torch.float32
        ours, theirs = ours.detach(), theirs.detach()
        assert float((ours - theirs).norm()) < 0.05 * float(theirs.norm())


def test_a_step_whose_float16_gradients_overflow_is_skipped_and_the_next_one_is_scaled_less() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    stepper = task_batches.Stepper(CPU, "fp16", task_device)

    def step(gradient: float) -> None:
        stepper.gradients(lambda _: (weight * gradient).sum(), torch.zeros(1), 1, optimizer.zero_grad)
        stepper.step(optimizer, lambda: None)

    step(float("inf"))
    assert (float(weight.detach()), stepper.skipped, stepper.scaler.get_scale()) == (1.0, 1, 2.0**12)
    step(0.25)
    assert (float(weight.detach()), stepper.skipped) == (0.75, 1)


def test_a_scale_is_in_the_state_that_a_checkpoint_keeps() -> None:
    _, _, stepper = trained("fp16", steps=3)
    stepper.scaler.update(1024.0)
    stepper.fits = 8
    again = task_batches.Stepper(CPU, "fp16", task_device)
    again.go_on_from(stepper.state())
    assert again.state() == stepper.state()
    again.fits = 4
    again.go_on_from(stepper.state())
    assert again.fits == 4

"""Which torch fits which card, as tables and as properties; and what a box is told that does not fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.fitness import (
    LEGACY,
    NEW,
    Choice,
    Fit,
    absence,
    choose,
    drives,
    file_for,
    fit,
    has_code,
    remedy,
    sm,
    visible,
)
from common.messages import Gpu, GpuInventory, TorchBuild

NEW_TORCH = TorchBuild(
    version="2.14.1", device="cuda", cuda="13.0", architectures=(*NEW.architectures, "compute_120"), threads=8
)
LEGACY_TORCH = TorchBuild(version="2.7.1", device="cuda", cuda="12.6", architectures=LEGACY.architectures, threads=8)
CPU_TORCH = TorchBuild(version="2.14.1+cpu", device="cpu", threads=8)
BLIND = {"device": "cpu", "architectures": ()}  # torch tells no kernels where it finds no driver that it can use

CARDS = {  # name -> capability
    "GTX 680": (3, 0), "GTX 980": (5, 2), "Tesla P100": (6, 0), "GTX 1080": (6, 1), "Tesla V100": (7, 0),
    "RTX 2080": (7, 5), "A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0),
    "RTX 5090": (12, 0), "GB10": (12, 1), "of a year to come": (14, 0),
}  # fmt: skip


def card(name: str, driver: str = "580.65.06", index: int = 0, **more: object) -> Gpu:
    capability = CARDS[name]
    known = {"index": index, "name": name, "memory": 8 << 30, "driver": driver, "free": 7 << 30}
    return Gpu.model_validate({**known, "capability": capability, "uuid": f"GPU-{index}{index}aa", **more})


def box(*gpus: Gpu) -> GpuInventory:
    return GpuInventory(gpus=gpus)


def pick(asked: str, inventory: GpuInventory, build: TorchBuild, broke: str | None = None) -> Choice:
    return choose(asked, inventory, build, seen=visible(inventory.gpus, {}), broke=broke)


capabilities = st.tuples(st.integers(3, 14), st.integers(0, 9))
drivers = st.integers(390, 700).map(lambda branch: f"{branch}.65.06")
architectures = st.lists(
    st.tuples(capabilities, st.sampled_from(["", "a", "f"])).map(lambda each: sm(each[0]) + each[1]), max_size=8
).map(tuple)
builds = st.builds(
    lambda cuda, names: NEW_TORCH.model_copy(update={"cuda": cuda, "architectures": names}),
    st.sampled_from([None, "11.8", "12.6", "13.0", "14.0"]),
    architectures,
)
gpus = st.builds(
    lambda at, capability, driver, free, ecc: Gpu(
        index=at, name="card", memory=8 << 30, driver=driver, capability=capability, free=free, ecc_uncorrected=ecc
    ),
    st.just(0),
    st.none() | capabilities,
    drivers | st.sampled_from(["", "unknown"]),
    st.none() | st.integers(0, 8 << 30),
    st.integers(0, 2),
)


# ---------------------------------------------------------------- kernels and drivers


@pytest.mark.parametrize(
    ("capability", "names", "runs"),
    [
        ((6, 1), ("sm_60",), True),
        ((5, 2), ("sm_50",), True),
        ((8, 9), ("sm_86",), True),
        ((8, 0), ("sm_86",), False),  # code runs on newer cards of its generation, never on older ones
        ((6, 1), ("sm_50",), False),
        ((7, 5), ("sm_70",), True),
        ((12, 1), ("sm_120",), True),
        ((12, 0), ("sm_100",), False),
        ((6, 1), ("sm_75", "compute_60"), False),  # PTX does not count
        ((9, 0), ("sm_90a",), True),
        ((10, 3), ("sm_100a",), False),
        ((10, 3), ("sm_100f",), True),
        ((9, 0), ("gfx90a", "", "sm_"), False),
        ((9, 0), (), False),
    ],
)
def test_code_runs_on_its_own_generation_from_its_own_card_on(
    capability: tuple[int, int], names: tuple[str, ...], runs: bool
) -> None:
    assert has_code(capability, names) is runs


@given(capabilities, architectures, architectures)
def test_more_kernels_never_take_a_card_away(
    capability: tuple[int, int], names: tuple[str, ...], more: tuple[str, ...]
) -> None:
    assert has_code(capability, names + more) == (has_code(capability, names) or has_code(capability, more))


@pytest.mark.parametrize(
    ("driver", "cuda", "runs"),
    [
        ("580.65.06", "13.0", True), ("575.64", "13.0", False), ("535.183.01", "12.6", True),
        ("525.60.13", "12.8", True), ("470.256.02", "12.6", False),
        ("470.256.02", "11.8", True), ("unknown", "13.0", True), ("390.1", "14.1", True),
    ],
)  # fmt: skip
def test_a_driver_runs_what_was_built_for_its_generation_of_cuda(driver: str, cuda: str, runs: bool) -> None:
    assert drives(driver, cuda) is runs


# ---------------------------------------------------------------- what to install


@pytest.mark.parametrize(
    ("name", "driver", "file", "upgrade"),
    [
        ("RTX 4090", "580.65.06", NEW, None),
        ("RTX 2080", "590.44", NEW, None),
        ("RTX 5090", "580.65.06", NEW, None),
        ("RTX 5090", "570.86", NEW, 580),  # the older set has no code for it
        ("RTX 3090", "535.183.01", LEGACY, None),  # an old driver makes a card legacy
        ("RTX 3090", "470.256.02", NEW, 580),
        ("GTX 1080", "580.65.06", LEGACY, None),
        ("GTX 980", "535.183.01", LEGACY, None),
        ("Tesla V100", "580.65.06", LEGACY, None),
        ("GTX 1080", "470.256.02", LEGACY, 580),
        ("GTX 680", "470.256.02", None, None),
        ("of a year to come", "700.1", None, None),
    ],
)
def test_a_card_and_its_driver_have_a_requirements_file(
    name: str, driver: str, file: object, upgrade: int | None
) -> None:
    found = remedy(CARDS[name], driver)
    assert (found.requirements, found.driver) == (file, upgrade)


@given(capabilities, drivers, builds)
def test_what_is_advised_fits(capability: tuple[int, int], driver: str, build: TorchBuild) -> None:
    """Whoever does what the remedy says has a torch that fits: no second visit."""
    found = remedy(capability, driver)
    if found.requirements is None:
        return
    after = f"{found.driver}.1" if found.driver else driver
    gpu = Gpu(index=0, name="card", memory=8 << 30, driver=after, capability=capability)
    installed = build.model_copy(
        update={"cuda": found.requirements.cuda, "architectures": found.requirements.architectures}
    )
    assert fit(gpu, installed).verdict == "ok"


@pytest.mark.parametrize(
    ("gpus_here", "file"),
    [
        ((), NEW.file),
        ((card("GTX 1080"),), LEGACY.file),
        ((card("GTX 1080"), card("RTX 4090"), card("RTX 4090")), NEW.file),
        ((card("GTX 1080"), card("RTX 4090")), NEW.file),
        ((card("RTX 4090", capability=None),), NEW.file),
    ],
)
def test_a_machine_is_installed_from_the_file_that_serves_most_of_its_cards(
    gpus_here: tuple[Gpu, ...], file: str
) -> None:
    assert file_for(gpus_here) == file


# ---------------------------------------------------------------- one card


def test_a_card_that_is_too_old_is_told_the_legacy_file() -> None:
    assert fit(card("GTX 1080"), NEW_TORCH).words() == (
        "GPU 0 (GTX 1080) is sm_61; torch 2.14.1 has sm_75 and up: install requirements_legacy_gpu.txt"
    )


@pytest.mark.parametrize(
    ("name", "driver", "build", "sentence", "fix"),
    [
        (
            "RTX 5090",
            "580.1",
            LEGACY_TORCH,
            "is sm_120; torch 2.7.1 has sm_50 to sm_90",
            "install requirements_new_gpu.txt",
        ),
        (
            "RTX 5090",
            "570.1",
            LEGACY_TORCH,
            "sm_120",
            "upgrade the NVIDIA driver to 580 or newer, then install requirements_new_gpu.txt",
        ),
        ("GTX 680", "470.1", LEGACY_TORCH, "is sm_30", "train on the CPU (--device cpu), or put another card in"),
        (
            "of a year to come",
            "700.1",
            NEW_TORCH,
            "is sm_140; torch 2.14.1 has sm_75 and up",
            "install a newer torch: pip install --upgrade -r requirements_new_gpu.txt",
        ),
        (
            "RTX 3090",
            "535.183.01",
            NEW_TORCH,
            "driver 535.183.01 of GPU 0 (RTX 3090) is too old: torch 2.14.1 is built for CUDA 13.0, which needs",
            "upgrade the NVIDIA driver to 580 or newer; without the right to, install requirements_legacy_gpu.txt",
        ),
        ("RTX 3090", "450.1", NEW_TORCH, "too old", "upgrade the NVIDIA driver to 580 or newer"),
        (
            "GTX 1080",
            "580.1",
            NEW_TORCH.model_copy(update=BLIND),
            "is sm_61; torch 2.14.1 has CUDA 13.0, which builds for sm_75 and up",
            "install requirements_legacy_gpu.txt",
        ),
        (
            "GTX 1080",
            "470.1",
            LEGACY_TORCH.model_copy(update=BLIND),
            "too old",
            "upgrade the NVIDIA driver to 580, the last that knows this card",
        ),
        (
            "GTX 1080",
            "470.1",
            NEW_TORCH,
            "is sm_61",
            "upgrade the NVIDIA driver to 580, the last that knows this card, then install requirements_legacy_gpu.txt",
        ),
        ("GTX 680", "440.1", LEGACY_TORCH.model_copy(update={**BLIND, "cuda": "11.8"}), "is sm_30", "train on the CPU"),
        (
            "RTX 4090",
            "580.1",
            CPU_TORCH,
            "torch 2.14.1+cpu is built without CUDA",
            "pip uninstall -y torch torchvision, then install requirements_new_gpu.txt",
        ),
        (
            "GTX 1080",
            "580.1",
            NEW_TORCH.model_copy(update={"architectures": ("sm_90a",)}),
            "kernels for sm_90a alone",
            "install requirements_legacy_gpu.txt",
        ),
        (
            "GTX 680",
            "440.1",
            NEW_TORCH.model_copy(update={"architectures": ("sm_30",), "cuda": "12.6"}),
            "too old",
            "upgrade the NVIDIA driver to 580, the last that knows this card",
        ),
    ],
)
def test_what_does_not_fit_is_said_with_the_values_and_what_to_do(
    name: str, driver: str, build: TorchBuild, sentence: str, fix: str
) -> None:
    found = fit(card(name, driver), build)

    assert (found.verdict, found.lasting) == ("failure", True)
    assert sentence in found.sentence
    assert found.fix.startswith(fix)


def test_a_cpu_build_beside_a_card_of_unknown_capability_names_both_files() -> None:
    found = fit(card("RTX 4090", capability=None), CPU_TORCH)
    assert found.fix == "install requirements_new_gpu.txt or requirements_legacy_gpu.txt"


def test_a_driver_that_does_not_tell_the_capability_leaves_it_to_the_kernel() -> None:
    found = fit(card("RTX 4090", capability=None), NEW_TORCH)
    assert (found.verdict, found.fix) == ("warning", "upgrade the NVIDIA driver")


def test_memory_errors_are_a_failure_that_a_reset_may_end() -> None:
    found = fit(card("A100", ecc_uncorrected=2), NEW_TORCH)

    assert (found.code, found.lasting) == ("ecc", False)
    assert "GPU 0 (A100) had 2 uncorrected memory errors (ECC)" in found.sentence
    assert "nvidia-smi --gpu-reset -i 0" in found.fix
    assert " 1 uncorrected memory error (" in fit(card("A100", ecc_uncorrected=1), NEW_TORCH).sentence


def test_a_card_whose_memory_others_use_is_full() -> None:
    found = fit(card("GTX 1080", free=100 << 20), LEGACY_TORCH)

    assert (found.code, found.lasting) == ("gpu_full", False)
    assert found.sentence == "GPU 0 (GTX 1080) is full: 0.1 GB of 8.6 GB are free"


@pytest.mark.parametrize("more", [{"free": None}, {"free": 0, "memory": 0}])
def test_memory_that_is_not_known_is_no_failure(more: dict[str, object]) -> None:
    assert fit(card("GTX 1080", **more), LEGACY_TORCH).verdict == "ok"


def test_a_card_that_fits_is_described() -> None:
    assert fit(card("RTX 4090"), NEW_TORCH).sentence == (
        "GPU 0 (RTX 4090): sm_89, driver 580.65.06, 7.5 GB of 8.6 GB free, fits torch 2.14.1 (CUDA 13.0)"
    )


@given(gpus, builds)
def test_a_verdict_always_has_a_sentence_and_a_failure_a_way_out(gpu: Gpu, build: TorchBuild) -> None:
    found = fit(gpu, build)

    assert found.sentence
    assert "\n" not in found.words()
    assert bool(found.fix) == (found.verdict != "ok")
    assert bool(found.code) == (found.verdict == "failure")


@given(gpus, builds)
def test_a_card_without_code_never_passes(gpu: Gpu, build: TorchBuild) -> None:
    if gpu.capability is not None and build.architectures and not has_code(gpu.capability, build.architectures):
        assert fit(gpu, build).verdict == "failure"


# ---------------------------------------------------------------- no card


@pytest.mark.parametrize(
    ("missing", "verdict", "fix"),
    [
        ("no_library", "warning", "nvidia-ml-py"),
        ("no_driver", "ok", ""),
        ("not_loaded", "failure", "modprobe nvidia"),
        ("no_answer", "failure", "restart the machine"),
        ("no_device", "failure", "driver 580 is the last"),
        ("", "failure", "lspci"),
    ],
)
def test_no_card_is_a_failure_only_where_a_driver_speaks_of_one(missing: str, verdict: str, fix: str) -> None:
    found = absence(GpuInventory.model_validate({"missing": missing, "reason": "why"}))

    assert (found.verdict, found.sentence) == (verdict, "why")
    assert fix in found.fix
    assert absence(GpuInventory()).sentence == "no NVIDIA GPU is shown"


# ---------------------------------------------------------------- the whole box

OLD_AND_NEW = box(card("GTX 1080"), card("RTX 4090", index=1))
NO_CARD = GpuInventory(missing="no_driver", reason="no NVIDIA GPU is shown: its driver is not installed")


@pytest.mark.parametrize("asked", ["cuda", "cuda:0"])
def test_a_card_that_was_asked_for_and_does_not_fit_is_refused(asked: str) -> None:
    choice = pick(asked, box(card("GTX 1080")), NEW_TORCH, broke="no kernel image is available")

    assert choice.device is None
    assert "is sm_61; torch 2.14.1 has sm_75 and up" in choice.fit.sentence
    assert choice.fit.fix == "install requirements_legacy_gpu.txt"


def test_a_card_is_refused_though_a_kernel_ran_if_its_memory_fails() -> None:
    assert pick("cuda", box(card("A100", ecc_uncorrected=1)), NEW_TORCH).device is None


def test_where_another_card_fits_the_refusal_names_it() -> None:
    choice = pick("cuda", OLD_AND_NEW, NEW_TORCH, broke="no kernel image")

    assert choice.device is None
    assert choice.fit.fix == "--device cuda:1 (RTX 4090) fits; or install requirements_legacy_gpu.txt"
    assert pick("cuda:1", OLD_AND_NEW, NEW_TORCH) == Choice("cuda:1", Fit("ok", ""))


def test_left_to_choose_a_worker_takes_the_first_card_that_fits_and_says_why() -> None:
    choice = pick("auto", OLD_AND_NEW, NEW_TORCH.model_copy(update={"device": "cpu"}), broke="no kernel image")

    assert choice.device == "cuda:1"
    assert "GTX 1080) is sm_61" in choice.fit.sentence


def test_left_to_choose_it_passes_over_a_card_that_fails_though_a_kernel_ran() -> None:
    inventory = box(card("A100", ecc_uncorrected=1), card("A100", index=1))
    assert pick("auto", inventory, NEW_TORCH).device == "cuda:1"


@pytest.mark.parametrize(
    ("build", "broke", "said"),
    [
        (NEW_TORCH.model_copy(update={"device": "cpu"}), "no kernel image", "is sm_61"),
        (CPU_TORCH, None, "built without CUDA"),
        (NEW_TORCH.model_copy(update=BLIND), None, "does not see GPU 0"),
    ],
)
def test_where_no_card_can_be_used_it_takes_the_cpu_and_says_why(
    build: TorchBuild, broke: str | None, said: str
) -> None:
    one = card("RTX 4090") if said.startswith("does not") else card("GTX 1080")
    choice = pick("auto", box(one), build, broke)

    assert (choice.device, choice.fit.verdict) == ("cpu", "warning")
    assert said in choice.fit.sentence
    assert choice.fit.fix


def test_a_card_that_fits_and_runs_no_kernel_is_left_for_the_cpu_with_the_error() -> None:
    choice = pick("auto", box(card("RTX 4090")), NEW_TORCH.model_copy(update={"device": "cpu"}), "CUDA error: 999")
    assert (choice.device, choice.fit.sentence) == ("cpu", "CUDA error: 999")


def test_a_card_that_works_is_taken_without_a_word() -> None:
    assert pick("auto", box(card("RTX 4090")), NEW_TORCH) == Choice("cuda", Fit("ok", ""))
    assert pick("cuda", box(card("RTX 4090")), NEW_TORCH) == Choice("cuda", Fit("ok", ""))


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_a_card_of_unknown_capability_is_taken_with_a_warning(asked: str) -> None:
    choice = pick(asked, box(card("RTX 4090", capability=None)), NEW_TORCH)

    assert choice.device == "cuda"
    assert choice.fit.verdict == "warning"


def test_a_number_beyond_the_cards_is_refused_with_those_there_are() -> None:
    choice = pick("cuda:2", OLD_AND_NEW, NEW_TORCH, "invalid device ordinal")

    assert choice.device is None
    assert choice.fit.sentence == "there is no cuda:2: cuda:0 is GTX 1080, cuda:1 is RTX 4090"


def test_a_gpu_that_was_asked_for_where_there_is_none_is_refused() -> None:
    choice = pick("cuda", NO_CARD, CPU_TORCH, "Torch not compiled with CUDA enabled")

    assert choice.device is None
    assert choice.fit.sentence == NO_CARD.reason
    assert "--device cpu" in choice.fit.fix


def test_a_gpu_that_nvml_does_not_know_may_work() -> None:
    rocm = TorchBuild(version="2.14.1+rocm7.0", device="cuda", threads=8)

    assert pick("cuda", NO_CARD, rocm) == Choice("cuda", Fit("ok", ""))
    assert pick("auto", NO_CARD, rocm) == Choice("cuda", Fit("ok", ""))


def test_a_machine_without_gpus_trains_on_its_cpu_without_a_word() -> None:
    assert pick("auto", NO_CARD, CPU_TORCH) == Choice("cpu", Fit("ok", ""))
    assert pick("auto", NO_CARD, CPU_TORCH, "it broke") == Choice("cpu", Fit("warning", "it broke"))


def test_a_driver_that_is_broken_is_a_reason_to_speak_of_when_the_cpu_is_taken() -> None:
    broken = GpuInventory(missing="not_loaded", reason="its driver is installed and not loaded")
    choice = pick("auto", broken, NEW_TORCH.model_copy(update=BLIND))

    assert (choice.device, choice.fit.sentence) == ("cpu", broken.reason)


@pytest.mark.parametrize("asked", ["cpu", "mps", "xpu", "cuda:0,1"])
def test_other_devices_are_used_or_refused_by_whether_they_work(asked: str) -> None:
    assert pick(asked, OLD_AND_NEW, NEW_TORCH) == Choice(asked, Fit("ok", ""))
    refused = pick(asked, OLD_AND_NEW, NEW_TORCH, "it does not work")
    assert (refused.device, refused.fit.sentence) == (None, "it does not work")


def test_a_card_that_fits_and_runs_no_kernel_is_refused_with_the_error_when_asked_for() -> None:
    choice = pick("cuda", box(card("RTX 4090")), NEW_TORCH, "CUDA error: 999")
    assert (choice.device, choice.fit.code) == (None, "broken_device")


def test_where_it_cannot_be_told_which_card_is_meant_the_kernel_decides() -> None:
    unknown = {"CUDA_VISIBLE_DEVICES": "MIG-1234"}
    seen = visible(OLD_AND_NEW.gpus, unknown)

    assert seen is None
    assert choose("cuda", OLD_AND_NEW, NEW_TORCH, seen=seen).device == "cuda"
    assert choose("auto", OLD_AND_NEW, NEW_TORCH, seen=seen).device == "cuda"


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, [0, 1]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, [1, 0]),
        ({"CUDA_VISIBLE_DEVICES": " 1 "}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-11aa"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, []),  # more than one has that name
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1,0"}, []),
        ({"CUDA_VISIBLE_DEVICES": "1,1,0"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, [0]),
        ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, [0, 1]),
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, None),
    ],
)
def test_the_environment_says_which_cards_torch_counts(environment: dict[str, str], seen: list[int] | None) -> None:
    found = visible(OLD_AND_NEW.gpus, environment)
    assert (None if found is None else [gpu.index for gpu in found]) == seen


@given(
    st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:9"]),
    st.lists(gpus, max_size=3).map(tuple),
    builds,
    st.sampled_from(["cpu", "cuda"]),
    st.none() | st.just("it broke"),
)
def test_auto_always_finds_a_device_and_a_refusal_always_says_what_to_do(
    asked: str, here: tuple[Gpu, ...], build: TorchBuild, device: str, broke: str | None
) -> None:
    numbered = tuple(gpu.model_copy(update={"index": at}) for at, gpu in enumerate(here))
    choice = pick(asked, GpuInventory(gpus=numbered), build.model_copy(update={"device": device}), broke)

    if asked == "auto":
        assert choice.device is not None
    if choice.device is None:
        assert choice.fit.verdict == "failure"
        assert choice.fit.sentence
        assert choice.fit.fix
    named = re.fullmatch(r"cuda:(\d)", choice.device or "")
    if named and asked == "auto":
        assert fit(numbered[int(named[1])], build).verdict != "failure"

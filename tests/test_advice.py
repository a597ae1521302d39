"""What is advised, tried on what torch, Python and the system really say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.advice import BY_CODE, LOG_MARK, RULES, advise
from common.messages import GpuThen, Scene, TorchBuild

CARD = TorchBuild(
    version="2.11.0", device="cuda", cuda="13.0", threads=4, name="NVIDIA GeForce GTX 1080", capability=(6, 1)
)


def scene(*, torch: TorchBuild | None = CARD, processes: int | None = 1, driver: str = "580.65.06") -> Scene:
    gpu = GpuThen(index=0, name="NVIDIA GeForce GTX 1080", memory=8 << 30, free=1 << 30, processes=processes)
    return Scene(python="3.12.3", system="Linux-6.8-x86_64", torch=torch, driver=driver, gpus=(gpu,))


# (code, what was said, cause, words that the advice has)
SAID = [
    (
        "out_of_memory",
        (
            "out of memory in train() at batch_size 512: CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a "
            "total capacity of 7.92 GiB of which 1.02 GiB is free. Of the allocated memory 6.11 GiB is allocated"
        ),
        "cuda_out_of_memory",
        ("2.50 GiB more did not fit", "train.batch_size"),
    ),
    ("task_failed", "RuntimeError: CUDA error: out of memory", "cuda_out_of_memory", ("Lower train.batch_size",)),
    (
        "task_failed",
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you "
            "tried to allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "host_out_of_memory",
        ("own memory ran out",),
    ),
    ("task_failed", "MemoryError in dataset(): MemoryError (my_task.py, line 9)", "host_out_of_memory", ("dataset()",)),
    (
        "task_exited",
        "the task's process was killed by SIGKILL (the kernel's out-of-memory killer does that: see dmesg) in 'train'",
        "host_out_of_memory",
        ("dmesg", "--memory"),
    ),
    ("task_exited", "the task's process ended with exit code 137 in 'train'", "host_out_of_memory", ("own memory",)),
    (
        "task_failed",
        (
            "RuntimeError: DataLoader worker (pid 4242) is killed by signal: Bus error. It is possible that "
            "dataloader's "
            "workers are out of shared memory. Please try to raise your shared memory limit."
        ),
        "shared_memory",
        ("--shm-size",),
    ),
    (
        "task_failed",
        (
            "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device\nCUDA kernel "
            "errors might be asynchronously reported at some other API call"
        ),
        "no_kernel_image",
        ("lydian doctor",),
    ),
    (
        "task_failed",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "driver_too_old",
        ("upgrade the driver",),
    ),
    ("task_exited", "the task's process was killed by SIGILL in 'train'", "illegal_instruction", ("newer processor",)),
    (
        "task_failed",
        "CUDA error: device-side assert triggered",
        "class_out_of_range",
        ("A class or an index does not exist", "--device cpu"),
    ),
    ("task_failed", "IndexError: Target 10 is out of bounds.", "class_out_of_range", ("class 10 does not exist",)),
    ("task_failed", "IndexError: index out of range in self", "class_out_of_range", ("embedding",)),
    (
        "bad_task",
        "ModuleNotFoundError in my_task.py, line 3: No module named 'sklearn.datasets'",
        "missing_module",
        ("pip install scikit-learn in",),
    ),
    ("bad_task", "No module named 'einops'", "missing_module", ("pip install einops", "put its code into")),
    ("bad_task", "No module named 'common'", "missing_module", ("leave `import common` out",)),
    (
        "no_data",
        "FileNotFoundError in dataset(): [Errno 2] No such file or directory: '/srv/scans/train.npy' (my_task.py, 12)",
        "no_data",
        ("/srv/scans/train.npy is not on that machine", "--data NAME=PATH"),
    ),
    ("no_data", "Fashion-MNIST is not on this machine", "no_data", ("--data NAME=PATH",)),
    (
        "task_failed",
        "urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>",
        "no_network",
        ("--data NAME=PATH",),
    ),
    ("task_failed", "OSError: [Errno 28] No space left on device", "disk_full", ("Free space",)),
    (
        "task_failed",
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied (32x3072 and 784x128)",
        "shape_mismatch",
        ("got 32x3072", "takes 784 features"),
    ),
    (
        "task_failed",
        (
            "RuntimeError: Error(s) in loading state_dict for Net:\n\tsize mismatch for fc.weight: copying a "
            "param with "
            "shape torch.Size([2, 5]) from checkpoint, the shape in current model is torch.Size([2, 4])."
        ),
        "other_model",
        ("fc.weight",),
    ),
    (
        "bad_task",
        (
            "the model that the job begins with does not fit the one that model(config) builds: 'fc.weight' is float32 "
            "[5, 4], not float32 [2, 4]"
        ),
        "init_misfit",
        ("the [config] that the model was trained with", "strict=False"),
    ),
    (
        "task_failed",
        "RuntimeError: The size of tensor a (10) must match the size of tensor b (5) at non-singleton dimension 0",
        "shape_mismatch",
        ("10 and 5 elements",),
    ),
    (
        "task_failed",
        (
            "RuntimeError: Given groups=1, weight of size [8, 3, 3, 3], expected input[2, 1, 28, 28] to have 3 "
            "channels, "
            "but got 1 channels instead"
        ),
        "shape_mismatch",
        ("expects 3 channels and got 1",),
    ),
    (
        "task_failed",
        "ValueError: Expected input batch_size (64) to match target batch_size (32).",
        "shape_mismatch",
        ("64 rows for 32 labels",),
    ),
    (
        "task_failed",
        "RuntimeError: stack expects each tensor to be equal size, but got [3] at entry 0 and [4] at entry 1",
        "unequal_samples",
        ("crop, pad or resize",),
    ),
    (
        "task_failed",
        "RuntimeError: mat1 and mat2 must have the same dtype, but got Double and Float",
        "dtype_mismatch",
        ("x.float()",),
    ),
    (
        "task_failed",
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "two_devices",
        ("device=x.device",),
    ),
    ("task_failed", "ValueError: the loss is nan at step 12", "not_finite", ("Lower train.lr",)),
    ("not_finite", "the update of shard 2 has an infinite number in fc.weight", "not_finite", ("Lower train.lr",)),
    (
        "task_failed",
        "PermissionError: [Errno 13] Permission denied: '/srv/scans/train.npy'",
        "permission",
        ("may not read",),
    ),
    ("task_failed", "ZeroDivisionError in loss(): division by zero", "task_failed", ("traceback",)),
]


@pytest.mark.parametrize(("code", "sentence", "cause", "words"), SAID)
def test_a_usual_failure_is_named_and_told_what_to_do(
    code: str, sentence: str, cause: str, words: tuple[str, ...]
) -> None:
    advice = advise(code, sentence)
    assert advice.cause == cause
    assert [word for word in words if word not in advice.words] == []


def test_every_rule_is_tried_by_something_that_is_really_said() -> None:
    causes = {cause for _, _, cause, _ in SAID}
    assert {rule.cause for rule in RULES} <= causes


def test_a_card_without_kernels_is_told_which_requirements_have_them() -> None:
    said = "CUDA error: no kernel image is available for execution on the device"
    words = advise("task_failed", said, scene=scene()).words
    assert "torch 2.11.0 has no code for NVIDIA GeForce GTX 1080 (compute capability 6.1)" in words
    assert "requirements_legacy_gpu.txt" in words
    assert "lydian doctor" in advise("task_failed", said, scene=scene(torch=None)).words


def test_a_shared_gpu_is_told_of_before_the_batch_is_made_smaller() -> None:
    said = "CUDA out of memory. Tried to allocate 20.00 MiB."
    assert "GPU 0 was shared by 3 processes" in advise("out_of_memory", said, scene=scene(processes=3)).words
    assert "shared" not in advise("out_of_memory", said, scene=scene(processes=1)).words
    assert "shared" not in advise("out_of_memory", said, scene=scene(processes=None)).words


def test_what_an_earlier_attempt_left_in_the_log_gives_no_advice_on_a_failure_with_a_traceback() -> None:
    detail = f"Traceback …\nZeroDivisionError: division by zero\n{LOG_MARK}2 lines of child.log\nCUDA out of memory."
    assert advise("task_failed", "ZeroDivisionError in loss()", detail).cause == "task_failed"


def test_of_a_process_that_ended_without_a_word_the_end_of_the_log_is_read_and_not_its_beginning() -> None:
    log = f"{LOG_MARK}2 lines of child.log\nterminate called: CUDA error: device-side assert triggered"
    assert advise("task_exited", "the task's process was killed by SIGABRT in 'train'", log).cause == (
        "class_out_of_range"
    )
    old = f"{LOG_MARK}60 lines of child.log\nCUDA out of memory.\n" + "step\n" * 60
    assert advise("task_exited", "the task's process ended with exit code 3", old).cause == "task_exited"


@pytest.mark.parametrize("code", ["expired", "released", "superseded", "lost", "norm_outlier"])
def test_what_is_nobodys_fault_gets_no_advice(code: str) -> None:
    advice = advise(code, "gpu-box said goodbye: MemoryError")
    assert (advice.cause, advice.words) == ("", "")


@given(st.sampled_from(sorted(BY_CODE)), st.text(max_size=200), st.text(max_size=200))
def test_whatever_a_worker_says_there_is_advice_for_its_code(code: str, sentence: str, detail: str) -> None:
    assert advise(code, sentence, detail).words


def test_a_long_and_crafted_text_is_searched_from_its_end_alone() -> None:
    crafted = "unable to open " * 13_000
    assert advise("task_failed", "ValueError", crafted).cause == "task_failed"
    assert advise("task_failed", "ValueError", crafted + "CUDA out of memory").cause == "cuda_out_of_memory"

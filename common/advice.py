"""What usually does that, and what to do: the common ways in which training fails, told by their traces.

Pure. The rules are read in order and the first that fits speaks, so what is rarer and surer stands above. What is
searched is the sentence and the traceback; the end of the child's log only where it ended or hung without a word,
since there the log is all there is, and elsewhere it may hold what an earlier attempt said.

    code, sentence, detail, scene ──▶ advise ──▶ Advice(cause, words)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from common.fitness import remedy_words
from common.messages import Scene

LOG_MARK = "---- the last "  # a line of a detail that begins so parts the traceback from the end of the child's log
SEARCHED = (
    8_000  # characters of either that are searched, from their ends: what a worker sends may be long, and crafted
)
LOG_LINES = 30  # of that end: an older line is rarely of the same fault
WITHOUT_A_WORD = frozenset({"task_exited", "task_stalled", "worker_error"})

PACKAGES = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "PyYAML",
    "bs4": "beautifulsoup4",
    "dateutil": "python-dateutil",
}
"""Module -> the package that has it, where that is called otherwise."""
OURS = frozenset({"common", "worker", "server", "client"})


@dataclass(frozen=True)
class Advice:
    """What usually does that, as a word for scripts, and what to do, as a sentence or two. Both empty: not known."""

    cause: str = ""
    words: str = ""


@dataclass(frozen=True)
class _Rule:
    cause: str
    pattern: re.Pattern[str]
    words: Callable[[re.Match[str], Scene | None], str]


NOT_FINITE = (
    "The training diverged: numbers grew until they were infinite or none. Lower train.lr (by ten first), set "
    "train.clip = 1, warm up (train.warmup_steps); with precision = fp16 take bf16 or fp32; and look whether a sample "
    "has a NaN in it."
)
BY_CODE = {
    "not_finite": NOT_FINITE,
    "bad_task": "A task file defines model(config) and dataset(config, split); a script has its loop; see examples/.",
    "task_failed": "Mend the task file where the traceback's last line in it points.",
    "task_exited": "The last lines that the task wrote are in the detail; exit() and os._exit() in a task do that too.",
    "task_stalled": "The stacks of all its threads are in the detail; a loader or a download may hang.",
    "out_of_memory": "Lower train.batch_size (a script: its own), or use a smaller model or a larger machine.",
    "no_data": "Put the data on this machine and name its folder: `lydian work --data NAME=PATH`.",
    "missing_package": "Install it in the environment that `lydian work` runs in, and start the worker again.",
    "not_trusted": "The worker's owner decides: `lydian work --trust listed|any`, or add the file's digest.",
    "unknown_task": "Upgrade that worker, or send the task as a file: --task FILE.py.",
    "disk_full": "Free space where that worker keeps its state (--state-dir).",
    "worker_error": "Look into the worker's log; `lydian doctor` checks that machine.",
}
"""Code -> what to do where no rule knows more. Codes that need nothing (expired, released) are not here."""


def advise(code: str, sentence: str, detail: str = "", scene: Scene | None = None) -> Advice:
    """What to do about an attempt that ended without a result.

    Args:
        code: of messages.Abandon, or of an update that was refused.
        sentence: what happened.
        detail: traceback, then the end of the child's log.
        scene: the machine then; without it the advice is less exact.
    """
    trace, _, log = detail.partition(LOG_MARK)
    said = f"{sentence}\n{trace[-SEARCHED:]}"
    if code in WITHOUT_A_WORD:
        said += "\n".join(log[-SEARCHED:].splitlines()[-LOG_LINES:])
    if code in BY_CODE:
        for rule in RULES:
            if (found := rule.pattern.search(said)) is not None:
                return Advice(rule.cause, rule.words(found, scene))
    return Advice(code if code in BY_CODE else "", BY_CODE.get(code, ""))


# ---------------------------------------------------------------- memory


def _cuda_memory(found: re.Match[str], scene: Scene | None) -> str:
    wanted = f"{found['wanted']} more did not fit. " if found["wanted"] else ""
    others = [gpu for gpu in scene.gpus if (gpu.processes or 0) > 1] if scene else []
    shared = (
        f"GPU {others[0].index} was shared by {others[0].processes} processes: end the others, or begin again "
        "elsewhere. Else lower"
        if others
        else "Lower"
    )
    return (
        f"{wanted}{shared} train.batch_size (batch_size = auto finds what fits) or set train.precision = auto; "
        "a smaller model, or shorter samples, if one sample is too much."
    )


def _host_memory(_: re.Match[str], scene: Scene | None) -> str:  # noqa: ARG001 - all rules have one shape
    return (
        "The machine's own memory ran out, not the GPU's, and the system ended the process (dmesg or `journalctl -k` "
        "names it). Have dataset() read samples as they are asked for instead of all at once; fewer loader "
        "processes; a smaller batch. In a container raise its limit (--memory)."
    )


def _plain(words: str) -> Callable[[re.Match[str], Scene | None], str]:
    return lambda _found, _scene: words


# ---------------------------------------------------------------- the machine


def _no_kernel(_: re.Match[str], scene: Scene | None) -> str:
    """Which torch has code for the card, as `lydian doctor` says it."""
    build = scene.torch if scene else None
    if scene is None or build is None or build.capability is None:
        return (
            "This build of torch has no code for the card: `lydian doctor` on that machine says which requirements "
            "file has; --device cpu trains without the card."
        )
    capability = ".".join(map(str, build.capability))
    what = f"torch {build.version} has no code for {build.name or 'the card'} (compute capability {capability})"
    return f"{what}: {remedy_words(build.capability, scene.driver, build)}. --device cpu trains without the card."


def _missing_module(found: re.Match[str], _: Scene | None) -> str:
    module = found["module"].partition(".")[0]
    if module in OURS:
        return (
            f"A task file is plain PyTorch and runs without our packages: leave `import {module}` out, and put what "
            "it needs into the file itself."
        )
    package = PACKAGES.get(module, module)
    return (
        f"pip install {package} in the environment that `lydian work` runs in on that machine, and start the worker "
        "again; a file of your own beside the task file does not travel: put its code into the task file."
    )


def _missing_file(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"{found['path']} is not on that machine. Data travels by hand: copy it there, start the worker with "
        '--data NAME=PATH, and have dataset() read the folder that config["data"]["NAME"] names.'
    )


# ---------------------------------------------------------------- the model


def _factors(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"A layer got {found['left']} (batch x features), and its weight takes {found['right'].partition('x')[0]} "
        "features: give that layer as many inputs as the one before it has outputs; a picture is to be flattened "
        "first, and its size after the convolutions counts."
    )


def _parameter(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"The parameter {found['name']} has other sizes in the model that was sent than in model(config) on that "
        "machine: model(config) must build the same network everywhere, from the job's [config] alone."
    )


def _two_sizes(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"Two tensors that are combined have {found['a']} and {found['b']} elements in one dimension: print their "
        "shapes in the line of the task file that the traceback names; a missing unsqueeze() or flatten() does that."
    )


def _channels(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"A convolution expects {found['wanted']} channels and got {found['got']}: grey pictures have 1, colour "
        "pictures 3; set in_channels, or convert the samples in dataset()."
    )


def _batches(found: re.Match[str], _: Scene | None) -> str:
    return (
        f"The model answered {found['a']} rows for {found['b']} labels: a view() or reshape() in forward() mixes "
        "samples; flatten with x.flatten(1), which keeps the first dimension."
    )


def _class_number(found: re.Match[str], _: Scene | None) -> str:
    number = f"The class {found['number']} does" if found["number"] else "A class or an index does"
    return (
        f"{number} not exist in the model: its last layer needs one output a class, classes count from 0, and an "
        "embedding needs a row for each token. On a GPU, --device cpu shows the exact line."
    )


# ---------------------------------------------------------------- the rules


def _rule(cause: str, pattern: str, words: str | Callable[[re.Match[str], Scene | None], str]) -> _Rule:
    return _Rule(cause, re.compile(pattern), _plain(words) if isinstance(words, str) else words)


RULES: tuple[_Rule, ...] = (
    _rule(
        "cuda_out_of_memory",
        r"(?:CUDA|HIP|XPU|MPS(?: backend)?) (?:error: )?out of memory"
        r"(?:\. Tried to allocate (?P<wanted>[\d.]{1,12} \w{1,5}))?"
        r"|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation",
        _cuda_memory,
    ),
    _rule(
        "shared_memory",
        r"insufficient shared memory \(shm\)|[Bb]us error|SIGBUS|unable to (?:open|mmap) .{0,200}shared memory"
        r"|unable to write to file </torch_",
        "The loader's processes ran out of shared memory: in a container raise it (--shm-size=2g), or let the task "
        "load with num_workers = 0.",
    ),
    _rule(
        "host_out_of_memory",
        r"SIGKILL|exit ?code:? ?-9\b|exit code 137|DefaultCPUAllocator: can't allocate memory|not enough memory: you "
        r"tried to allocate|\bMemoryError\b|Cannot allocate memory",
        _host_memory,
    ),
    _rule(
        "no_kernel_image",
        r"no kernel image is available|is not compatible with the current PyTorch installation"
        r"|CUDA error: invalid device function",
        _no_kernel,
    ),
    _rule(
        "driver_too_old",
        r"CUDA driver version is insufficient|The NVIDIA driver on your system is too old",
        "The NVIDIA driver is older than the CUDA that torch was built for: upgrade the driver, or install the "
        "requirements file that `lydian doctor` names on that machine.",
    ),
    _rule(
        "illegal_instruction",
        r"SIGILL|[Ii]llegal instruction",
        "torch was built for a newer processor than that machine has: install a build of torch for it.",
    ),
    _rule(
        "init_misfit",
        r"the model that the job begins with does not fit",
        "Submit it with the task file and the [config] that the model was trained with. To begin with a part of it, "
        "load it in Python with load_state_dict(strict=False) into what model(config) builds, save that state_dict "
        "with safetensors, and give the file.",
    ),
    _rule(
        "class_out_of_range",
        r"device-side assert triggered|Target (?P<number>-?\d{1,12}) is out of bounds|index out of range in self",
        _class_number,
    ),
    _rule("missing_module", r"No module named '(?P<module>[^'\n]{1,100})'", _missing_module),
    _rule(
        "no_network",
        r"Temporary failure in name resolution|urlopen error|Max retries exceeded|Name or service not known"
        r"|Network is unreachable",
        "The task downloads, and that machine does not reach the place: put what it wants on the machine and start "
        "the worker with --data NAME=PATH.",
    ),
    _rule("no_data", r"No such file or directory: '(?P<path>[^'\n]{1,300})'", _missing_file),
    _rule("disk_full", r"No space left on device|Disk quota exceeded", BY_CODE["disk_full"]),
    _rule(
        "shape_mismatch",
        r"mat1 and mat2 shapes cannot be multiplied \((?P<left>\d{1,12}x\d{1,12}) and (?P<right>\d{1,12}x\d{1,12})\)",
        _factors,
    ),
    _rule("other_model", r"size mismatch for (?P<name>[\w.]{1,200}):", _parameter),
    _rule(
        "shape_mismatch",
        r"size of tensor a \((?P<a>\d{1,12})\) must match the size of tensor b \((?P<b>\d{1,12})\)",
        _two_sizes,
    ),
    _rule("shape_mismatch", r"to have (?P<wanted>\d{1,12}) channels, but got (?P<got>\d{1,12}) channels", _channels),
    _rule(
        "shape_mismatch",
        r"Expected input batch_size \((?P<a>\d{1,12})\) to match target batch_size \((?P<b>\d{1,12})\)",
        _batches,
    ),
    _rule(
        "unequal_samples",
        r"stack expects each tensor to be equal size",
        "Samples of one batch have unlike shapes: crop, pad or resize them to one shape in dataset().",
    ),
    _rule(
        "dtype_mismatch",
        r"expected scalar type \w{1,20} but found \w|must have the same dtype|expected target dtype to be"
        r"|Input type .{0,80} and (?:weight|bias) type .{0,80} should be the same",
        "Inputs and weights are of unlike types: have dataset() give float32 (x.float()) and whole-number labels "
        "(y.long()).",
    ),
    _rule(
        "two_devices",
        r"Expected all tensors to be on the same device",
        "A tensor that the model or the loss makes is on another device: make it with device=x.device, or register "
        "it as a buffer.",
    ),
    _rule(
        "not_finite",
        r"(?i)\bnot finite\b|\bnon-finite\b|returned nan values|loss (?:is|was|became) nan|contains? nans?\b",
        NOT_FINITE,
    ),
    _rule(
        "permission",
        r"Permission denied(?:: '(?P<path>[^'\n]{1,300})')?",
        "The user that the worker runs as may not read or write that: change the owner, or --data to a place that "
        "it may.",
    ),
)

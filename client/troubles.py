"""`lydian logs`: each trouble of a job, whole: what happened, what to do, on which machine, and the traceback.

Pure: entries in, lines out. What comes from a worker passes `shown` before a terminal sees it.
"""

from collections.abc import Iterator

from client import shown
from common.messages import GpuThen, LogEntry, Scene


def trouble_lines(entry: LogEntry) -> Iterator[str]:
    """The lines of one trouble; none of them can steer a terminal."""
    cause = f", {entry.cause}" if entry.cause and entry.cause != entry.code else ""
    head = f"{entry.at}  {entry.worker}  {entry.where}: {entry.sentence} ({entry.code}{cause})"
    yield shown.one_line(head)
    if entry.advice:
        yield shown.one_line(f"what to do: {entry.advice}")
    if entry.scene is not None:
        yield from (shown.one_line(line) for line in scene_lines(entry.scene))
    if entry.detail:
        yield shown.printable(entry.detail.rstrip())


def scene_lines(scene: Scene) -> Iterator[str]:
    """The machine then: a line of versions, and one for each GPU."""
    torch = scene.torch
    built = (
        f" for CUDA {torch.cuda}" if torch and torch.cuda else f" for ROCm {torch.rocm}" if torch and torch.rocm else ""
    )
    said = [f"Python {scene.python}", *([f"torch {torch.version}{built} on {torch.device}"] if torch else [])]
    yield ", ".join([*said, *([f"NVIDIA driver {scene.driver}"] if scene.driver else []), scene.system])
    yield from map(_gpu_line, scene.gpus)
    if scene.no_gpus and torch is not None and torch.cuda:  # of a CPU build nobody wonders
        yield f"no more of the GPUs: {scene.no_gpus}"


def _gpu_line(gpu: GpuThen) -> str:
    free = "" if gpu.free is None else f"{shown.size(gpu.free)} free of "
    parts = [f"GPU {gpu.index} {gpu.name}: {free}{shown.size(gpu.memory)}"]
    parts += [] if gpu.busy is None else [f"{gpu.busy:.0%} busy"]
    parts += [] if gpu.temperature is None else [f"{gpu.temperature:.0f} °C"]
    parts += [] if gpu.processes is None else [f"{gpu.processes} process{'' if gpu.processes == 1 else 'es'}"]
    return ", ".join(parts)

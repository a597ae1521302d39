"""The machine on which an attempt failed, in lines for people. Pure."""

from collections.abc import Callable, Iterator

from common.messages import GpuThen, Scene


def scene_lines(scene: Scene, size: Callable[[float], str]) -> Iterator[str]:
    """A line of versions, and one for each GPU.

    Args:
        scene: the machine then.
        size: bytes in words.
    """
    torch = scene.torch
    built = (
        f" for CUDA {torch.cuda}" if torch and torch.cuda else f" for ROCm {torch.rocm}" if torch and torch.rocm else ""
    )
    said = [f"Python {scene.python}", *([f"torch {torch.version}{built} on {torch.device}"] if torch else [])]
    yield ", ".join([*said, *([f"NVIDIA driver {scene.driver}"] if scene.driver else []), scene.system])
    yield from (_gpu_line(gpu, size) for gpu in scene.gpus)
    if scene.no_gpus and torch is not None and torch.cuda:  # of a CPU build nobody wonders
        yield f"no more of the GPUs: {scene.no_gpus}"


def _gpu_line(gpu: GpuThen, size: Callable[[float], str]) -> str:
    free = "" if gpu.free is None else f"{size(gpu.free)} free of "
    parts = [f"GPU {gpu.index} {gpu.name}: {free}{size(gpu.memory)}"]
    parts += [] if gpu.busy is None else [f"{gpu.busy:.0%} busy"]
    parts += [] if gpu.temperature is None else [f"{gpu.temperature:.0f} °C"]
    parts += [] if gpu.processes is None else [f"{gpu.processes} process{'' if gpu.processes == 1 else 'es'}"]
    return ", ".join(parts)

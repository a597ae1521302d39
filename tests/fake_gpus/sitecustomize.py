"""Loaded by every Python that starts with this folder on its path: makes torch, once it is loaded, another build.

It tells the cards of FAKE_GPUS, where their driver is new enough for it, and runs no kernel on any.
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"


def change(torch: object) -> None:
    """Make it the build that is played."""
    played, gpus = json.loads(os.environ["FAKE_TORCH"]), json.loads(os.environ["FAKE_GPUS"])["gpus"]
    torch.__version__ = played["version"]
    torch.version.cuda = played["cuda"]
    torch.cuda.is_available = lambda: played["sees"]
    torch.cuda.get_arch_list = lambda: played["architectures"] if played["sees"] else []
    torch.cuda.device_count = lambda: len(gpus) if played["sees"] else 0
    torch.cuda.get_device_name = lambda device=0: gpus[device]["name"]
    torch.cuda.get_device_capability = lambda device=0: tuple(gpus[device]["capability"])

    class NoKernels(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, function: object, types: object, args: tuple = (), kwargs: object = None
        ) -> object:
            if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
                raise RuntimeError(NO_KERNEL)
            return function(*args, **(kwargs or {}))

    NoKernels().__enter__()  # for the rest of the process


class PlayedTorch:
    """Finds torch where it is, and changes what it says of itself."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torch" or (spec := PathFinder.find_spec(name)) is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: object) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change
        return spec


if "FAKE_TORCH" in os.environ:
    sys.meta_path.insert(0, PlayedTorch)

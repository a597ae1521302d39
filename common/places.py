"""Where coordinators and workers keep their state unless they are told, and what a machine is called."""

import platform
import re
from pathlib import Path

import platformdirs


def coordinator_folder() -> Path:
    """The coordinator's state folder: under XDG_STATE_HOME."""
    return Path(platformdirs.user_state_dir("lydian")) / "coordinator"


def worker_folder(name: str) -> Path:
    """The state folder of the worker of this name, under XDG_STATE_HOME. The name is one that a folder can have."""
    return Path(platformdirs.user_state_dir("lydian")) / "workers" / name


def machine_name() -> str:
    """What a worker is called that was given no name: the host's, as far as it can be a worker's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node())[:63] or "worker"

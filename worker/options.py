"""What the owner of a worker decided: the flags of `lydian work`, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages import Trust


@dataclass(frozen=True)
class Options:
    """Set once, at the start."""

    name: str
    device: str = "auto"
    threads: int = 1
    data: Mapping[str, str] = field(default_factory=dict)  # name -> folder
    trust: Trust = "none"
    trusted: tuple[str, ...] = ()  # digests of task files
    stall_s: float = 600.0  # without a sign of life from the child
    join_token: str | None = None  # for the first time, and when the coordinator has forgotten this worker
    pin: str | None = None  # StableID of the coordinator's machine, from the join token
    checkpoint_every_s: float = 30.0  # 0: never
    grace_s: float = 60.0  # to finish what is under way after the first SIGTERM

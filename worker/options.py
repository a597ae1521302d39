"""What the owner of a worker decided: the flags of `lydian work`, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages import Trust
from common.pins import NOTHING, Pins
from worker.caging import Cage
from worker.manners import Rules
from worker.signers import Signers


@dataclass(frozen=True)
class Options:
    """Set once, at the start."""

    name: str
    device: str = "auto"  # or several of a kind, each with a process: cuda:all, cuda:0,1, cpu:2
    threads: int = 1
    data: Mapping[str, str] = field(default_factory=dict)  # name -> folder
    trust: Trust = "none"
    trusted: tuple[str, ...] = ()  # digests of task files
    signers: Signers = field(default_factory=Signers)  # whose signatures of task files count, with trust signed
    stall_s: float = 600.0  # without a sign of life from the child
    join_token: str | None = None  # for the first time, and when the coordinator has forgotten this worker
    pins: Pins = NOTHING  # what the coordinator must turn out to be
    insecure: bool = False  # plain HTTP to any address
    checkpoint_every_s: float = 30.0  # 0: never
    grace_s: float = 60.0  # to finish what is under way after the first SIGTERM
    rules: Rules = field(default_factory=Rules)  # when and how it may use this machine
    cage: Cage | None = None  # what a task file's code gets to see of this machine
    gpu_memory: float = 1.0  # the most of the device's memory that the child takes: a share up to 1, or bytes

"""Pictures of the dashboard for docs/images: `python -m tests.screenshots [FOLDER]`.

A coordinator with a past that is made up, so that the pictures show everything; the pages are the real ones.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from common.facts import Absent, Fact, HandedOut, StateChanged
from common.messages import Link, PrivacySpent, Progress, TailnetNode
from common.tailscale import Peer, TailscaleStatus, Whois
from server.paths import Verdict
from server.rounds import Task
from server.tailnet import Caller
from tests.dashboard_kit import House, accepted, begun, closing, machine, opening, trouble
from tests.rounds_kit import spec

CHROMIUM = "/usr/bin/chromium"
DOCS = Path(__file__).resolve().parent.parent / "docs" / "images"
FLEET = {
    "atelier": ("NVIDIA RTX 5090", 32 << 30, "2.14.1", Link(down=118e6, up=114e6, latency_s=0.0006)),
    "attic": ("NVIDIA GTX 1080 Ti", 11 << 30, "2.7.1", Link(down=11e6, up=5.5e6, latency_s=0.012)),
    "barn": ("Tesla P40", 24 << 30, "2.7.1", Link(down=58e6, up=40e6, latency_s=0.004)),
    "laptop": ("", 0, "2.14.1", Link(down=4.1e6, up=1.2e6, latency_s=0.083)),
    "studio": ("NVIDIA RTX 3090", 24 << 30, "2.14.1", Link(down=112e6, up=96e6, latency_s=0.0009)),
}
PATHS = {
    "atelier": ("direct", "100.64.0.11:41641"),
    "attic": ("direct", "100.64.0.12:41641"),
    "barn": ("direct", "100.64.0.13:41641"),
    "laptop": ("relay", "fra"),
    "studio": ("direct", "100.64.0.15:41641"),
}
GAUGES = {"attic": (9.4e9, 78.0, 231.0), "barn": (17.9e9, 66.0, 188.0), "laptop": (11.2e9, 61.0, None)}
SAID = "epoch 1 of 1\n{step} of 120 steps, loss 0.29, learning rate 0.05"
PACES = {"atelier": 0.16, "attic": 0.72, "barn": 0.5, "laptop": 1.05, "studio": 0.3}  # seconds of training in a round
TRACEBACK = """Traceback (most recent call last):
  File "task.py", line 41, in loss
    return F.cross_entropy(model(x), y)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 10.91 GiB of
which 812.00 MiB is free."""


def live(house: House) -> None:
    """A fleet at work, and four jobs: one under way, one finished, one failed, one that waits."""
    for name, (gpu, memory, torch, link) in FLEET.items():
        house.add(machine(name, gpu=gpu, memory=memory, torch=torch), link=link)
    ways(house)
    ended(house)
    house.happen("clothes-7c1e", begun(spec(task="fashion-mnist", name="clothes", rounds=40)))
    absent = Absent(worker="laptop", worker_name="laptop", shard=3, why="fell behind: its update was due 3 s before")
    for number in range(1, 18):
        loss = 2.1 * math.exp(-number / 4) + 0.21 + 0.03 * math.sin(number * 1.7)
        house.happen("clothes-7c1e", [opening(number, 5)])
        if number == 17:
            paced(house, number, loss)
        else:
            if number == 9:
                said = "the task ran out of memory on cuda: batches of 256 are too large here"
                house.happen("clothes-7c1e", [trouble(9, "atelier", said, TRACEBACK, "out_of_memory")])
            house.happen("clothes-7c1e", [*(accepted(number, at, w, loss) for at, w in enumerate(FLEET))])
        left = (absent,) if number == 12 else ()
        house.happen("clothes-7c1e", closing(number, 5, loss, 0.91 - 0.5 * math.exp(-number / 5), left))
    house.happen("clothes-7c1e", [opening(18, 5)])
    for at, name in enumerate(FLEET):
        house.happen("clothes-7c1e", [HandedOut(kind="train", round=18, shard=at, attempt=1, worker=name)])
    for at in (0, 4):
        house.happen("clothes-7c1e", [accepted(18, at, list(FLEET)[at], 0.22, seconds=0.1, took_s=0.15)])
    for at, (name, step) in enumerate({"attic": 31, "barn": 74, "laptop": 12}.items()):
        used, heat, power = GAUGES[name]
        done = Progress(
            doing="training", step=step, steps=120, samples=64 * step, samples_per_s=900 / (at + 1), loss=0.29,
            memory_used=int(used), temperature=heat, power=power,
        )  # fmt: skip
        house.works(name, "clothes-7c1e", Task("train", 18, list(FLEET).index(name)), done, SAID.format(step=step))
    house.do(lambda: setattr(house.coordinator.fleet.workers["studio"], "draining", True))


def ways(house: House) -> None:
    """Each worker calls over a tailnet that is made up as well."""
    peers = tuple(
        Peer(name, (), direct=via if kind == "direct" else "", relay=via if kind == "relay" else "", active=True)
        for name, (kind, via) in PATHS.items()
    )
    tailnet = house.coordinator.tailnet
    tailnet.status = TailscaleStatus("Running", stable_id="coordinator", peers=peers)
    for name in PATHS:
        node = TailnetNode(stable_id=name, name=f"{name}.example.ts.net", owner="team@example.org")
        tailnet.callers[name] = Caller(("100.64.0.9", 1), Whois(node), Verdict())


def paced(house: House, number: int, loss: float) -> None:
    """A round whose workers really take unlike times."""
    began, left = time.monotonic(), sorted(PACES, key=lambda name: PACES[name])
    for at, name in enumerate(FLEET):
        house.happen("clothes-7c1e", [HandedOut(kind="train", round=number, shard=at, attempt=1, worker=name)])
    for name in left:
        ends = PACES[name] + 0.25
        time.sleep(max(0.0, began + ends - time.monotonic()))
        update = accepted(number, list(FLEET).index(name), name, loss, seconds=PACES[name], took_s=ends)
        house.happen("clothes-7c1e", [update.model_copy(update={"bytes_up": 240_000})])


def ended(house: House) -> None:
    """Jobs that are over, and one that waits for more workers than there are."""
    private = spec(
        task="digits",
        name="private-digits",
        rounds=6,
        privacy={"level": "worker", "clip": 0.5, "noise": 1.1, "delta": 1e-5},
    )
    past: list[Fact] = begun(private, size=40_200, parameters=9_610)
    for number in range(1, 7):
        spent = PrivacySpent(level="worker", epsilon=1.9 + 0.4 * number, delta=1e-5, clip=0.5)
        past += [opening(number, 3), *(accepted(number, at, w, 1.2 / number) for at, w in enumerate(list(FLEET)[:3]))]
        past += closing(number, 3, 1.2 / number, 0.6 + 0.05 * number, privacy=spent)
    house.happen("private-digits-21aa", [*past, StateChanged(state="finished", reason="all 6 rounds are done")])
    failed = begun(spec(task="char-lm", name="letters", rounds=10))
    why = "round 1 failed 5 times on shard 0; the last: no text under /srv/text"
    house.happen("letters-90f2", [*failed, StateChanged(state="failed", reason=why)])


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder for a coordinator that is stopped before the folder goes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as held:
        yield Path(held)


@contextmanager
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def signed_in(started: Browser, house: House, path: str = "/", **context: object) -> Page:
    """A page for whoever holds the admin token."""
    opened = started.new_context(**context)  # type: ignore[arg-type]
    opened.add_init_script(f"sessionStorage.setItem('lydian.token', '{house.token}')")
    page = opened.new_page()
    page.goto(house.url + path)
    page.locator('#link[data-state="on"]').wait_for()
    page.locator("[aria-busy]").first.wait_for(state="detached") if page.locator("[aria-busy]").count() else None
    return page


def main(folder: Path) -> None:
    """Take all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = {"viewport": {"width": 1280, "height": 1000}}
    phone = {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2}
    with temporary() as folder_of_state, browser() as started:
        house = House(folder_of_state).open()
        live(house)
        signed_in(started, house, "/", **wide).screenshot(path=folder / "dashboard-overview.png")
        for scheme in ("light", "dark"):
            page = signed_in(
                started, house, "/jobs/clothes-7c1e", color_scheme=scheme, viewport={"width": 1280, "height": 1150}
            )
            page.locator(".uplot").first.wait_for()
            page.locator("#round-back").click()
            page.get_by_text("Round 17:").wait_for()
            page.wait_for_timeout(300)
            page.screenshot(path=folder / f"dashboard-job-{scheme}.png")
        page = signed_in(started, house, "/submit", **wide)
        page.screenshot(path=folder / "dashboard-submit.png")
        signed_in(started, house, "/", **phone).screenshot(path=folder / "dashboard-phone.png")
        house.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS)

"""What the dashboard costs with 500 workers and 10,000 rounds: `python -m tests.page_times`.

Prints, for each page, milliseconds from the navigation to a table that can be used, and what the coordinator spent:
processor time while one page was open and things happened, and memory before and after.
"""

import time

import psutil
from playwright.sync_api import Browser, Page

from tests.dashboard_kit import House, accepted, closing, machine, opening
from tests.screenshots import browser, temporary

WORKERS, ROUNDS, WATCHED_S, TRIES = 500, 10_000, 20, 5


def interactive(started: Browser, house: House, path: str, ready: str) -> tuple[float, Page]:
    """Milliseconds from the navigation until what `ready` selects can be seen, and the page."""
    context = started.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(f"sessionStorage.setItem('lydian.token', '{house.token}')")
    page = context.new_page()
    began = time.perf_counter()
    page.goto(house.url + path)
    page.locator(ready).first.wait_for()
    return 1e3 * (time.perf_counter() - began), page


def times(started: Browser, house: House, path: str, ready: str) -> str:
    """First visit, and the median of more."""
    first, *more = (_closed(*interactive(started, house, path, ready)) for _ in range(1 + TRIES))
    return f"first {first:.0f} ms, then {sorted(more)[TRIES // 2]:.0f} ms"


def _closed(took: float, page: Page) -> float:
    page.context.close()
    return took


def watched(started: Browser, house: House, path: str, ready: str) -> float:
    """Share of a core that the coordinator needs while one page is open and a round a second is closed."""
    _, page = interactive(started, house, path, ready)
    number = house.coordinator.jobs["long-1"].closed + 1
    began, spent = time.perf_counter(), house.do(time.thread_time)
    while (passed := time.perf_counter() - began) < WATCHED_S:
        house.happen(
            "long-1", [accepted(number, 0, "box-000", 0.05), *closing(number, 1, 0.05, 0.9), opening(number + 1, 1)]
        )
        number += 1
        page.wait_for_timeout(1000)
    share = (house.do(time.thread_time) - spent) / passed
    page.context.close()
    return share


def memory() -> float:
    """Of this process, in MB; the coordinator is a thread of it."""
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    """Measure and print."""
    with temporary() as folder, browser() as started:
        house = House(folder).open()
        house.add(*(machine(f"box-{at:03}", gpu="Tesla P40" if at % 5 == 0 else "") for at in range(WORKERS)))
        house.long_past("long-1", ROUNDS)
        before = memory()
        print(f"overview, {WORKERS} workers: {times(started, house, '/', '#fleet tbody tr')}")
        overview = memory()
        print(f"job page, {ROUNDS:,} rounds: {times(started, house, '/jobs/long-1', '#curves .uplot')}")
        after = memory()
        print(f"memory: {before:.0f} MB, after the overview {overview:.0f} MB, after the job page {after:.0f} MB")
        share = watched(started, house, "/", "#fleet tbody tr")
        print(f"coordinator with the overview open, a round a second: {100 * share:.1f} % of a core")
        share = watched(started, house, "/jobs/long-1", "#curves .uplot")
        print(f"coordinator with the job page open, a round a second: {100 * share:.1f} % of a core")
        house.close()


if __name__ == "__main__":
    main()

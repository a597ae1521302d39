"""The dashboard in a real browser: what a person sees, does, and is kept from.

Each page of a test is listened to: a violation of its content security policy, an error of a script, or a request to
another host fails the test that opened it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from common.facts import HandedOut, Initialised, StateChanged
from common.messages import ModelFacts, Progress
from server.rounds import Task
from tests.dashboard_kit import (
    House,
    accepted,
    begun,
    closing,
    machine,
    opening,
    trouble,
    whole_round,
)
from tests.rounds_kit import spec

AXE = Path(__file__).parent / "axe" / "axe.min.js"
JOB = "clothes-1"
MARKUP = "<img src=x onerror=window.bitten=1>"
expect.set_options(timeout=60_000)  # patience on a busy machine; nothing here asserts how long a thing takes

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser(needs_debian_package: Callable[[str | Path, str], Path]) -> Iterator[Browser]:
    program = needs_debian_package("/usr/bin/chromium", "chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Three workers, and a job with a past of three rounds and a fourth that is open."""
    running = House(tmp_path_factory.mktemp("house") / "state").open()
    running.add(machine("attic", gpu="NVIDIA GTX 1080 Ti", memory=11 << 30), machine("barn"), machine("cellar"))
    running.happen(JOB, begun(spec(name="clothes", rounds=9)))
    for number in (1, 2, 3):
        running.happen(JOB, whole_round(number, ["attic", "barn"], 1.0 / number, 0.2 * number))
    running.happen(JOB, [opening(4, 2), HandedOut(kind="train", round=4, shard=0, attempt=1, worker="attic")])
    gauges = {"memory_used": 9_500_000_000, "temperature": 71.0, "power": 182.0}
    progress = Progress(doing="training", step=3, steps=12, loss=0.31, **gauges)
    running.works("attic", JOB, Task("train", 4), progress, said=f"epoch 1: loss 0.31\n{MARKUP}")
    yield running
    running.close()


@pytest.fixture
def visit(browser: Browser, house: House) -> Iterator[Open]:
    """Opens pages as whoever holds the admin token, and looks at the end what they did that they must not."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def listen(page: Page, url: str) -> None:
        page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
        page.on("pageerror", lambda error: wrong.append(f"a script failed: {error}"))
        page.on(
            "request", lambda asked: None if asked.url.startswith((url, "blob:", "data:")) else wrong.append(asked.url)
        )

    def opened(path: str = "/", at: House | None = None, token: str | None = "", **options: object) -> Page:
        where = at or house
        options.setdefault("viewport", {"width": 1280, "height": 4000})  # what is out of sight is not renewed
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        listen(page, where.url)
        if token is not None:
            page.add_init_script(
                f"sessionStorage.getItem('lydian.token') ?? sessionStorage.setItem('lydian.token', '{where.token}')"
            )
        page.goto(where.url + path)
        if token is not None:
            expect(page.locator("#link")).to_have_attribute("data-state", "on")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def put_model(house: House, job: str, data: bytes) -> None:
    """A job whose first model is really there."""
    found = house.do(lambda: house.coordinator.blobs.put_bytes(data))
    facts = ModelFacts(parameters=5, train_samples=20, test_samples=0, bounds=(0, 10, 20))
    house.happen(
        job,
        [*begun(spec(rounds=3))[:2], Initialised(attempt=1, worker="a", digest=found, size=len(data), facts=facts)],
    )


# ---------------------------------------------------------------- coming in


def test_without_a_token_a_page_asks_for_one_and_asks_the_coordinator_for_nothing(visit: Open, house: House) -> None:
    asked: list[str] = []
    page = visit(token=None)
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    expect(page.locator("#fleet")).to_be_hidden()
    assert [url for url in asked if "/ui/" in url or "/v1/" in url] == []
    page.get_by_label("Token").fill("lyd_admin_000000000000_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#login-error")).to_contain_text("token")
    page.get_by_label("Token").fill(house.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#fleet")).to_contain_text("attic")
    assert page.evaluate("document.cookie + localStorage.getItem('lydian.token')") == "null"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert "attic" not in page.content()


# ---------------------------------------------------------------- looking


def test_the_overview_says_of_each_worker_and_job_what_it_does_and_what_it_waits_for(visit: Open) -> None:
    page = visit()
    row = page.locator("#fleet tr", has_text="attic")
    for words in (
        "working",
        "NVIDIA GTX 1080 Ti",
        "CUDA 13.0",
        "9.5 GB",
        "of 11.8 GB",
        "71 °C, 182 W",
        "step 3 of 12",
        "loss 0.310",
    ):
        expect(row).to_contain_text(words)
    expect(page.locator("#fleet tr", has_text="barn")).to_contain_text("waiting for work")
    job = page.locator(f"[id='row-{JOB}']")
    for words in ("clothes", "training", "3 of 9", "0.600", "awaiting shard"):
        expect(job).to_contain_text(words)


def test_what_happens_is_shown_without_a_reload(visit: Open, house: House) -> None:
    house.happen("moves-1", [*begun(spec(name="moves", rounds=5)), opening(1, 1)])
    page = visit("/jobs/moves-1")
    expect(page.locator("#head")).to_contain_text("0 of 5 rounds")
    house.happen("moves-1", [accepted(1, 0, "barn", 0.5), *closing(1, 1, 0.5, 0.75), opening(2, 1)])
    expect(page.locator("#head")).to_contain_text("1 of 5 rounds")
    expect(page.locator("#rounds")).to_contain_text("0.750")
    expect(page.locator("#curves .uplot")).to_have_count(2)
    expect(page.locator("#curves [aria-label*='accuracy 0.750']")).to_be_visible()
    expect(page.locator("#said")).to_have_text("moves: training, 1 of 5 rounds")
    house.happen("moves-1", [accepted(2, 0, "barn", 0.4), *closing(2, 1, 0.4, 0.8), opening(3, 1)])
    expect(page.locator("#curves [aria-label*='accuracy 0.800']")).to_be_visible()
    house.happen("moves-1", [trouble(3, "barn", "it hit a wall", "Traceback: wall.py, line 3")])
    expect(page.locator("#log")).to_contain_text("it hit a wall")
    page.locator("#log summary").click()
    house.happen("moves-1", [StateChanged(state="failed", reason="there are too many walls")])
    expect(page.locator("#log")).to_contain_text("too many walls")
    expect(page.locator("#log pre")).to_be_visible()  # what was unfolded stays so


def test_a_round_shows_who_did_what_and_a_contribution_is_what_is_in_the_model(visit: Open) -> None:
    page = visit(f"/jobs/{JOB}")
    page.locator("#round-back").click()
    expect(page.locator("#timeline")).to_contain_text("Round 3:")
    expect(page.locator("#timeline .timeline > li")).to_have_count(2)
    expect(page.locator("#timeline [aria-label^='barn: ']")).to_have_count(1)
    expect(page.locator("#timeline")).not_to_contain_text("under way")
    page.get_by_role("button", name="newest").click()
    expect(page.locator("#timeline [aria-label='attic: under way']")).to_have_count(1)
    expect(page.locator("#shares")).to_contain_text("300 samples in 3 updates")


def test_the_theme_is_changed_and_stays_changed(visit: Open) -> None:
    page = visit(f"/jobs/{JOB}", color_scheme="light")
    expect(page.locator(".uplot")).to_have_count(2)
    page.get_by_role("button", name="Change between light and dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator(".uplot")).to_have_count(2)
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


# ---------------------------------------------------------------- acting


def test_what_a_task_writes_is_shown_as_text_beside_the_job(visit: Open) -> None:
    page = visit(f"/jobs/{JOB}")
    expect(page.locator("#output pre")).to_contain_text("epoch 1: loss 0.31")
    expect(page.locator("#output pre")).to_contain_text(MARKUP)
    assert page.evaluate("window.bitten") is None


def test_a_token_that_may_not_press_a_button_is_told_so_before(visit: Open, house: House) -> None:
    tokens = house.coordinator.tokens
    watcher = house.do(lambda: tokens.issue("read", name="watcher"))
    sender = house.do(lambda: tokens.issue("submit", name="sender"))
    page = visit(token=None)
    page.evaluate(f"sessionStorage.setItem('lydian.token', '{watcher}')")
    page.reload()
    expect(page.locator("#fleet")).to_contain_text("takes a token of scope admin; this one has scope read")
    expect(page.get_by_role("button", name="Drain")).to_have_count(0)
    expect(page.locator(".title a.button")).to_be_hidden()
    page.goto(f"{house.url}/submit")
    expect(page.locator("#submit-job")).to_be_disabled()
    expect(page.locator("#submit-denied")).to_contain_text("takes a token of scope submit or admin")
    page.goto(f"{house.url}/jobs/{JOB}")
    expect(page.locator("#cancel-job")).to_be_disabled()
    expect(page.locator("#get-newest")).to_be_enabled()
    page.evaluate(f"sessionStorage.setItem('lydian.token', '{sender}')")
    page.reload()
    expect(page.locator("#pause-job")).to_be_disabled()
    expect(page.locator("#actions-note")).to_contain_text("was submitted with another token")
    page.goto(f"{house.url}/submit")
    expect(page.locator("#submit-job")).to_be_enabled()


def test_a_job_is_paused_resumed_and_cancelled_each_after_a_question(visit: Open, house: House) -> None:
    house.happen("acted-1", [*begun(spec(name="acted", rounds=5)), opening(1, 1)])
    page = visit("/jobs/acted-1")
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="No, go back").click()
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#head")).to_contain_text("paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#head .state")).to_contain_text("training")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#ask")).to_contain_text("acted-1")
    page.get_by_role("button", name="Yes").click()
    expect(page.locator("#head .state")).to_contain_text("cancelled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)


def test_a_worker_is_drained_and_resumed(visit: Open, house: House) -> None:
    house.do(lambda: house.coordinator.journal.worker_put("cellar", machine("cellar")))
    page = visit()
    row = page.locator("#fleet tr", has_text="cellar")
    row.get_by_role("button", name="Drain").click()
    expect(row).to_contain_text("draining")
    row.get_by_role("button", name="Resume").click()
    expect(row).to_contain_text("idle")


def test_an_order_that_is_refused_is_told_in_the_coordinators_words(visit: Open, house: House) -> None:
    page = visit()
    row = page.locator("#fleet tr", has_text="barn")
    row.get_by_role("button", name="Drain").click()  # it is in the fleet, and was never journalled
    expect(page.locator(".toast")).to_contain_text("there is no worker 'barn'")


def test_a_model_is_downloaded_and_of_a_large_one_the_command_is_shown(visit: Open, house: House) -> None:
    put_model(house, "kept-1", b"the model's bytes")
    page = visit("/jobs/kept-1")
    with page.expect_download() as coming:
        page.get_by_role("button", name="Download the model").click()
    assert coming.value.suggested_filename == "kept-1.safetensors"
    assert Path(coming.value.path()).read_bytes() == b"the model's bytes"
    house.happen("large-1", begun(spec(rounds=3), size=10**9))
    page = visit("/jobs/large-1")
    page.get_by_role("button", name="Download the model").click()
    expect(page.locator("#download-note")).to_contain_text("lydian pull large-1 -o large-1.safetensors")


# ---------------------------------------------------------------- submitting


def test_a_job_is_submitted_by_the_form_with_what_was_entered_and_nothing_else(visit: Open, house: House) -> None:
    page = visit("/submit")
    page.get_by_label("rounds", exact=True).fill("7")
    page.get_by_label("name", exact=True).first.fill("by-form")
    page.get_by_label("momentum", exact=True).fill("0.5")
    page.get_by_label("precision", exact=True).select_option("auto")
    page.locator("#section-data summary").click()
    page.get_by_label("shards", exact=True).fill("4")
    page.locator("#section-config summary").click()
    page.locator("#key-config").fill("width = 64\nnote = free text")
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/jobs/by-form-*")
    expect(page.locator("#head")).to_contain_text("by-form")
    (made,) = [job for job in house.coordinator.jobs.values() if job.spec.name == "by-form"]
    wanted = spec(
        task="digits", name="by-form", rounds=7, data={"shards": 4}, config={"width": 64, "note": "free text"},
        train={"local_epochs": 2, "batch_size": 16, "lr": 0.05, "momentum": 0.5, "precision": "auto"},
    )  # fmt: skip
    assert made.spec == wanted
    assert made.spec.model_fields_set == {"task", "name", "rounds", "train", "data", "config"}


def test_what_the_coordinator_refuses_is_said_at_its_field_and_the_corrected_job_is_one_job(
    visit: Open, house: House, tmp_path: Path
) -> None:
    task = tmp_path / "my-task.py"
    task.write_text("def model(config): ...\n")
    page = visit("/submit")
    page.get_by_label("your own file").check()
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("#key-task-error")).to_have_text("Choose a task file.")
    page.locator("#task-file").set_input_files(task)
    page.get_by_label("rounds", exact=True).fill("many")
    page.get_by_label("lr", exact=True).fill("-1")
    page.get_by_label("local_steps", exact=True).fill("4")
    page.get_by_label("local_seconds", exact=True).fill("9")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("#key-rounds-error")).to_contain_text("valid integer")
    expect(page.locator("#key-train-lr-error")).to_contain_text("greater than 0")
    expect(page.locator("#key-rounds")).to_be_focused()
    page.get_by_label("rounds", exact=True).fill("2")
    page.get_by_label("lr", exact=True).fill("0.2")
    page.get_by_role("button", name="Submit", exact=True).click()
    expect(page.locator("#key-train-error")).to_contain_text("local_steps and local_seconds are both set")
    page.get_by_label("local_seconds", exact=True).fill("")
    page.get_by_role("button", name="Submit", exact=True).click()
    page.wait_for_url("**/jobs/my-task-*")
    (made,) = [job for job in house.coordinator.jobs.values() if job.spec.task == "my-task"]
    assert made.task_digest is not None


# ---------------------------------------------------------------- what must not happen


def test_texts_of_workers_and_tasks_are_shown_and_never_run(visit: Open, house: House) -> None:
    bad = machine("mallory", gpu=MARKUP, memory=1 << 30, torch=MARKUP)
    house.add(bad)
    house.do(lambda: setattr(house.coordinator.fleet.workers["mallory"], "degraded", MARKUP))
    measured = [accepted(1, 0, "mallory", 0.5), *closing(1, 1, 0.5, 0.75)]
    closed = measured[2].model_copy(update={"metrics": {MARKUP: 0.5}, "warning": MARKUP})
    evaluated = measured[3].model_copy(update={"metrics": {MARKUP: 0.25}})
    house.happen("bitten-1", [*begun(spec(name="bitten", rounds=5, target_metric=MARKUP)), opening(1, 1)])
    house.happen("bitten-1", [*measured[:2], closed, evaluated, opening(2, 1)])
    house.happen("bitten-1", [trouble(2, "mallory", MARKUP, f"</pre>{MARKUP}")])
    page = visit()
    expect(page.locator("#fleet tr", has_text="mallory")).to_contain_text(MARKUP)
    page.goto(f"{house.url}/jobs/bitten-1")
    expect(page.locator("#log")).to_contain_text(MARKUP)
    expect(page.locator("#rounds")).to_contain_text(MARKUP)
    expect(page.locator("#curves .u-legend").last).to_contain_text(MARKUP)
    assert page.locator("main img").count() == 0
    assert page.evaluate("window.bitten") is None
    house.do(lambda: house.coordinator.fleet.workers.pop("mallory"))


def test_a_coordinator_that_comes_back_is_followed_on(visit: Open, tmp_path: Path) -> None:
    house = House(tmp_path / "state").open()
    page = visit(at=house)
    expect(page.locator("#jobs")).to_contain_text("No job yet")
    house.close()
    expect(page.locator("#link")).to_contain_text("away")
    house.open()
    expect(page.locator("#link")).to_have_text("live")
    house.happen("after-1", [*begun(spec(name="after", rounds=5)), opening(1, 1)])
    expect(page.locator("#jobs")).to_contain_text("after-1")
    house.close()


# ---------------------------------------------------------------- large


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """500 workers, and a job with 10,000 rounds behind it."""
    running = House(tmp_path_factory.mktemp("crowd") / "state").open()
    running.add(*(machine(f"box-{at:03}", gpu="Tesla P40" if at % 5 == 0 else "") for at in range(500)))
    running.long_past("long-1", 10_000)
    yield running
    running.close()


def test_500_workers_are_found_sorted_and_paged(visit: Open, crowd: House) -> None:
    page = visit(at=crowd)
    expect(page.locator("#fleet .sum")).to_contain_text("500 workers")
    expect(page.locator("#fleet tbody tr")).to_have_count(50)
    page.locator("#fleet-query-on").click()
    expect(page.locator("#fleet .pager")).to_contain_text("page 2 of 10")
    page.get_by_label("Find workers").fill("p40 box-49")
    expect(page.locator("#fleet tbody tr")).to_have_count(2)
    expect(page.locator("#fleet .sum")).to_contain_text("2 found")
    page.get_by_label("Find workers").fill("")
    page.get_by_role("button", name="Device").click()
    expect(page.locator("#fleet th[aria-sort]")).to_contain_text("Device")
    page.get_by_label("State", exact=True).select_option("gone")
    expect(page.locator("#fleet")).to_contain_text("No worker is gone")


def test_of_10_000_rounds_a_page_gets_a_thousand_points_and_then_only_what_is_new(visit: Open, crowd: House) -> None:
    answers: list[int] = []
    page = visit(token=None, at=crowd)
    page.add_init_script(f"sessionStorage.setItem('lydian.token', '{crowd.token}')")
    page.on(
        "response", lambda answer: answers.append(len(answer.json()["rounds"])) if "/series" in answer.url else None
    )
    page.goto(f"{crowd.url}/jobs/long-1")
    expect(page.locator("#curves .uplot")).to_have_count(2)
    expect(page.locator("#head")).to_contain_text("10,000 of 11,000 rounds")
    expect(page.locator("#rounds tbody tr")).to_have_count(30)
    new = [accepted(10_001, 0, "box-000", 0.05), *closing(10_001, 1, 0.05, 0.99), opening(10_002, 1)]
    crowd.happen("long-1", new)
    expect(page.locator("#curves [aria-label*='accuracy 0.990']")).to_be_visible()
    assert 500 <= answers[0] <= 1_010
    assert all(count <= 30 for count in answers[1:])


# ---------------------------------------------------------------- for everyone


def test_all_of_it_can_be_done_by_keyboard_alone(visit: Open, house: House) -> None:
    house.happen("keys-1", [*begun(spec(name="keys", rounds=5)), opening(1, 1)])
    page = visit(token=None)
    expect(page.get_by_label("Token")).to_be_focused()
    page.keyboard.type(house.token)
    page.keyboard.press("Enter")
    expect(page.locator("[id='to-keys-1']")).to_be_visible()
    tab_to(page, "to-keys-1")
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/keys-1")
    expect(page.locator("#cancel-job")).to_be_visible()
    tab_to(page, "cancel-job")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("#ask-no")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#ask")).to_be_hidden()
    expect(page.locator("#cancel-job")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#head .state")).to_contain_text("cancelled")


def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement?.id") == wanted:
            return
    raise AssertionError(f"Tab never comes to {wanted}")


@pytest.mark.parametrize("path", ["/", f"/jobs/{JOB}", "/submit"])
def test_a_page_fits_a_narrow_phone_and_axe_finds_no_fault_in_it(path: str, visit: Open) -> None:
    page = visit(path, viewport={"width": 320, "height": 640}, color_scheme="light")
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for scheme, width in (("light", 320), ("dark", 1280)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        page.set_viewport_size({"width": width, "height": 800})
        assert faults(page) == []


def settled(page: Page) -> None:
    """Every part is there."""
    expect(page.locator("[aria-busy]")).to_have_count(0)
    if page.locator("#curves").count():
        expect(page.locator(".uplot")).to_have_count(2)


def faults(page: Page) -> list[str]:
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in found["violations"] for node in one["nodes"]]

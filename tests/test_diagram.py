"""The picture in the docs is the machine's own."""

from pathlib import Path

from server.diagram import arrows, mermaid

ROOT = Path(__file__).parent.parent


def test_the_diagram_in_the_docs_is_what_the_machine_does() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    drawn = text.split("```mermaid\n")[1].split("\n```")[0]
    assert drawn == mermaid(), "run `python -m server.diagram` and put what it prints into docs/architecture.md"


def test_an_ended_job_never_changes_its_state() -> None:
    assert not [arrow for arrow in arrows() if arrow[0] in ("finished", "failed", "cancelled")]


def test_every_state_can_be_reached_and_every_running_job_can_be_cancelled() -> None:
    seen = arrows()
    states = {after for _, after, _ in seen} | {"queued"}
    assert states == {
        "queued", "initialising", "training", "aggregating", "evaluating", "paused", "finished", "failed", "cancelled",
    }  # fmt: skip
    running = states - {"finished", "failed", "cancelled"}
    assert {before for before, after, _ in seen if after == "cancelled"} == running

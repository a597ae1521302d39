"""Which parts of a job go together: the table in docs/algorithms.md is what the job's own checks say, pair by pair."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.messages import JobSpec

ROOT = Path(__file__).resolve().parent.parent

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "late = use": {"round": {"late": "use"}, "aggregation": {"update": "int8"}},
    "async": {"round": {"mode": "async"}},
    "fednova": {"aggregation": {"algorithm": "fednova"}},
    "fedadam": {"aggregation": {"algorithm": "fedadam"}},
    "int8": {"aggregation": {"update": "int8"}},
    "topk": {"aggregation": {"update": "topk"}},
    "norm_outlier": {"aggregation": {"norm_outlier": 10}},
    "multikrum": {"aggregation": {"robust": "multikrum"}},
    "proximal": {"train": {"proximal": 0.01}},
    "scaffold": {"train": {"drift": "scaffold"}, "data": {"shards": 10}},
    "personal": {"train": {"personal": ["head.*"]}},
    "trainable_only": {"train": {"trainable_only": True}},
    "privacy: worker": {"privacy": {"level": "worker", "clip": 1, "noise": 1, "delta": 1e-5}, "data": {"shards": 10}},
    "privacy: example": {"privacy": {"level": "example", "clip": 1, "noise": 1, "delta": 1e-5}},
    "secure": {"secure": {"enabled": True}},
}
"""Each with no more than it needs by itself, in a fleet of five."""

ALTERNATIVES = ({"fednova", "fedadam"}, {"int8", "topk"}, {"privacy: worker", "privacy: example"})
"""Values of one key."""
PAIRS = [pair for pair in combinations(PARTS, 2) if set(pair) not in ALTERNATIVES]


def why_not(*names: str) -> str:
    """Why a job with these parts is refused; empty: it is not."""
    document: dict[str, Any] = {"task": "digits", "round": {"min_workers": 5}}
    for name in names:
        for section, keys in PARTS[name].items():
            document[section] = {**document.get(section, {}), **keys}
    try:
        JobSpec.model_validate(document)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return ""


def table() -> str:
    """The table as the page has it."""
    lines = ["| | " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
    for row in PARTS:
        cells = [_cell(row, column) for column in PARTS]
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: str, column: str) -> str:
    if row == column or {row, column} in ALTERNATIVES:
        return ""
    return "–" if why_not(row, column) else "✓"


@pytest.mark.parametrize("name", PARTS)
def test_each_part_goes_by_itself(name: str) -> None:
    assert why_not(name) == ""


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_what_does_not_go_together_is_refused_in_a_sentence_whichever_is_set_first(one: str, other: str) -> None:
    why = why_not(one, other)
    assert bool(why) == bool(why_not(other, one)) or "late = use" in (one, other)  # which needs some encoding
    assert not why or len(why.removeprefix("Value error, ").split()) >= 8, why


def test_the_page_shows_every_pair_as_it_is() -> None:
    assert table() in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8"), f"\n{table()}"


if __name__ == "__main__":
    print(table())

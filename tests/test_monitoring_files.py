"""The dashboard for Grafana and the files for Prometheus name nothing that /metrics does not have."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import metrics
from server.metrics import _JOBS, _WORKERS

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
BOARD = json.loads((DEPLOY / "grafana/lydian.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
SCRAPE = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
OF_PROMETHEUS = {"instance", "job"}  # labels that it puts on everything itself
STATES = {"lydian_workers": set(_WORKERS), "lydian_jobs": set(_JOBS)}


def exposed() -> dict[str, set[str]]:
    """Metric -> its labels, as the code that answers /metrics has them."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in metrics() if line.startswith("| `")]
    return {name: {label for label in labels.split(", ") if label} for name, _, labels, _ in rows}


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that is asked."""
    for panel in BOARD["panels"]:
        yield from ((panel["title"], target["expr"]) for target in panel["targets"])
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)


def test_no_metric_has_a_label_that_prometheus_gives_itself() -> None:
    for name, labels in exposed().items():
        assert not labels & OF_PROMETHEUS, name


ASKED = [pytest.param(query, id=where) for where, query in queries()]
SELECTOR = re.compile(r"\b(up|lydian_\w+)(?:\{([^}]*)\})?")


@pytest.mark.parametrize("query", ASKED)
def test_a_query_names_metrics_labels_and_states_that_there_are(query: str) -> None:
    known = exposed() | {"up": set()}
    found = SELECTOR.findall(query)
    assert found
    for name, matchers in found:
        assert name in known
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
            assert label in known[name] | OF_PROMETHEUS
            if label == "state":
                assert set(value.split("|")) <= STATES[name]


@pytest.mark.parametrize("query", ASKED)
def test_a_query_is_promql(query: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="pip install promql-parser: a parser of PromQL, built in Rust")
    parser.parse(query.replace("$__rate_interval", "5m"))


def labels_of(query: str) -> set[str]:
    """The labels that a query's answer can have."""
    kept = re.search(r"by \(([^)]*)\)", query)
    if kept is not None:
        return set(re.split(r",\s*", kept[1]))
    return OF_PROMETHEUS.union(*(exposed().get(name, set()) for name, _ in SELECTOR.findall(query)))


def test_what_a_legend_or_a_sentence_shows_is_a_label_of_its_query() -> None:
    legends = [(t["legendFormat"], t["expr"]) for panel in BOARD["panels"] for t in panel["targets"]]
    said = [(text, rule["expr"]) for rule in RULES for text in rule["annotations"].values()]
    for text, query in (*legends, *said):
        shown = re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text)
        assert set(shown) <= labels_of(query), text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["do"].split()) >= 8
    assert rule["annotations"]["do"].endswith((".", "(docs/security.md lists the limits)."))
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_commands_that_an_alert_advises_are_there() -> None:
    from client.main import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    advised = {name for rule in RULES for name in re.findall(r"`lydian (\w+)", rule["annotations"]["do"])}
    assert advised
    assert advised <= known


def test_every_metric_is_on_the_dashboard_and_no_two_panels_lie_on_each_other() -> None:
    shown = {name for panel in BOARD["panels"] for t in panel["targets"] for name, _ in SELECTOR.findall(t["expr"])}
    assert set(exposed()) <= shown
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        assert panel["description"]
        taken |= cells


def test_prometheus_calls_the_coordinator_with_a_token_from_a_file_and_knows_the_rules() -> None:
    (job,) = SCRAPE["scrape_configs"]
    assert (job["job_name"], job["metrics_path"]) == ("lydian", "/metrics")
    assert "credentials_file" in job["authorization"]
    assert SCRAPE["rule_files"] == ["alerts.yml"]

"""What Prometheus is told: read off the coordinator's state when it asks, so that nothing has to be counted twice."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.messages import State
from server.certificates import Certificate
from server.coordinator import Coordinator
from server.fleet import standing

_WORKERS = ("idle", "working", "draining", "paused", "resting", "degraded", "set aside", "gone")
_JOBS: tuple[State, ...] = (
    "queued", "initialising", "training", "aggregating", "evaluating", "paused", "finished", "failed", "cancelled",
)  # fmt: skip

Family = GaugeMetricFamily | CounterMetricFamily


class StateCollector(Collector):
    """The present state as metric families."""

    def __init__(self, coordinator: Coordinator, certificate: Certificate | None) -> None:
        self._coordinator, self._certificate = coordinator, certificate

    def collect(self) -> Iterator[Family]:
        """Workers and jobs by state, and for each job its rounds and what they moved.

        No label is called `job` or `instance`: Prometheus puts those on everything itself, and renames ours.
        """
        coordinator, now = self._coordinator, self._coordinator.clock()
        fleet = coordinator.fleet
        workers: Counter[str] = Counter(standing(fleet, worker, now, str).state for worker in fleet.workers.values())
        yield _by_state("lydian_workers", "Workers by what they do.", {state: workers[state] for state in _WORKERS})
        jobs: Counter[str] = Counter(job.phase.state for job in coordinator.jobs.values())
        yield _by_state("lydian_jobs", "Jobs by state.", {state: jobs[state] for state in _JOBS})
        yield GaugeMetricFamily("lydian_leases", "Tasks that some worker holds.", value=len(fleet.leases))
        closed = CounterMetricFamily("lydian_rounds", "Rounds closed.", labels=["job_id"])
        value = GaugeMetricFamily("lydian_job_metric", "Newest evaluation of a job.", labels=["job_id", "metric"])
        for job in coordinator.jobs.values():
            closed.add_metric([job.id], job.closed)
            for name, number in job.metrics.items():
                value.add_metric([job.id, name], number)
        yield closed
        yield value
        refused = CounterMetricFamily("lydian_refusals", "Calls and more that a limit refused.", labels=["reason"])
        for reason, times in coordinator.quotas.refusals.counts.items():
            refused.add_metric([reason], times)
        yield refused
        if self._certificate is not None:
            yield GaugeMetricFamily(
                "lydian_certificate_not_after_seconds",
                "When the certificate of this coordinator ends, in seconds since 1970.",
                value=self._certificate.shown.ends.timestamp(),
            )


def _by_state(name: str, says: str, numbers: dict[str, int]) -> Family:
    family = GaugeMetricFamily(name, says, labels=["state"])
    for state, number in numbers.items():
        family.add_metric([state], number)
    return family


def exposition(coordinator: Coordinator, certificate: Certificate | None = None) -> bytes:
    """The text that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(StateCollector(coordinator, certificate))
    return generate_latest(registry)

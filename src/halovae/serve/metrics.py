"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halovae.serve.store import Job

_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "halovae_http_requests", "Requests.", ("method", "route", "status"), registry=self._registry
        )
        self.jobs = Counter("halovae_jobs", "Jobs that are over.", ("kind", "status"), registry=self._registry)
        self.restarts = Counter("halovae_group_restarts", "Groups of ranks that ended.", registry=self._registry)
        self._waited = Histogram(
            "halovae_job_wait_seconds", "From acceptance to beginning.", buckets=_BUCKETS, registry=self._registry
        )
        self._took = Histogram(
            "halovae_job_seconds", "From beginning to end.", ("kind",), buckets=_BUCKETS, registry=self._registry
        )
        self._stages = Counter(
            "halovae_stage_seconds", "Of the first rank, by stage.", ("stage",), registry=self._registry
        )

    def gauge(self, name: str, words: str, value: Callable[[], float]) -> None:
        """Count something that is known when it is asked for."""
        Gauge(name, words, registry=self._registry).set_function(value)

    def finished(self, job: Job) -> None:
        """A job is over."""
        self.jobs.labels(job.kind, job.status).inc()
        if job.started is not None and job.finished is not None:
            self._waited.observe(max(0.0, job.started - job.created))
            self._took.labels(job.kind).observe(max(0.0, job.finished - job.started))
        for stage, seconds in (job.result or {}).get("timings", {}).items():
            self._stages.labels(stage).inc(max(0.0, seconds))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

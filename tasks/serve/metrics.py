"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tasks.serve.job import Answer, Job

__all__ = ["Metrics"]

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.n_accepted = self.n_answered = 0
        by = ("model", "status")
        self._requests = Counter("adalink_requests", "requests by model (empty where refused) and status", by, registry=self.registry)
        self._seconds = Histogram("adalink_request_seconds", "from the queue to the end of the text", by[:1], buckets=SECONDS, registry=self.registry)
        self._waited = Histogram("adalink_queue_seconds", "from the queue to the batch", buckets=SECONDS, registry=self.registry)
        self._rows = Histogram("adalink_batch_rows", "requests in the running batch when some join it", buckets=ROWS, registry=self.registry)
        self._adapters = Histogram("adalink_batch_adapters", "different adapters in the running batch when some join it", buckets=ROWS, registry=self.registry)
        self._tokens = Counter("adalink_tokens", "tokens of prompts, of these known from before, and new ones", ("kind",), registry=self.registry)
        self.waiting = Gauge("adalink_waiting", "requests that wait for a batch", registry=self.registry)
        self.models = Gauge("adalink_adapters", "adapters that are served", registry=self.registry)

    def status(self, model: str, status: int) -> None:
        """Count a request that ended with a status."""
        self._requests.labels(model, str(status)).inc()

    def answer(self, model: str, answer: Answer) -> None:
        """Count an answer."""
        self.n_answered += 1
        self._seconds.labels(model).observe(answer.waited + answer.generated)
        self._waited.observe(answer.waited)
        self._tokens.labels("prompt").inc(answer.n_prompt)
        self._tokens.labels("known").inc(answer.n_known)
        self._tokens.labels("new").inc(answer.n_new)

    def batch(self, jobs: Sequence[Job]) -> None:
        """Count the running batch, with the jobs that join it now."""
        self._rows.observe(len(jobs))
        self._adapters.observe(len({job.ask.adapter for job in jobs}))

    def text(self) -> bytes:
        """All counts, in Prometheus' text format."""
        return generate_latest(self.registry)

"""Traces and metrics by OpenTelemetry, for those who turn them on (extra `telemetry`)."""

import weakref
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Final, Self, override

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider

from todo_db.calls import TRANSACTIONS, Call
from todo_db.database import Database
from todo_db.errors import NotFoundError

_SCOPE: Final = "todo_db"
# What the conventions advise for it, in seconds.
_DURATIONS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


def instrument(
    database: Database,
    *,
    namespace: str | None = None,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Trace and measure every call of a `Database` from now on. Do so once for each `Database`.

    Each call is a span of kind CLIENT by OpenTelemetry's conventions for database clients. It
    includes all tries of the call, and the time that it waits for a connection. Its parent is the
    current span of the caller.

    A transaction is a span of kind INTERNAL, because its time is the caller's too. It is the
    current span until its end, so that the calls in it, and whatever else the caller traces, are
    its children. Statements of an ORM session have no span of their own.

    Nothing that a user gave is in a span or a metric: no user id, value, statement, or message of
    an exception.

    Args:
        database: What is observed. It may be open.
        namespace: `db.namespace`, such as the name of the database. The package does not take it
            from the URL.
        tracer_provider: By default the global one.
        meter_provider: By default the global one.
    """
    attributes = {"db.system.name": "postgresql"}
    if namespace is not None:
        attributes["db.namespace"] = namespace
    telemetry = _Telemetry(attributes, tracer_provider, meter_provider)
    telemetry.watch(database)
    slow_seconds = database.settings.slow_call_seconds or inf
    database.observe(partial(_TracedCall, slow_seconds=slow_seconds, telemetry=telemetry))


class _Telemetry:
    """The tracer and the instruments of one `Database`."""

    def __init__(
        self,
        attributes: dict[str, str],
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        self.attributes: Final = attributes
        self.tracer: Final = trace.get_tracer(_SCOPE, tracer_provider=tracer_provider)
        self._meter = metrics.get_meter(_SCOPE, meter_provider=meter_provider)
        self.duration: Final = self._meter.create_histogram(
            "db.client.operation.duration",
            "s",
            "Duration of database client operations.",
            explicit_bucket_boundaries_advisory=_DURATIONS,
        )
        self.retries: Final = self._meter.create_counter(
            "todo_db.retries", "{retry}", "How often calls were run again."
        )
        self.round_trips: Final = self._meter.create_counter(
            "todo_db.round_trips", "{round_trip}", "Round trips of calls and transactions."
        )
        self.pool_wait: Final = self._meter.create_histogram(
            "todo_db.pool.wait_time",
            "s",
            "How long calls waited that did not get a connection at once.",
            explicit_bucket_boundaries_advisory=_DURATIONS,
        )

    def watch(self, database: Database) -> None:
        """Report the pool whenever metrics are collected, as long as there is the database."""
        found = weakref.ref(database)
        attributes = {"db.client.connection.pool.name": self.attributes.get("db.namespace", _SCOPE)}

        def in_use(_: CallbackOptions) -> Iterator[Observation]:
            if (alive := found()) is not None:
                used = {**attributes, "db.client.connection.state": "used"}
                yield Observation(alive.pool_status.in_use, used)

        def waiting(_: CallbackOptions) -> Iterator[Observation]:
            if (alive := found()) is not None:
                yield Observation(alive.pool_status.waiting, attributes)

        self._meter.create_observable_up_down_counter(
            "db.client.connection.count", [in_use], "{connection}", "Connections in use."
        )
        self._meter.create_observable_up_down_counter(
            "db.client.connection.pending_requests",
            [waiting],
            "{request}",
            "Callers that wait for a connection.",
        )


class _TracedCall(Call):
    """A call with a span, which is the current one while it runs."""

    __slots__ = ("_attributes", "_span", "_telemetry", "_token")

    def __init__(self, name: str, slow_seconds: float, telemetry: _Telemetry) -> None:
        super().__init__(name, slow_seconds)
        self._telemetry = telemetry
        self._attributes = telemetry.attributes | {"db.operation.name": name}

    @override
    def __enter__(self) -> Self:
        namespace = self._attributes.get("db.namespace")
        self._span = self._telemetry.tracer.start_span(
            self.name if namespace is None else f"{self.name} {namespace}",
            kind=SpanKind.INTERNAL if self.name in TRANSACTIONS else SpanKind.CLIENT,
            attributes=self._attributes,
        )
        self._token = context.attach(trace.set_span_in_context(self._span))
        return super().__enter__()

    @override
    def end(self, seconds: float, error: BaseException | None) -> None:
        super().end(seconds, error)
        context.detach(self._token)
        span, telemetry, attributes = self._span, self._telemetry, self._attributes
        failed = {} if error is None else {"error.type": type(error).__qualname__}
        span.set_attribute("todo_db.retries", self.retries)
        span.set_attribute("todo_db.round_trips", self.round_trips)
        span.set_attribute("todo_db.pool.wait_time", self.pool_wait_seconds)
        span.set_attributes(failed)
        # That there is no such row is an answer.
        if failed and not isinstance(error, NotFoundError):
            span.set_status(Status(StatusCode.ERROR))
        span.end()
        telemetry.retries.add(self.retries, attributes)
        telemetry.round_trips.add(self.round_trips, attributes)
        if self.pool_wait_seconds:
            telemetry.pool_wait.record(self.pool_wait_seconds, attributes)
        if self.name not in TRANSACTIONS:
            telemetry.duration.record(seconds, attributes | failed)

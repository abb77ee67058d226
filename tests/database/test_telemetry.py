"""Spans and metrics of a `Database` that is instrumented, on the real database."""

import asyncio
import gc
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import pytest
import pytest_asyncio
from driver import Connection
from locks import until_waiting
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from proxy import BEGIN, COMMIT, Fault, Proxy, until
from sqlalchemy import select, text

from todo_db import (
    Database,
    NewTask,
    OutcomeUnknownError,
    TaskNotFoundError,
    Transaction,
    UnavailableError,
)
from todo_db.embedded import LOGIN
from todo_db.telemetry import instrument

MARKER: Final = "hunter2"


class Telemetry:
    """Providers that keep what they get in memory."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers: Final = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters: Final = MeterProvider([self._reader], shutdown_on_exit=False)

    def instrument(self, database: Database, namespace: str | None = None) -> None:
        instrument(
            database,
            namespace=namespace,
            tracer_provider=self.tracers,
            meter_provider=self.meters,
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        (found,) = (span for span in self.spans if span.name == name)
        return found

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> dict[str, Any]:
        """Return the points of a metric by the name of the call."""
        points = self.metrics()[name].data.data_points
        return {point.attributes["db.operation.name"]: point for point in points}

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def login() -> str:
    """One is enough: `single_url` is for what one trip does in another way."""
    return LOGIN


@pytest_asyncio.fixture
async def telemetry() -> AsyncGenerator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


@pytest_asyncio.fixture
async def traced(db: Database, telemetry: Telemetry) -> Database:
    """A Database with alice and bob, open and instrumented."""
    telemetry.instrument(db)
    return db


@pytest_asyncio.fixture
async def proxied(database_through_proxy: Database, telemetry: Telemetry) -> Database:
    """The same through the proxy."""
    telemetry.instrument(database_through_proxy)
    return database_through_proxy


def attributes(span: ReadableSpan) -> Mapping[str, object]:
    return span.attributes or {}


class TestSpan:
    async def test_of_a_call(self, traced: Database, telemetry: Telemetry) -> None:
        await traced.tasks.create("alice", "Buy milk")
        (span,) = telemetry.spans
        assert (span.name, span.kind, span.parent) == ("tasks.create", SpanKind.CLIENT, None)
        assert span.status.status_code is StatusCode.UNSET
        assert span.instrumentation_scope is not None
        assert span.instrumentation_scope.name == "todo_db"
        assert attributes(span) == {
            "db.system.name": "postgresql",
            "db.operation.name": "tasks.create",
            "todo_db.retries": 0,
            "todo_db.round_trips": 3,
            "todo_db.pool.wait_time": 0.0,
        }

    async def test_in_one_trip(self, single_url: str, telemetry: Telemetry) -> None:
        database = Database.from_url(single_url)
        telemetry.instrument(database)
        async with database:
            await database.tasks.count("alice")
            await database.find_credential(session_token="none")  # noqa: S106
        assert [
            (span.name, attributes(span)["todo_db.round_trips"]) for span in telemetry.spans
        ] == [
            ("tasks.count", 1),
            ("find_credential", 1),
        ]

    async def test_has_the_namespace_that_was_given(
        self, db: Database, telemetry: Telemetry
    ) -> None:
        telemetry.instrument(db, "todo")
        await db.tasks.count("alice")
        (span,) = telemetry.spans
        assert span.name == "tasks.count todo"
        assert attributes(span)["db.namespace"] == "todo"
        (point,) = telemetry.metrics()["db.client.operation.duration"].data.data_points
        assert point.attributes["db.namespace"] == "todo"

    async def test_has_the_current_span_as_its_parent(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        with telemetry.tracers.get_tracer("application").start_as_current_span(
            "request"
        ) as request:
            await traced.tasks.count("alice")
            assert trace.get_current_span() is request
        span = telemetry.span("tasks.count")
        assert span.parent == request.get_span_context()
        assert span.context is not None
        assert span.context.trace_id == request.get_span_context().trace_id

    async def test_of_calls_at_the_same_time_are_siblings(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        with telemetry.tracers.get_tracer("application").start_as_current_span(
            "request"
        ) as request:
            await asyncio.gather(*(traced.tasks.count("alice") for _ in range(5)))
        parents = [span.parent for span in telemetry.spans if span.name == "tasks.count"]
        assert parents == [request.get_span_context()] * 5

    async def test_is_current_while_the_call_runs(self, traced: Database) -> None:
        async def work(tx: Transaction) -> str:
            await tx.tasks.count("alice")
            return str(getattr(trace.get_current_span(), "name", None))

        assert await traced.run("alice", work) == "run"
        assert trace.get_current_span() is trace.INVALID_SPAN

    async def test_of_a_missing_row_has_the_error_and_did_not_fail(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        with pytest.raises(TaskNotFoundError):
            await traced.tasks.get("alice", 1)
        (span,) = telemetry.spans
        assert attributes(span)["error.type"] == "TaskNotFoundError"
        assert span.status.status_code is StatusCode.UNSET
        assert list(span.events) == []

    async def test_includes_its_retries(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        proxy.break_at(b"count(*)", Fault.CUT_BEFORE, times=2)
        assert await proxied.tasks.count("alice") == 0
        (span,) = telemetry.spans
        assert attributes(span)["todo_db.retries"] == 2
        assert attributes(span)["todo_db.round_trips"] == 9
        assert "error.type" not in attributes(span)
        assert telemetry.points("todo_db.retries")["tasks.count"].value == 2

    async def test_of_an_unknown_outcome(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        with pytest.raises(OutcomeUnknownError):
            await proxied.tasks.create("alice", MARKER)
        (span,) = telemetry.spans
        assert attributes(span)["error.type"] == "OutcomeUnknownError"
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None

    async def test_of_a_cancelled_call(
        self, traced: Database, telemetry: Telemetry, owner: Connection
    ) -> None:
        task = await traced.tasks.create("alice", "Buy milk")
        async with owner.transaction():
            await owner.execute("SELECT FROM tasks FOR UPDATE")
            toggling = asyncio.create_task(traced.tasks.toggle("alice", task.id))
            await until_waiting(owner)
            toggling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await toggling
        span = telemetry.span("tasks.toggle")
        assert attributes(span)["error.type"] == "CancelledError"
        assert span.status.status_code is StatusCode.ERROR

    async def test_of_a_database_that_cannot_be_opened(
        self, proxy: Proxy, telemetry: Telemetry
    ) -> None:
        proxy.break_at(b"", Fault.CUT_BEFORE, times=999)
        database = Database.from_url(proxy.url, connect_retry_seconds=0.1)
        telemetry.instrument(database)
        with pytest.raises(UnavailableError):
            await database.tasks.count("alice")
        assert attributes(telemetry.span("tasks.count"))["error.type"] == "UnavailableError"

    async def test_slow_calls_are_still_logged(
        self, db: Database, url: str, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert (await db.users.get("alice")).id == "alice"
        for seconds, lines in ((0.000001, 1), (0, 0)):
            caplog.clear()
            async with Database.from_url(url, slow_call_seconds=seconds) as database:
                telemetry.instrument(database)
                await database.tasks.count("alice")
            assert len(caplog.records) == lines


class TestTransaction:
    async def test_is_a_span_with_its_calls_as_children(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        tracer = telemetry.tracers.get_tracer("application")
        with tracer.start_as_current_span("request") as request:
            async with traced.transaction("alice") as tx:
                await tx.tasks.create("alice", "Buy milk")
                with tracer.start_as_current_span("own") as own:
                    await tx.execute(select(text("1")))
                assert await tx.session().scalar(select(text("1"))) == 1
            assert trace.get_current_span() is request
        outer = telemetry.span("transaction")
        assert (outer.kind, outer.parent) == (SpanKind.INTERNAL, request.get_span_context())
        assert telemetry.span("tasks.create").parent == outer.context
        assert telemetry.span("own").parent == outer.context
        assert telemetry.span("execute").parent == own.get_span_context()
        trips = {span.name: attributes(span).get("todo_db.round_trips") for span in telemetry.spans}
        assert trips == {
            "transaction": 3,
            "tasks.create": 1,
            "execute": 1,
            "own": None,
            "request": None,
        }

    async def test_of_run_is_one_span_for_all_tries(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        async def work(tx: Transaction) -> int:
            return await tx.tasks.count("alice")

        proxy.break_at(b"count(*)", Fault.CUT_BEFORE)
        assert await proxied.run("alice", work) == 0
        run = telemetry.span("run")
        assert attributes(run)["todo_db.retries"] == 1
        counts = [span for span in telemetry.spans if span.name == "tasks.count"]
        assert [attributes(span).get("error.type") for span in counts] == ["UnavailableError", None]
        assert [span.parent for span in counts] == [run.context] * 2

    async def test_whose_begin_was_lost_and_sent_again_did_not_fail(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        proxy.break_at(BEGIN, Fault.CUT_BEFORE)
        async with proxied.transaction("alice") as tx:
            await tx.tasks.count("alice")
        assert not proxy.pending
        assert "error.type" not in attributes(telemetry.span("transaction"))

    async def test_has_only_the_class_of_an_error_of_the_caller(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        with pytest.raises(LookupError):
            async with traced.transaction("alice"):
                raise LookupError(MARKER)
        span = telemetry.span("transaction")
        assert attributes(span)["error.type"] == "LookupError"
        assert span.status.status_code is StatusCode.ERROR
        assert MARKER not in span.to_json()

    async def test_whose_outcome_is_unknown(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        with pytest.raises(OutcomeUnknownError):
            async with proxied.transaction("alice") as tx:
                await tx.tasks.create("alice", "Buy milk")
        assert attributes(telemetry.span("transaction"))["error.type"] == "OutcomeUnknownError"
        assert "error.type" not in attributes(telemetry.span("tasks.create"))


class TestMetrics:
    async def test_duration_of_calls_by_name_and_error(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        for _ in range(2):
            await traced.tasks.count("alice")
        with pytest.raises(TaskNotFoundError):
            await traced.tasks.get("alice", 1)
        metric = telemetry.metrics()["db.client.operation.duration"]
        assert metric.unit == "s"
        points = telemetry.points("db.client.operation.duration")
        assert (points["tasks.count"].count, points["tasks.get"].count) == (2, 1)
        assert 0 < points["tasks.count"].sum < 20
        bounds = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
        assert points["tasks.count"].explicit_bounds == bounds
        assert points["tasks.count"].attributes == {
            "db.system.name": "postgresql",
            "db.operation.name": "tasks.count",
        }
        assert points["tasks.get"].attributes["error.type"] == "TaskNotFoundError"

    async def test_duration_is_that_of_calls_and_not_of_the_caller(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        async with traced.transaction("alice") as tx:
            await tx.tasks.count("alice")
        assert set(telemetry.points("db.client.operation.duration")) == {"tasks.count"}

    async def test_round_trips_are_counted_once(
        self, traced: Database, telemetry: Telemetry
    ) -> None:
        await traced.tasks.count("alice")
        async with traced.transaction("alice") as tx:
            for _ in range(4):
                await tx.users.get("alice")
        points = telemetry.points("todo_db.round_trips")
        assert {name: point.value for name, point in points.items()} == {
            "tasks.count": 3,
            "transaction": 2,
            "users.get": 4,
        }

    async def test_wait_of_those_that_waited(self, proxied: Database, telemetry: Telemetry) -> None:
        async with proxied.transaction("alice"):
            counting = asyncio.create_task(proxied.tasks.count("alice"))
            await until(lambda: proxied._pool.status.waiting == 1)
            await asyncio.sleep(0.1)
            used = telemetry.metrics()
        await counting
        points = telemetry.points("todo_db.pool.wait_time")
        assert set(points) == {"tasks.count"}
        assert 0.05 < points["tasks.count"].sum < 10
        pool = {"db.client.connection.pool.name": "todo_db"}
        found = {
            name: [(point.attributes, point.value) for point in used[name].data.data_points]
            for name in ("db.client.connection.count", "db.client.connection.pending_requests")
        }
        assert found == {
            "db.client.connection.count": [(pool | {"db.client.connection.state": "used"}, 1)],
            "db.client.connection.pending_requests": [(pool, 1)],
        }

    async def test_of_the_pool_end_with_the_database(self, url: str, telemetry: Telemetry) -> None:
        telemetry.instrument(Database.from_url(url))
        gc.collect()
        assert telemetry.metrics() == {}


class TestSecrecy:
    async def test_nothing_of_a_user_is_in_a_span_or_a_metric(
        self, proxied: Database, telemetry: Telemetry, proxy: Proxy
    ) -> None:
        await proxied.users.create(MARKER, email=f"{MARKER}@example.org", name=MARKER)
        task = await proxied.tasks.create(MARKER, MARKER, description=MARKER)
        await proxied.tasks.create_many(MARKER, [NewTask(MARKER)], idempotency_key=MARKER)
        await proxied.tasks.list(MARKER, search=MARKER)
        await proxied.tasks.update(MARKER, task.id, title=f"{MARKER} 2")
        await proxied.find_credential(session_token=MARKER)
        with pytest.raises(TaskNotFoundError):
            await proxied.tasks.get("bob", task.id)
        with pytest.raises(LookupError):
            async with proxied.transaction(MARKER) as tx:
                await tx.execute(text("SELECT :value"), {"value": MARKER})
                raise LookupError(MARKER)
        proxy.break_at(COMMIT, Fault.CUT_AFTER)
        with pytest.raises(OutcomeUnknownError):
            await proxied.tasks.create(MARKER, MARKER)
        assert len(telemetry.spans) == 10
        shown = "".join(span.to_json() for span in telemetry.spans)
        shown += "".join(metric.to_json() for metric in telemetry.metrics().values())
        assert json.loads(telemetry.spans[0].to_json())["name"] == "users.create"
        assert MARKER not in shown
        assert MARKER.encode().hex() not in shown
        assert "SELECT" not in shown

    async def test_a_database_that_is_not_instrumented_has_no_span(
        self, db: Database, telemetry: Telemetry
    ) -> None:
        await db.tasks.count("alice")
        assert (telemetry.spans, telemetry.metrics()) == ([], {})

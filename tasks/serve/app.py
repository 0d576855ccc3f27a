"""The web application: the parts of a running server, its routes, errors in one shape, and the start and end of the generation thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from adalink import BASE_NAME
from adalink.attachment.inputs import Route
from adalink.errors import DataError
from adalink.tokens import AUTO
from multimodal.data.images.decode import ImageLimits
from multimodal.data.images.processes import Decoders, n_cores
from multimodal.generation.routing import Routing, RowFeatures
from multimodal.model import VisionLanguageModel
from tasks.serve.access import BodyGuard, Keys, OriginGuard, check_json
from tasks.serve.engine import Worker
from tasks.serve.errors import Refused
from tasks.serve.images import RemoteImages, Upload, Uploads
from tasks.serve.request import Card, Question, Reader, Served, Source, read_json
from tasks.serve.scheduler import Answer, Ask, Job, ServedImage
from tasks.serve.schema import ChatRequest, LoadRequest, Reply, event
from tasks.serve.settings import ServeSettings

__all__ = ["Metrics", "Service", "chat_routes", "file_routes", "make_app", "model_entry", "model_routes"]


# ----------------------------------------
# The application.


PAGE = Path(__file__).parent / "page"
# The page needs nothing from anywhere else; blob: is the image that was dropped on it.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


def make_app(service: Service) -> FastAPI:
    """The application of a service; its lifespan starts and ends the generation thread."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.in_thread(service.worker.stop)
        service.close()

    # No pages of documentation: they load scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="adalink", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyGuard, limits=service.settings.limits)
    app.add_middleware(OriginGuard, settings=service.settings)
    if origins := service.settings.access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST", "DELETE"], allow_headers=["*"], expose_headers=["Retry-After"])
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _answer_to_nobody)
    app.add_exception_handler(Exception, _failed)
    for routes in (chat_routes(service), file_routes(service), model_routes(service)):
        app.include_router(routes, dependencies=[Depends(service.keys)])
    _add_open_routes(app, service)
    return app


def _add_open_routes(app: FastAPI, service: Service) -> None:
    """What needs no key: the page, and whether the server works. How it works, and for whom, is behind the keys where there are keys."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "page.html", headers=PAGE_HEADERS)

    @app.get("/page.css", include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(PAGE / "page.css", headers=PAGE_HEADERS)

    @app.get("/page.js", include_in_schema=False)
    async def script() -> FileResponse:
        return FileResponse(PAGE / "page.js", media_type="text/javascript", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> JSONResponse:
        works = service.worker.is_alive
        content = {"status": "ok" if works else "the generation thread has ended", "waiting": len(service.worker.waiting.jobs)}
        return JSONResponse({**content, **({} if service.keys.keys else {"models": list(service.served.cards)})}, 200 if works else 503)

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(service.keys)])
    async def schema() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/metrics", dependencies=[Depends(service.keys)])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.content, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or method that is not there."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        known = request.app.openapi()["paths"].items()
        methods = {method.upper() for template, by_method in known if compile_path(template)[0].match(path) for method in by_method}
        allowed = ", ".join(sorted(methods)) or (error.headers or {}).get("Allow", "")
        refused = Refused(405, f"{request.method} is not for {path}: use {allowed}", field="method", code="wrong_method")
        return JSONResponse(refused.content, 405, {"Allow": allowed})
    refused = Refused(error.status_code, f"there is nothing at {path[:100]}: the API is at /v1", field="path", code="unknown_path")
    return JSONResponse(refused.content, refused.status, dict(error.headers or {}))


async def _answer_to_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed on this request; its log says why", code="internal_error").content, 500)


# ----------------------------------------
# POST /v1/chat/completions.


CLIENT_LEFT = 499  # as nginx has it; nobody reads it
SMALL = 65_536  # bytes: read at once; a larger body would hold up the event loop
FAILED = Refused(500, "the model failed on the batch of this request; the server's log says why", code="internal_error")


def chat_routes(service: Service) -> APIRouter:
    """The route that answers."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        try:
            return await _chat(service, request)
        except Refused as refused:
            service.metrics.status("", refused.status)
            raise

    return routes


async def _chat(service: Service, request: Request) -> Response:
    check_json(request.headers.get("content-type", "application/json"))  # many a small program gives none; a page cannot leave out its origin
    body = await request.body()
    with service.worker.waiting.arriving():
        asked = read_json(body, ChatRequest) if len(body) < SMALL else await service.in_thread(lambda: read_json(body, ChatRequest))
        with contextlib.ExitStack() as using:
            question, ask = await _read(service, asked, using, request.state.owner)
            job = Job(ask, streams=bool(asked.stream))
            service.worker.waiting.put(job)
    service.metrics.n_accepted += 1
    reply = Reply(asked.model, question.text, question.n_unread, question.system, ask.adapter.weights if isinstance(ask.adapter, Route) else None)
    if asked.stream:
        include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        events = _stream(service, job, reply, include_usage=include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    answer = await _end_of(job, request)
    if answer is None:
        service.metrics.status(asked.model, CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    if isinstance(answer, Exception):
        service.metrics.status(asked.model, 500)
        return JSONResponse(FAILED.content, 500)
    service.metrics.status(asked.model, 200)
    service.metrics.answer(asked.model, answer)
    return JSONResponse(reply.whole(answer))


async def _read(service: Service, asked: ChatRequest, using: contextlib.ExitStack, owner: str) -> tuple[Question, Ask]:
    """What a request asks, of the adapter that it names or that the router chooses, which stays until `using` ends. Raises Refused."""
    reader, card = service.reader, using.enter_context(service.served.using(asked.model))
    if service.model.routing is None or card.name != AUTO:
        question = await service.in_thread(lambda: reader.question(asked, card))
        images = await asyncio.gather(*(service.image(source) for source in question.sources))
        return question, await service.in_thread(lambda: reader.ask(question, images, owner))
    text, sources = await service.in_thread(lambda: reader.to_route(asked, card))
    images = await asyncio.gather(*(service.image(source) for source in sources))

    def read(route: Route | None) -> tuple[Question, Ask] | None:
        """Of the adapter of a route, which is not taken away; None where it is not known, and the images are to be encoded first."""
        if (found := route or reader.route(text, images)) is None:
            return None
        question = reader.question(asked, service.served.cards[_checked(service, found)])
        return question, reader.ask(question, images, owner, found)

    if (done := await service.in_thread(lambda: read(None))) is None:
        route = await asyncio.wrap_future(service.worker.route(text, images))
        done = await service.in_thread(lambda: read(route))
    assert done is not None
    return done


def _checked(service: Service, route: Route) -> Route:
    """The route. Raises Refused for that of a request like no example, where the router refuses such."""
    assert service.model.routing is not None
    try:
        return service.model.routing.checked(route, "the request")
    except DataError as error:
        raise Refused(400, str(error), field="messages", code="no_route") from None


async def _end_of(job: Job, request: Request) -> Answer | Exception | None:
    """The end of a job that does not stream; None where its client leaves first."""
    left, end = asyncio.ensure_future(_left(request)), asyncio.ensure_future(job.events.get())
    try:
        await asyncio.wait({left, end}, return_when=asyncio.FIRST_COMPLETED)
        if not end.done():
            return None
        answer = end.result()
        assert not isinstance(answer, str)
        return answer
    finally:
        job.cancelled = True  # changes nothing where it has ended
        left.cancel()
        end.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(service: Service, job: Job, reply: Reply, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: pieces of the text as they are written."""
    status = CLIENT_LEFT
    try:
        yield reply.piece({"role": "assistant", "content": ""})
        while isinstance(piece := await job.events.get(), str):
            yield reply.piece({"content": piece})
        status = 200 if isinstance(piece, Answer) else 500
        if isinstance(piece, Answer):
            service.metrics.answer(reply.model, piece)
            yield reply.end(piece, include_usage=include_usage)
        else:
            yield event(FAILED.content)
    finally:
        job.cancelled = True
        service.metrics.status(reply.model, status)


# ----------------------------------------
# /v1/files: images that are uploaded once and asked about often.


def file_routes(service: Service) -> APIRouter:
    """Routes that keep and forget images."""
    routes = APIRouter(prefix="/v1/files")

    @routes.post("")
    async def add(request: Request) -> dict[str, Any]:
        name, data = await _uploaded(request)
        with service.worker.waiting.arriving():
            await service.image(Source("file", data=data))  # what is no image is refused now, not when it is asked about
        upload = Upload(name, data)
        service.uploads.add(upload)
        return _entry(upload)

    @routes.get("/{file_id}")
    async def get(file_id: str) -> dict[str, Any]:
        return _entry(service.uploads.get(file_id, "file_id"))

    @routes.delete("/{file_id}")
    async def remove(file_id: str) -> dict[str, Any]:
        service.uploads.remove(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


async def _uploaded(request: Request) -> tuple[str, bytes]:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(400, "the upload is no multipart form: send one with a field `file`", field="content-type")
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise Refused(400, "the form has no field `file` with a file: add the image there", field="file", code="missing")
            return (file.filename or "")[:200], await file.read()
    except (MultiPartException, HTTPException) as error:
        detail = error.message if isinstance(error, MultiPartException) else error.detail
        raise Refused(400, f"the form cannot be read: {detail}", field="file") from None


def _entry(upload: Upload) -> dict[str, Any]:
    entry = {"id": upload.id, "object": "file", "bytes": len(upload.data), "created_at": upload.created, "filename": upload.name}
    return {**entry, "purpose": "vision", "status": "processed"}


# ----------------------------------------
# /v1/models: what is served, and, for operators, loading and unloading adapters.


def model_routes(service: Service) -> APIRouter:
    """Routes about adapters."""
    routes, admin = APIRouter(prefix="/v1/models"), [Depends(service.admin_keys)]
    root = service.settings.access.adapters_folder

    @routes.get("")
    async def everything() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry(card) for card in service.served.cards.values()]}

    @routes.get("/{name}")
    async def one(name: str) -> dict[str, Any]:
        with service.served.using(name) as card:
            return model_entry(card)

    @routes.post("", dependencies=admin, status_code=201)
    async def load(request: Request) -> dict[str, Any]:
        _check_may_change(root)
        check_json(request.headers.get("content-type", ""))
        asked = read_json(await request.body(), LoadRequest)
        return model_entry(await service.served.load(asked.id, _inside(root, asked.folder)))

    @routes.delete("/{name}", dependencies=admin)
    async def unload(name: str) -> dict[str, Any]:
        _check_may_change(root)
        await service.served.unload(name)
        return {"id": name, "object": "model", "deleted": True}

    return routes


def model_entry(card: Card) -> dict[str, Any]:
    """One entry of the list of models."""
    own = {"task": card.task, "asks": card.asks, "is_base": card.name == BASE_NAME, "prompt": card.encoder.template.prompt}
    return {"id": card.name, "object": "model", "created": card.created, "owned_by": "adalink", "adalink": own}


def _check_may_change(root: Path | None) -> None:
    if root is None:
        raise Refused(403, "adapters of this server stay as they are: its operator gave no --access.adapters_folder", code="not_allowed")


def _inside(root: Path | None, folder: str) -> Path:
    """The folder, inside the operator's. Raises Refused where it is outside, also through links, or not there."""
    assert root is not None
    path = (root.resolve() / folder).resolve() if "\0" not in folder else root
    if not path.is_relative_to(root.resolve()) or path == root.resolve() or not path.is_dir():
        raise Refused(400, f"folder is {folder[:100]!r}, which is no folder inside of the operator's: give its path there", field="folder")
    return path


# ----------------------------------------
# The parts of a running server, made once and used by every route.


Result = TypeVar("Result")
READERS = 2  # threads that read texts, numbers and base64, which nobody else waits for long
FETCHERS = 16  # threads that wait for images from elsewhere


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that routes need."""

    model: VisionLanguageModel
    settings: ServeSettings
    metrics: Metrics
    worker: Worker
    served: Served
    uploads: Uploads
    reader: Reader
    keys: Keys
    admin_keys: Keys
    decoders: Decoders
    readers: ThreadPoolExecutor
    image_readers: ThreadPoolExecutor  # one for each core: what they take off the others is memory for decoded images
    fetchers: ThreadPoolExecutor
    remote: RemoteImages

    @staticmethod
    def of(model: VisionLanguageModel, settings: ServeSettings) -> Service:
        """The parts for a model with the adapters that it has. Raises ConfigError for a file of keys that cannot be read."""
        metrics, limits, access = Metrics(), settings.limits, settings.access
        worker = Worker(model, settings.batching, limits, metrics.batch)
        decoders = Decoders(n_cores(), ImageLimits(max_bytes=limits.image_bytes, max_pixels=limits.pixels), limits.decode_seconds)
        served = Served(model, worker)
        metrics.waiting.set_function(lambda: len(worker.waiting.jobs))
        metrics.models.set_function(lambda: sum(name not in (BASE_NAME, AUTO) for name in served.cards))
        return Service(
            model=model,
            settings=settings,
            metrics=metrics,
            worker=worker,
            served=served,
            uploads=Uploads(limits.upload_bytes),
            reader=Reader(
                model, limits, settings.generation, served.prepare, features=worker.features.get, decode=decoders.decode,
                routing=None if model.routing is None else Routing(model.routing.router, RowFeatures(served.language, model.tower)),
            ),
            keys=Keys(access.api_keys),
            admin_keys=Keys(access.admin_keys or access.api_keys),
            decoders=decoders,
            readers=ThreadPoolExecutor(READERS, thread_name_prefix="reader"),
            image_readers=ThreadPoolExecutor(n_cores(), thread_name_prefix="image-reader"),
            fetchers=ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetcher"),
            remote=RemoteImages(access.image_hosts, limits.image_bytes),
        )

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """The result of something that would hold up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.readers, work)

    async def image(self, source: Source) -> ServedImage:
        """An image, fetched where it is elsewhere; one whose features are known is not decoded again. Raises Refused."""
        loop, field = asyncio.get_running_loop(), source.field
        if source.file_id is not None:
            data = self.uploads.get(source.file_id, field).data
        elif source.url is not None:
            url = source.url
            data = await loop.run_in_executor(self.fetchers, lambda: self.remote.fetch(url, field))
        else:
            data = source.data or b""
        image = await self.in_thread(lambda: self.reader.known(data))
        if image.features is not None:
            return image
        return await loop.run_in_executor(self.image_readers, lambda: self.reader.decoded(data, image.key, field))

    def close(self) -> None:
        """End the threads and processes that read."""
        for pool in (self.readers, self.image_readers, self.fetchers):
            pool.shutdown(cancel_futures=True)
        self.decoders.close()


# ----------------------------------------
# What a server counts, for Prometheus.


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

"""The web application: routes, errors in one shape, and the start and end of the generation thread."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import compile_path

from tasks.serve.chat_routes import chat_routes
from tasks.serve.file_routes import file_routes
from tasks.serve.guard import BodyGuard
from tasks.serve.model_routes import model_routes
from tasks.serve.origin import OriginGuard
from tasks.serve.refusal import Refused
from tasks.serve.service import Service

__all__ = ["make_app"]

PAGE = Path(__file__).parent / "page"
# The page needs nothing from anywhere else; blob: is the picture that was dropped on it.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
CLIENT_LEFT = 499  # as nginx has it; nobody reads it


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
    app.add_exception_handler(ClientDisconnect, _left)
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


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed on this request; its log says why", code="internal_error").content, 500)

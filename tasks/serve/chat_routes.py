"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tasks.serve.chat import ChatRequest, read_json
from tasks.serve.job import Answer, Job
from tasks.serve.origin import check_json
from tasks.serve.refusal import Refused
from tasks.serve.replies import Reply, event
from tasks.serve.service import Service

__all__ = ["chat_routes"]

CLIENT_LEFT = 499
NO_PLACE = "not read: the adapter's template has no place for instructions"
SMALL = 65_536  # bytes: read at once; a larger body would hold up the event loop
FAILED = Refused(500, "the model failed on the batch of this request; the server's log says why", code="internal_error")
logger = logging.getLogger(__name__)


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
        with service.served.using(asked.model) as card:
            ask, question, source = await service.in_thread(lambda: service.reader.ask(asked, card))
            if source is not None:
                ask = replace(ask, picture=await service.picture(source))
            job = Job(replace(ask, owner=request.state.owner), streams=bool(asked.stream))
            service.worker.waiting.put(job)
    service.metrics.n_accepted += 1
    reply = Reply(asked.model, question, len(asked.messages) - 1, NO_PLACE if asked.has_instructions else None)
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

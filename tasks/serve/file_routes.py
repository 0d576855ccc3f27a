"""/v1/files: pictures that are uploaded once and asked about often."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from tasks.serve.reading import Source
from tasks.serve.refusal import Refused
from tasks.serve.service import Service
from tasks.serve.uploads import Upload

__all__ = ["file_routes"]


def file_routes(service: Service) -> APIRouter:
    """Routes that keep and forget pictures."""
    routes = APIRouter(prefix="/v1/files")

    @routes.post("")
    async def add(request: Request) -> dict[str, Any]:
        name, data = await _uploaded(request)
        with service.worker.waiting.arriving():
            await service.picture(Source("file", data=data))  # what is no picture is refused now, not when it is asked about
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
                raise Refused(400, "the form has no field `file` with a file: add the picture there", field="file", code="missing")
            return (file.filename or "")[:200], await file.read()
    except (MultiPartException, HTTPException) as error:
        detail = error.message if isinstance(error, MultiPartException) else error.detail
        raise Refused(400, f"the form cannot be read: {detail}", field="file") from None


def _entry(upload: Upload) -> dict[str, Any]:
    entry = {"id": upload.id, "object": "file", "bytes": len(upload.data), "created_at": upload.created, "filename": upload.name}
    return {**entry, "purpose": "vision", "status": "processed"}

"""/v1/models: what is served, and, for operators, loading and unloading adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request

from tasks.serve.chat import LoadRequest, read_json
from tasks.serve.origin import check_json
from tasks.serve.refusal import Refused
from tasks.serve.replies import model_entry
from tasks.serve.service import Service

__all__ = ["model_routes"]


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

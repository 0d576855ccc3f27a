"""Pictures that were uploaded, in memory; the oldest make room for new ones."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from tasks.serve.refusal import Refused

__all__ = ["Upload", "Uploads"]


@dataclass(frozen=True)
class Upload:
    """One uploaded picture. Its id cannot be guessed, so only who uploaded it can ask about it."""

    name: str
    data: bytes
    id: str = field(default_factory=lambda: f"file-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


class Uploads:
    """Uploaded pictures by id, at most `most_bytes` of them. Used by the event loop alone."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._kept: OrderedDict[str, Upload] = OrderedDict()
        self._n_bytes = 0

    def add(self, upload: Upload) -> None:
        """Keep one more. Raises Refused where it is larger than all that may be kept."""
        if len(upload.data) > self.most_bytes:
            raise Refused(413, f"the picture has {len(upload.data)} bytes, and {self.most_bytes} are kept of all uploads together", field="file")
        self._kept[upload.id] = upload
        self._n_bytes += len(upload.data)
        while self._n_bytes > self.most_bytes:
            self._n_bytes -= len(self._kept.popitem(last=False)[1].data)

    def get(self, file_id: str, field: str) -> Upload:
        """The upload of an id. Raises Refused where it is not kept, or not any more."""
        if file_id not in self._kept:
            raise Refused(404, f"{field} is {file_id[:60]!r}, which is not kept (any more): upload the picture again", field=field, code="file_not_found")
        self._kept.move_to_end(file_id)
        return self._kept[file_id]

    def remove(self, file_id: str) -> None:
        """Forget one. Raises Refused where it is not kept."""
        self._n_bytes -= len(self.get(file_id, "file_id").data)
        del self._kept[file_id]

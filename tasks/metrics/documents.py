"""JSON files of references and results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from adalink.errors import DataError
from tasks.annotation_files import Rows

__all__ = ["read_document", "rows_of"]

Row = Mapping[str, object]


def read_document(path: Path) -> object:
    """What a JSON file holds.

    Raises DataError where it is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"the file {path} does not exist; check the path") from error
    except OSError as error:
        raise DataError(f"the file {path} cannot be read: {error.strerror}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 both
        raise DataError(f"{path} is not JSON: {error}; is it whole, and unpacked?") from error


def rows_of(path: Path, document: object, shape: str) -> Iterator[tuple[str, Row]]:
    """The rows of a document that is a list, each with its name for messages.

    shape  what a row looks like, for the message: `{"image_id": 42, "caption": "a dog"}`

    Raises DataError where the document is no list, is empty, or a row is no object.
    """
    if not isinstance(document, list):
        found = f"an object with {', '.join(map(repr, list(document)[:5]))}" if isinstance(document, dict) else repr(document)[:60]
        raise DataError(f"{path} holds {found}; expected a list of {shape}")
    if not document:
        raise DataError(f"{path} holds an empty list; expected at least one {shape}")
    return iter(Rows(str(path), document))

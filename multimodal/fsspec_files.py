"""Files wherever fsspec reads: s3://, gs://, hf:// and others, each with a package of its own."""

from __future__ import annotations

from typing import Any

from adalink.errors import ConfigError, DataError
from multimodal.remote import Passing, RemoteSettings, patiently, shown

__all__ = ["FsspecFiles"]

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


class FsspecFiles:
    """Reads URLs through fsspec, which keeps its own connections for each process."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings

    def size(self, url: str) -> int:
        """Bytes of a file."""
        return int(self._patiently(url, lambda files, path: files.size(path)))

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on."""

        def read(files: Any, path: str) -> bytes:
            data: bytes = files.cat_file(path, start=offset, end=offset + size)
            if len(data) != size:
                raise Passing(f"{len(data)} of {size} bytes came")
            return data

        found: bytes = self._patiently(url, read)
        return found

    def whole(self, url: str) -> bytes:
        """The whole file, of moderate size."""
        found: bytes = self._patiently(url, lambda files, path: files.cat_file(path))
        return found

    def _patiently(self, url: str, act: Any) -> Any:
        files, path = _opened(url)

        def once() -> Any:
            try:
                return act(files, path)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise DataError(f"{shown(url)} is not there; check the URL, or put the file there again") from error
            except PermissionError as error:
                raise DataError(f"{shown(url)} may not be read ({error}); are the credentials set as {_package(url)} wants them?") from error
            except OSError as error:
                raise Passing(f"{type(error).__name__} {error}".strip()) from error

        return patiently(once, url, self._settings)


def _opened(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{shown(url)} needs a package that is not here: pip install 'adalink[remote]'") from error
    if "::" in url:  # fsspec would unpack, or read one file by what another says
        raise ConfigError(f"{shown(url)} is a chain of URLs, which is not supported; give the URL of the folder of shards itself")
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{shown(url)} needs a package that is not here: pip install {_package(url)}") from error
    except ValueError as error:
        raise ConfigError(f"{shown(url)} is of a kind that is not known ({error}); give a folder, or an http, https, s3, gs or hf URL") from error
    return files, path


def _package(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    return _PACKAGES.get(scheme, f"the fsspec package for {scheme}")

"""Plain tar files of small members, byte for byte those of webdataset's TarWriter, at half its time: a header is a template and a sum."""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

__all__ = ["TarFile"]

_BLOCK = 512
_LARGEST = 8**11 - 1  # bytes; what the size field holds

_TEMPLATE = tarfile.TarInfo("")
_TEMPLATE.mode = 0o444
_TEMPLATE.uname = _TEMPLATE.gname = "bigdata"  # TarWriter's own
_HEADER = _TEMPLATE.tobuf(tarfile.USTAR_FORMAT)
# Name, size and sum differ between members: bytes 0..99, 124..135 and 148..155 (POSIX.1-1988).
_BEFORE_SIZE, _BEFORE_SUM, _REST = _HEADER[100:124], _HEADER[136:148], _HEADER[156:]
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_BEFORE_SUM) + sum(_REST) + 8 * ord(" ")


class TarFile:
    """A tar file that is written from start to end; `size` and `sha256` are those of what is written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.size = file, hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> int:
        """Writes a member and gives the offset of its data. name: ASCII, at most 99 letters."""
        offset = self.size + _BLOCK
        for piece in (_header(name, len(data)), data, bytes(-len(data) % _BLOCK)):  # joined they would be one more copy
            self._write(piece)
        return offset

    def end(self) -> None:
        """Writes the end mark: two blocks of zeros, and more up to a whole record."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))

    @property
    def sha256(self) -> str:
        """Of all bytes written so far."""
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._sha256.update(data)
        self.size += len(data)
        self._file.write(data)


def _header(name: str, size: int) -> bytes:
    encoded = name.encode("ascii")
    assert len(encoded) < 100
    assert size <= _LARGEST
    size_field = b"%011o\0" % size
    check_sum = _FIXED_SUM + sum(encoded) + sum(size_field)
    return b"".join((encoded.ljust(100, b"\0"), _BEFORE_SIZE, size_field, _BEFORE_SUM, b"%06o\0 " % check_sum, _REST))

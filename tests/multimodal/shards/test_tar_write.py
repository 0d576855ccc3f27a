from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import webdataset

from multimodal.data.shards.index import scan_tar
from multimodal.data.shards.writer import TarFile


@pytest.mark.parametrize("sizes", [[0], [1], [511, 512, 513], [10240] * 3, [7168], [8192], list(range(0, 40_000, 1111)), []])
def test_the_bytes_are_those_of_webdatasets_writer(sizes: list[int]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = TarFile(ours)
    with webdataset.TarWriter(theirs, encoder=False, compress=False, mtime=0) as writer:
        for number, size in enumerate(sizes):
            data, key = bytes([number]) * size, f"key-{number}" + "x" * number
            for suffix in ("jpg", "json"):
                tar.add(f"{key}.{suffix}", data)
            writer.write({"__key__": key, "jpg": data, "json": data})
    tar.end()
    assert ours.getvalue() == theirs.getvalue()
    assert (tar.size, tar.sha256) == (len(ours.getvalue()), hashlib.sha256(ours.getvalue()).hexdigest())


def test_a_members_data_lies_where_adding_it_said(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        tar = TarFile(file)
        offsets = [tar.add(f"{size}.jpg", bytes(size)) for size in (0, 5, 512, 1000)]
        tar.end()
    assert [(member.offset, member.size) for member in scan_tar(tmp_path / "a.tar")] == list(zip(offsets, (0, 5, 512, 1000), strict=True))

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import flip, tar_of

from adalink.errors import DataError
from multimodal.data.shards.index import TarMember, scan_tar

MEMBERS = [("a.jpg", b"x" * 700), ("a.json", b"{}"), ("empty.txt", b""), ("full.txt", b"y" * 1024)]


def contents(path: Path) -> list[tuple[str, bytes]]:
    data = path.read_bytes()
    return [(member.name, data[member.offset : member.offset + member.size]) for member in scan_tar(path)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_found_where_tarfile_finds_it(tmp_path: Path, tar_format: int) -> None:
    members = [*MEMBERS, ("ü/é.jpg", b"1"), ("long" * 60 + ".jpg", b"2"), ("folder/" * 30 + "b.jpg", b"3"), ("é" * 200, b"4")]
    if tar_format == tarfile.USTAR_FORMAT:
        members = members[:5]
    path = tar_of(tmp_path / "a.tar", members, tar_format)
    assert contents(path) == members
    with tarfile.open(path) as tar:
        assert list(scan_tar(path)) == [TarMember(info.name, info.offset_data, info.size) for info in tar]


def test_what_the_tar_command_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.jpg").write_bytes(b"x" * 5000)
    (tmp_path / "in" / "sub" / ("b" * 150 + ".txt")).write_bytes(b"text")
    (tmp_path / "in" / "link.jpg").symlink_to("a.jpg")
    os.link(tmp_path / "in" / "a.jpg", tmp_path / "in" / "hard.jpg")
    for form in ("gnu", "pax", "ustar", "v7"):
        name = "sub" if form in ("gnu", "pax") else "a.jpg"
        subprocess.run(
            ["tar", f"--format={form}", "-cf", tmp_path / f"{form}.tar", "-C", tmp_path / "in", "a.jpg", "hard.jpg", "link.jpg", name],
            check=True,
        )
        with tarfile.open(tmp_path / f"{form}.tar") as tar:
            files = [TarMember(info.name, info.offset_data, info.size) for info in tar if info.isreg() and not info.islnk()]
        assert list(scan_tar(tmp_path / f"{form}.tar")) == files


def test_pax_sizes_and_global_headers_are_understood(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "path=not a name"}) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "path": "renamed.jpg"}
        tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(tmp_path / "a.tar") == [("renamed.jpg", b"abc")]


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 1211, 1212, 1535, 1536, 2000, 2048, 2559, 2560, 3071, 3072, 3073, 4096, 4607])
def test_a_cut_tar_file_names_itself_and_the_byte_wherever_it_is_cut(tmp_path: Path, cut: int) -> None:
    path = tar_of(tmp_path / "a.tar", MEMBERS)
    os.truncate(path, cut)
    with pytest.raises(DataError, match=rf"the shard .*a\.tar is cut at byte {cut}: (the header|the data|it lacks the end mark)"):
        list(scan_tar(path))


def test_the_shortest_whole_tar_file_is_read(tmp_path: Path) -> None:
    """The control of the test above: one block of zeros ends it, as some writers leave it."""
    path = tar_of(tmp_path / "a.tar", MEMBERS)
    os.truncate(path, 4608 + 512)
    assert contents(path) == MEMBERS


def test_python_reads_some_cut_tar_files_to_an_early_end_without_a_word(tmp_path: Path) -> None:
    """Why the scan is our own: these cuts lose members silently."""
    silent = []
    for cut in (1536, 1537, 2560, 3072):
        path = tar_of(tmp_path / "a.tar", MEMBERS)
        os.truncate(path, cut)
        with tarfile.open(path, "r:") as tar:
            silent.append(len(list(tar)) < len(MEMBERS))
    assert all(silent)


@pytest.mark.parametrize("header", [0, 1536, 2560, 3072])
def test_a_flipped_bit_in_any_header_is_found(tmp_path: Path, header: int) -> None:
    for byte in (0, 50, 100, 124, 130, 148, 156, 257, 345, 511):
        path = tar_of(tmp_path / "a.tar", MEMBERS)
        flip(path, header + byte)
        with pytest.raises(DataError, match=rf"is damaged at byte {header}: no tar header there"):
            list(scan_tar(path))


def test_a_tar_file_that_goes_on_after_its_end_is_refused(tmp_path: Path) -> None:
    one, two = tar_of(tmp_path / "a.tar", MEMBERS), tar_of(tmp_path / "b.tar", [("b.jpg", b"z")])
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(DataError, match=r"is damaged at byte 4608: it goes on after its end mark; are these several tar files in one\?"):
        list(scan_tar(one))


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_file_is_refused(tmp_path: Path, mode: str, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match=rf"a\.tar is compressed \({name}\), which allows no random access; unpack it"):
        list(scan_tar(tmp_path / "a.tar"))


def test_missing_empty_and_unreadable_files_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"the shard .*empty\.tar holds 0 bytes; write or fetch it again"):
        list(scan_tar(tmp_path / "empty.tar"))
    with pytest.raises(DataError, match=r"the shard .*absent\.tar cannot be opened: No such file or directory; is it there\?"):
        list(scan_tar(tmp_path / "absent.tar"))
    with pytest.raises(DataError, match=r"cannot be opened: .*null"):
        list(scan_tar(Path("a\0.tar")))
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        list(scan_tar(tmp_path))


def header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(content: bytes) -> bytes:
    return header("pax", len(content), tarfile.XHDTYPE) + content.ljust(-(-len(content) // 512) * 512, b"\0") + header("a.jpg", 0, b"0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("a.jpg", 10, tarfile.GNUTYPE_SPARSE), "a sparse member, which no reader of shards supports"),
        (header("a.jpg", 2**62, b"0"), f"the data of 'a.jpg', from byte 512 on, needs {2**62} bytes"),
        (header("long", 2**21, tarfile.GNUTYPE_LONGNAME) + bytes(2**21), f"an extended header of {2**21} bytes"),
        (pax(b"9999 path=x\n"), "pax records that do not add up"),
        (pax(b"11 path:xx\n"), "pax records that do not add up"),
        (pax(b"x path=x\n"), "pax records that do not add up"),
        (pax(b"0 path=x\n"), "pax records that do not add up"),
        (pax(b"11 size=-5\n"), "a member of -5 bytes"),
        (pax(b"5011 size=" + b"9" * 5000 + b"\n"), "a member of 9999999999999999999999999999999999999999 bytes"),
        (pax(b"9" * 5000 + b" size=1\n"), "pax records that do not add up"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content + bytes(1024))
    with pytest.raises(DataError, match=message):
        list(scan_tar(path))


def test_a_link_has_no_data_whatever_its_size_says(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header("link", 10**6, tarfile.LNKTYPE) + header("a.jpg", 0, b"0") + bytes(1024))
    assert [member.name for member in scan_tar(path)] == ["a.jpg"]


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 10239), value=st.integers(0, 255), cut=st.integers(1, 10240))
def test_any_damage_gives_members_inside_the_file_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    tar_of(path, MEMBERS, tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    data[at] = value
    path.write_bytes(data[:cut])
    try:
        found = list(scan_tar(path))
    except DataError:
        return
    assert all(member.offset + member.size <= cut for member in found)

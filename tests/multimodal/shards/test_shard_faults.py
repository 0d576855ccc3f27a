"""The table of faults: for each, what a person sees, what is counted, and that nothing is lost without a word."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from made_shards import flip, image, made_shards, made_source, tar_of

from adalink.errors import DataError
from multimodal.data.images.decode import BadImage, decode_image
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.reader import ShardSource
from multimodal.sample import BadSample, BadSamples, DamagedSample

COUNT = 10


def epoch(folder: Path) -> tuple[int, BadSamples]:
    """Reads and decodes everything, as a loader does: how many samples were good, and those that were not."""
    source = ShardSource(folder)
    bad = BadSamples(budget=COUNT, found=source.problems)
    good = 0
    for index in range(len(source)):
        try:
            sample = source[index]
            decode_image(sample.image)
            if sample.captions or sample.questions:
                good += 1
            else:
                bad.add(BadSample(key=sample.key, reason="no text"))
        except DamagedSample as error:
            bad.add(error.bad)
        except BadImage as error:
            bad.add(BadSample(key=sample.key, reason=error.reason, detail=error.detail))
    return good, bad


def test_a_whole_set_is_all_good(tmp_path: Path) -> None:
    """The control of the whole table."""
    made_shards(tmp_path)
    good, bad = epoch(tmp_path)
    assert (good, bad.counts) == (COUNT, {})


def cut(at: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / "shard-000001.tar", at)


def remove(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()


def damage_header(folder: Path) -> None:
    flip(folder / "shard-000001.tar", 3)


FILE_FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what happened: how, what opening says with a manifest, and without one
    "cut in a header": (cut(700), "shard-000001.tar has 700 bytes, and manifest.json says", "is cut at byte 700"),
    "cut in data": (cut(520), "shard-000001.tar has 520 bytes, and manifest.json says", "is cut at byte 520: the data of '4.json'"),
    "cut between members": (
        cut(1024),
        "shard-000001.tar has 1024 bytes, and manifest.json says",
        "is cut at byte 1024: it lacks the end mark",
    ),
    "no bytes": (cut(0), "shard-000001.tar has 0 bytes, and manifest.json says", "shard-000001.tar holds 0 bytes"),
    "missing": (remove, "shard-000001.tar, which manifest.json names, cannot be opened", ""),
    "flipped bit in a header": (damage_header, "", "is damaged at byte 0: no tar header there"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_shard_that_is_not_whole_stops_the_run_before_its_first_step(tmp_path: Path, fault: str) -> None:
    damage, with_manifest, without = FILE_FAULTS[fault]
    made_shards(tmp_path)
    damage(tmp_path)
    if with_manifest:
        with pytest.raises(DataError, match=with_manifest):
            ShardSource(tmp_path)
    else:  # the manifest's offsets do not need the header, and each sample is compared with its check sum
        assert epoch(tmp_path)[0] == COUNT
    (tmp_path / "manifest.json").unlink()
    if without:
        with pytest.raises(DataError, match=without):
            ShardSource(tmp_path)
    else:  # nothing names the shard that is missing: a set without a manifest cannot know, `adalink shards img2dataset` makes it known
        assert epoch(tmp_path)[0] == COUNT - 4


@pytest.mark.parametrize("part", ["image", "json"])
def test_a_flipped_bit_is_one_sample_that_is_counted_and_named(tmp_path: Path, part: str) -> None:
    made_shards(tmp_path)
    at, size, _ = read_manifest(tmp_path).shards[1].members.table[1, ["image", "json"].index(part)].tolist()
    flip(tmp_path / "shard-000001.tar", at + size // 2)
    good, bad = epoch(tmp_path)
    assert (good, bad.summary()) == (COUNT - 1, "1 damaged bytes (5)")


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 150 megapixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 15_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(10**5))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)


def overwritten(data: bytes, start: int) -> bytes:
    """All but the first and the last bytes made ones."""
    return data[:start] + b"\x01" * (len(data) - start - 2) + data[-2:]


SAMPLE_FAULTS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    # what is in the tar file beside ten good samples, and what is counted
    "cut jpeg": ([("x.jpg", image(0)[:-200]), ("x.txt", b"x")], "1 truncated (x)"),
    "cut png": ([("x.png", image(0, "PNG")[:60]), ("x.txt", b"x")], "1 truncated (x)"),
    "cut webp": ([("x.webp", image(0, "WEBP")[:-10]), ("x.txt", b"x")], "1 truncated (x)"),
    "corrupt png": ([("x.png", image(0, "PNG").replace(b"IDAT", b"IDXT")), ("x.txt", b"x")], "1 corrupt (x)"),
    "corrupt webp": ([("x.webp", overwritten(image(0, "WEBP"), 20)), ("x.txt", b"x")], "1 corrupt (x)"),
    "corrupt jpeg": ([("x.jpg", overwritten(image(0), 3)), ("x.txt", b"x")], "1 corrupt (x)"),
    "no image by content": ([("x.jpg", b"<html>404</html>"), ("x.txt", b"x")], "1 not an image (x)"),
    "no bytes": ([("x.jpg", b""), ("x.txt", b"x")], "1 empty file (x)"),
    "pixel bomb": ([("x.png", bomb()), ("x.txt", b"x")], "1 too many pixels (x)"),
    "huge text": ([("x.jpg", image(0)), ("x.txt", b"x" * (2**20 + 1))], "1 too much text (x)"),
    "no text": ([("x.jpg", image(0))], "1 no text (x)"),
    "empty text": ([("x.jpg", image(0)), ("x.txt", b" \n")], "1 no text (x)"),
    "no image": ([("x.txt", b"x")], "1 no image (x)"),
    "json that is none": ([("x.jpg", image(0)), ("x.json", b"{'a'")], "1 damaged text (x)"),
    "text in another encoding": ([("x.jpg", image(0)), ("x.txt", b"caf\xe9")], "1 damaged text (x)"),
    "a key with control characters": ([("x\x1b[2J\n.jpg", b""), ("x\x1b[2J\n.txt", b"x")], r"1 empty file ('x\x1b[2J\n')"),
}


def with_others(folder: Path, members: list[tuple[str, bytes]]) -> None:
    good = [
        (f"{sample.key}.{suffix}", data)
        for sample in made_source(COUNT).samples
        for suffix, data in (("jpg", sample.image), ("txt", b"text"))
    ]
    assert all(isinstance(data, bytes) for _, data in good)
    tar_of(folder / "a.tar", good[:6] + members + good[6:], tarfile.PAX_FORMAT)  # type: ignore[operator]


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_a_bad_sample_is_counted_and_named_and_the_others_stay(tmp_path: Path, fault: str) -> None:
    members, counted = SAMPLE_FAULTS[fault]
    with_others(tmp_path, members)
    good, bad = epoch(tmp_path)
    assert (good, bad.summary()) == (COUNT, counted)


@pytest.mark.parametrize("suffix", ["pyd", "pkl", "pickle", "pth", "pt", "npz", "json.gz", "cbor", "ten"])
def test_members_that_could_run_or_unpack_are_counted_and_never_opened(tmp_path: Path, suffix: str) -> None:
    with_others(tmp_path, [(f"x.{suffix}", b"cos\nsystem\n(S'touch pwned'\ntR.")])
    source = ShardSource(tmp_path)
    assert (len(source), source.ignored) == (COUNT, {suffix: 1})
    assert epoch(tmp_path)[0] == COUNT


@pytest.mark.parametrize(
    "key", ["../../../tmp/x", "/etc/passwd", "a\0b", "pipe:touch pwned", "C:\\x", "~/x", "$(touch pwned)", "http://a/b"]
)
def test_a_key_that_looks_like_a_path_or_a_command_is_only_a_key(tmp_path: Path, key: str) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix, data in (("jpg", image(0)), ("txt", b"text")):
            info = tarfile.TarInfo("x")
            info.size, info.pax_headers = len(data), {"path": f"{key}.{suffix}"}
            tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    assert ShardSource(tmp_path / "in")[0].key == key
    assert epoch(tmp_path / "in")[0] == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_key_that_comes_twice_stops_the_run(tmp_path: Path) -> None:
    with_others(tmp_path, [("3.jpg", image(0)), ("3.txt", b"again")])
    with pytest.raises(
        DataError, match=r"a.tar has the image of the sample '3' twice \('3.jpg' and '3.jpg'\); keys must be unique in a shard"
    ):
        ShardSource(tmp_path)

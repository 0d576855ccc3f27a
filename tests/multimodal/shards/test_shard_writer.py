from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from made_shards import ListSource, everything, flip, image, made_sample, made_shards, made_source
from shared import ROOT

from adalink.errors import BudgetError, ConfigError, DataError
from multimodal.data.images.decode import decode_image
from multimodal.data.shards.manifest import read_manifest
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import BadSample, Sample


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written_is_read_back_sample_by_sample(tmp_path: Path) -> None:
    source = made_shards(tmp_path / "out")
    assert everything(ShardSource(tmp_path / "out")) == source.samples


def test_the_folder_holds_the_shards_and_their_manifest_and_nothing_else(tmp_path: Path) -> None:
    made_shards(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", *(f"shard-00000{n}.{kind}" for n in range(3) for kind in ("idx", "tar"))]


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    source = made_shards(tmp_path)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [row["__key__"] for row in found] == [sample.key for sample in source.samples]
    for row, sample, suffix in zip(found, source.samples, ["jpg", "png", "webp"] * 4, strict=False):
        assert row[suffix] == sample.image
        assert json.loads(row["json"])["captions"] == list(sample.captions)
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert decoded[1]["png"].size == (17, 16)
    assert decoded[1]["json"]["questions"][0]["answers"] == ["yes", " no\n"]


def test_the_manifest_tells_the_truth_about_every_file_and_every_member(tmp_path: Path) -> None:
    made_shards(tmp_path)
    manifest = read_manifest(tmp_path)
    assert [len(shard.members) for shard in manifest.shards] == [4, 4, 2]
    for shard in manifest.shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.size, shard.sha256)
        with tarfile.open(tmp_path / shard.file) as tar:
            places = {info.name: (info.offset_data, info.size) for info in tar}
        assert len(places) == 2 * len(shard.members)
        for row, key in enumerate(shard.members.all_keys()):
            image, record, absent = shard.members.table[row].tolist()
            assert tuple(image[:2]) in [places.get(f"{key}.{suffix}") for suffix in ("jpg", "png", "webp")]
            assert (tuple(record[:2]), absent) == (places[f"{key}.json"], [-1, -1, -1])


def test_the_same_source_gives_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        write_shards(made_source(30), tmp_path / str(workers), samples_per_shard=4, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "5")
    assert len(files(tmp_path / "1")) == 17


def test_pictures_in_files_pass_as_they_are_whatever_their_names(tmp_path: Path) -> None:
    path = tmp_path / "named.jpg"
    path.write_bytes(image(4, "PNG"))
    write_shards(ListSource([replace(made_sample(4), image=path)]), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["4.json", "4.png"]
    assert ShardSource(tmp_path / "out")[0].image == path.read_bytes()


def test_path_like_and_strange_keys_become_plain_names_and_come_back(tmp_path: Path) -> None:
    keys = ["../../etc/passwd", "/abs", "a.b.c", "nul\0", "é", "__meta__", "x" * 300, "a/b", "a_b", "COCO_val2014_000000000042"]
    source = ListSource(made_sample(number, key) for number, key in enumerate(keys))
    write_shards(source, tmp_path)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert len(set(names)) == 20
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") and name.count(".") == 1 for name in names
    )
    assert [sample.key for sample in everything(ShardSource(tmp_path))] == keys


@pytest.mark.parametrize("samples_per_shard", [1, 100])
def test_a_key_that_comes_twice_is_refused_within_a_shard_and_across(tmp_path: Path, samples_per_shard: int) -> None:
    source = ListSource([made_sample(1), made_sample(2), made_sample(1)])
    with pytest.raises(DataError, match="two samples have the key '1'; a data set's keys must be unique"):
        write_shards(source, tmp_path / "out", samples_per_shard=samples_per_shard)
    assert not (tmp_path / "out").exists()


BAD = {
    "missing file": Path("absent.jpg"),
    "not an image": b"8BPS" + bytes(50),
    "truncated": image(0, "PNG")[:20],
    "empty file": b"",
    "too many pixels": image(0, "PNG").replace(b"\0\0\0\x10\0\0\0\x10", b"\0\0\xff\xff\0\0\xff\xff"),
}


def with_bad() -> ListSource:
    return ListSource([*made_source(10).samples, *(replace(made_sample(90), key=reason, image=image) for reason, image in BAD.items())])


def test_bad_pictures_are_left_out_counted_and_named_in_the_manifest(tmp_path: Path) -> None:
    earlier = BadSample(key="7", reason="no text", detail="image 7 has no caption")
    manifest = write_shards(with_bad(), tmp_path, samples_per_shard=4, budget=6, skipped=[earlier])
    assert [(bad.key, bad.reason) for bad in manifest.skipped] == [("7", "no text"), *((reason, reason) for reason in BAD)]
    assert read_manifest(tmp_path).skipped == manifest.skipped
    assert everything(ShardSource(tmp_path)) == made_source(10).samples
    assert ShardSource(tmp_path).problems == ()


def test_a_budget_that_is_spent_stops_the_writing_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"5 bad samples, and at most 4 are allowed: .*1 truncated \(truncated\)"):
        write_shards(with_bad(), tmp_path / "out", budget=4)
    with pytest.raises(BudgetError, match=r"1 bad sample, and at most 0 are allowed: 1 no text \(7\)"):
        write_shards(made_source(2), tmp_path / "out", skipped=[BadSample(key="7", reason="no text")])
    assert not (tmp_path / "out").exists()


def test_a_shard_whose_pictures_are_all_bad_is_left_out_and_the_numbers_have_no_gap(tmp_path: Path) -> None:
    source = ListSource([replace(made_sample(0), image=b""), *made_source(3).samples[1:]])
    manifest = write_shards(source, tmp_path, samples_per_shard=1, budget=1)
    assert [shard.file for shard in manifest.shards] == ["shard-000000.tar", "shard-000001.tar"]
    assert [sample.key for sample in everything(ShardSource(tmp_path))] == ["1", "2"]


def test_an_empty_source_and_too_much_text_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no sample to write to .*out"):
        write_shards(ListSource([]), tmp_path / "out")
    with pytest.raises(BudgetError, match=r"1 too much text \(1\)"):
        write_shards(ListSource([replace(made_sample(1), captions=("x" * 2**20,))]), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard is 0 and workers 4; both must be at least 1"),
        ({"workers": 0}, "samples_per_shard is 1000 and workers 0; both must be at least 1"),
        ({"prefix": "a/b"}, "the prefix 'a/b' cannot begin the shards' file names"),
        ({"prefix": ""}, "the prefix '' cannot begin"),
        ({"budget": -1}, "the budget for bad samples is -1"),
    ],
)
def test_senseless_arguments_are_refused_before_anything_is_written(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_shards(made_source(1), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    made_shards(tmp_path / "done")
    before = files(tmp_path / "done")
    with pytest.raises(
        ConfigError, match=r"the folder .*done is not empty: it holds 'manifest.json' \(7 files\); give a new folder, or empty it"
    ):
        made_shards(tmp_path / "done")
    assert files(tmp_path / "done") == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file is a file; expected a folder, new or empty"):
        made_shards(tmp_path / "file")


def test_an_empty_folder_is_used_and_stays_when_the_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no sample"):
        write_shards(ListSource([]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    made_shards(tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"shards cannot be written to .*: Not a directory"):
        made_shards(tmp_path / "file" / "out")


class Interrupted(ListSource):
    """Stops as Ctrl-C does, at one sample."""

    def __init__(self, samples: list[Sample], at: int) -> None:
        super().__init__(samples)
        self.at, self.read = at, 0

    def __getitem__(self, index: int) -> Sample:
        if index == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_writing_looks_unfinished_and_goes_on_with_the_same_result(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(made_source(10).samples, 9), tmp_path / "out", samples_per_shard=4)
    assert os.listdir(tmp_path / "out") == [".writing"]
    with pytest.raises(
        DataError, match=r"the shards in .*out are not finished: a writing was interrupted or still goes on; run the same command again"
    ):
        ShardSource(tmp_path / "out")
    first = tmp_path / "out" / ".writing" / "000000.tar"
    inode = first.stat().st_ino
    made_shards(tmp_path / "out")
    made_shards(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_ino == inode  # used again, not written again


def interrupted(out: Path) -> Path:
    """In the third shard, after two whole ones."""
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(made_source(10).samples, 9), out, samples_per_shard=4, workers=1)
    return out / ".writing"


def test_what_an_interrupted_writing_left_is_used_only_where_it_still_fits(tmp_path: Path) -> None:
    """Other texts, other shard sizes, a cut shard, a damaged entry: each is written again."""
    made_shards(tmp_path / "whole")
    work = interrupted(tmp_path / "cut")
    os.truncate(work / "000000.tar", 1024)
    (work / "000001.json").write_text("{")
    made_shards(tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")

    for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, 100), lambda path: flip(path, 200)):
        out = tmp_path / "index"
        work = interrupted(out)
        damage(work / "000000.idx")
        made_shards(out)
        assert files(out) == files(tmp_path / "whole")
        shutil.rmtree(out)

    interrupted(tmp_path / "sizes")
    made_shards(tmp_path / "sizes", samples_per_shard=3)
    assert everything(ShardSource(tmp_path / "sizes")) == made_source(10).samples

    interrupted(tmp_path / "texts")
    others = [replace(sample, captions=("other",)) for sample in made_source(10).samples]
    write_shards(ListSource(others), tmp_path / "texts", samples_per_shard=4)
    assert everything(ShardSource(tmp_path / "texts")) == others


def test_a_picture_that_changed_since_the_interruption_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image(1, "PNG"))
    samples = [replace(made_sample(0), image=path), made_sample(1)]
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(samples, 1), tmp_path / "out", samples_per_shard=1)
    path.write_bytes(image(2, "PNG"))
    write_shards(ListSource(samples), tmp_path / "out", samples_per_shard=1)
    assert ShardSource(tmp_path / "out")[0].image == image(2, "PNG")


def test_bad_pictures_of_the_part_that_was_written_before_count_again(tmp_path: Path) -> None:
    samples = [replace(made_sample(0), image=b""), *made_source(4).samples[1:]]
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(samples, 3), tmp_path, samples_per_shard=2, budget=1)
    with pytest.raises(BudgetError, match="1 bad sample"):
        write_shards(ListSource(samples), tmp_path, samples_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        write_shards(Interrupted(samples, 3), tmp_path, samples_per_shard=2, budget=1)
    assert [bad.key for bad in write_shards(ListSource(samples), tmp_path, samples_per_shard=2, budget=1).skipped] == ["0"]


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_writing_killed_while_the_shards_get_their_names_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int) -> None:
    real, count = Path.replace, [0]

    def killed(self: Path, target: Path) -> Path:
        if target.suffix == ".tar" or target.name == "manifest.json":
            if count[0] == moved:
                raise KeyboardInterrupt
            count[0] += 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            made_shards(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) == moved
    with pytest.raises(DataError, match="are not finished"):
        ShardSource(tmp_path / "out")
    made_shards(tmp_path / "out")
    made_shards(tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_writing_killed_while_the_shards_get_their_names_leaves_none_to_a_smaller_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("multimodal.data.shards.manifest.write_manifest", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            made_shards(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    made_shards(tmp_path / "out", samples_per_shard=10)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "shard-000000.idx", "shard-000000.tar"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from made_shards import made_source
from multimodal.data.shards.writer import write_shards
source = made_source(40)
class Slow:
    def __len__(self): return 40
    def __getitem__(self, index):
        sys.stdout.write(f"{index}\\n")  # in one piece: print writes the line feed apart, and two threads write here
        sys.stdout.flush()
        if index >= 20: time.sleep(60)
        return source[index]
write_shards(Slow(), Path(sys.argv[1]), samples_per_shard=4, workers=2)
"""


def start_writer(out: Path) -> subprocess.Popen[str]:
    tests = str(ROOT / "tests" / "support")
    root = str(ROOT)
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(out), tests], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def test_a_killed_process_leaves_nothing_that_looks_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    writer = start_writer(tmp_path / "out")
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 20:
            break
    with pytest.raises(ConfigError, match=r"another process writes shards to .* now; wait for it, or give another folder"):
        made_shards(tmp_path / "out")
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert os.listdir(tmp_path / "out") == [".writing"]
    write_shards(made_source(40), tmp_path / "out", samples_per_shard=4)
    write_shards(made_source(40), tmp_path / "whole", samples_per_shard=4)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: writing beyond it fails in the same place, with another errno."""
    code = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from made_shards import made_shards
from adalink.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    made_shards(Path(sys.argv[1]), 100, 60)
except DataError as error:
    print(error)
"""
    tests, root = str(ROOT / "tests" / "support"), str(ROOT)
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), tests],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert "000000.tar cannot be written: File too large; is the disk full?" in ran.stdout
    assert not (tmp_path / "out").exists()


def test_a_failing_shard_stops_the_others_at_their_next_sample(tmp_path: Path) -> None:
    class Slow(ListSource):
        def __getitem__(self, index: int) -> Sample:
            read.append(index)
            time.sleep(0.01 if index >= 2 else 0)
            return super().__getitem__(index)

    samples = made_source(2000).samples
    for at in (1, 1003):  # in the first shard and in the second, which is written meanwhile
        twice = [*samples[:at], replace(samples[at], key=samples[at - 1].key), *samples[at + 1 :]]
        read: list[int] = []
        with pytest.raises(DataError, match="two samples have the key"):
            write_shards(Slow(twice), tmp_path, samples_per_shard=1000, workers=2)
        assert sum(index // 1000 != at // 1000 for index in read) < 500  # of a thousand, and as fast as the machine lets both go


def test_a_written_picture_decodes(tmp_path: Path) -> None:
    write_shards(ListSource([made_sample(5)]), tmp_path)
    found = ShardSource(tmp_path)[0]
    assert isinstance(found.image, bytes)
    assert decode_image(found.image).size == (21, 16)

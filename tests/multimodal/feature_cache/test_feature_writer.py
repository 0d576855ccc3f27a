"""A folder of features that is being written: interrupted, taken up again, shared, refused; whole at the end or not at all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from composed import Drawn, tower
from feature_case import CONTENTS, N, binding, only_shard, records, written
from made_shards import flip
from shared import PATIENCE
from torch import Tensor

from adalink.errors import BudgetError, ConfigError, DataError
from multimodal.data.feature_cache import encode as encoding
from multimodal.data.feature_cache.encode import write_features
from multimodal.data.feature_cache.format import ABSENT, HEADER, Contents, ShardFile, all_contents
from multimodal.data.feature_cache.reader import Binding, FeatureCache, bind, refuse_other
from multimodal.data.feature_cache.writer import FeatureWriter
from multimodal.data.images.decode import decode_image
from multimodal.encoders.tower import VisionTower
from multimodal.sample import Sample
from tasks.data.sources import Chosen
from tasks.scenes.dataset import Scenes


def complete(folder: Path) -> FeatureCache:
    """Take a writing up and end it."""
    writer = FeatureWriter(folder, binding(), CONTENTS)
    missing = writer.missing().tolist()
    if missing:
        writer.add(missing, records(missing))
    cache = writer.finish({})
    writer.close()
    return cache


def is_right(cache: FeatureCache) -> bool:
    return all(torch.equal(cache[i], records([i])[0]) for i in range(N))  # type: ignore[arg-type]


def half(folder: Path, images: list[int]) -> Path:
    writer = FeatureWriter(folder, binding(), CONTENTS)
    writer.add(images, records(images))
    writer.close()
    return folder


def test_a_writing_goes_on_where_it_stopped_and_looks_whole_at_the_end_alone(tmp_path: Path) -> None:
    folder = half(tmp_path / "kept", [7, 2, 5])
    with pytest.raises(DataError, match=r"the features in .* are not finished: a writing was interrupted or still goes on; run `adalink features` again, or train"):
        FeatureCache.open(folder)
    writer = FeatureWriter(folder, binding(), CONTENTS)
    assert writer.missing().tolist() == [0, 1, 3, 4, 6, 8, 9]
    with pytest.raises(DataError, match="7 images have no features, the first number 0: run `adalink features` with the same settings"):
        writer.finish({})
    writer.close()
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(folder)
    assert is_right(complete(folder))
    assert is_right(FeatureCache.open(folder))
    assert not (folder / "unfinished.json").exists()


def test_a_record_is_written_once_whatever_comes_twice(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    writer.add([3, 3, 1], records([3, 3, 1]))
    writer.add([1, 0], records([2, 0]))  # the features of image 1 are there
    writer.close()
    assert np.count_nonzero(ShardFile(only_shard(tmp_path / "kept"), CONTENTS).index()[0] != ABSENT) == 3
    assert is_right(complete(tmp_path / "kept"))


def test_files_are_bounded_and_a_batch_may_reach_over_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.data.feature_cache.writer.SHARD_BYTES", 3 * CONTENTS.n_bytes)
    folder = written(tmp_path / "kept")
    assert len(list(folder.glob("*.safetensors"))) == 4
    assert is_right(FeatureCache.open(folder))


@pytest.mark.parametrize("cut", ["record", "check", "picture", "header", "features"])
def test_whatever_a_kill_or_a_power_cut_left_is_written_again(cut: str, tmp_path: Path) -> None:
    """Half a record, a record whose bytes never reached the disk, a file with half a header."""
    folder = half(tmp_path / "kept", [4, 8, 1])
    path = only_shard(folder)
    n = ShardFile(path, CONTENTS).capacity
    at = {"record": HEADER + 16 * n + CONTENTS.n_bytes + 3, "check": HEADER + 8 * n + 8, "picture": HEADER + 8}
    if cut in at:
        flip(path, at[cut])
    else:
        os.truncate(path, 100 if cut == "header" else HEADER + 16 * n + CONTENTS.n_bytes + 5)
    writer = FeatureWriter(folder, binding(), CONTENTS)
    there = set(range(N)) - set(writer.missing().tolist())
    assert there == {"header": set(), "features": {4}}.get(cut, {4, 1})
    writer.close()
    assert is_right(complete(folder))


def test_a_whole_folder_is_checked_and_what_is_damaged_is_written_anew(tmp_path: Path) -> None:
    folder = written(tmp_path / "kept")
    writer = FeatureWriter(folder, binding(), CONTENTS)
    assert writer.is_whole
    writer.close()
    before = only_shard(folder).read_bytes()
    flip(only_shard(folder), HEADER + 16 * N + 6 * CONTENTS.n_bytes)
    writer = FeatureWriter(folder, binding(), CONTENTS)
    assert not writer.is_whole
    assert writer.missing().tolist() == [6]
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(folder)
    writer.close()
    assert is_right(complete(folder))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > len(before)


def test_a_folder_of_anything_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"the folder .*full holds 'letters.txt' and no features: give a new folder, or empty it"):
        FeatureWriter(tmp_path / "full", binding(), CONTENTS)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=r"features cannot be written to .*: (File exists|Not a directory); is it a folder that can be written?"):
            FeatureWriter(folder, binding(), CONTENTS)
    for folder in (written(tmp_path / "kept"), half(tmp_path / "half", [1])):
        with pytest.raises(ConfigError, match="are of the encoder's layer -1, and here it is -2: give another folder"):
            FeatureWriter(folder, binding(layer=-2), CONTENTS)
        with pytest.raises(ConfigError, match=r"are 3 patches and 2 pooled vectors .*, and here they would be 3 patches of width 4 in float16: give another folder"):
            FeatureWriter(folder, binding(), Contents(patches=3, pooled=0, width=4))


def forked(function: Callable[[], None]) -> Connection:
    """A process that runs the function, with what it was refused with."""
    here, there = multiprocessing.Pipe(duplex=False)

    def tell() -> None:
        try:
            function()
            there.send("")
        except DataError as error:
            there.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=tell)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    return here


def test_a_folder_that_may_not_be_written_or_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o000)

    def as_nobody(function: Callable[[Path], object]) -> str:
        def run() -> None:
            if os.getuid() == 0:
                os.seteuid(65534)
            function(tmp_path / "closed" / "kept")

        return str(forked(run).recv())

    assert "Permission denied; is it a folder that can be written?" in as_nobody(lambda folder: FeatureWriter(folder, binding(), CONTENTS))
    assert "(Permission denied): write them with `adalink features`, or train with train.features: fill" in as_nobody(FeatureCache.open)


def test_what_cannot_be_mended_or_ended_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = half(tmp_path / "kept", [1])
    (folder / "zzz.safetensors").mkdir()
    with pytest.raises(DataError, match=r"the features in .*zzz.safetensors cannot be mended: .*; can the folder be written?"):
        FeatureWriter(folder, binding(), CONTENTS)
    (folder / "zzz.safetensors").rmdir()
    writer = FeatureWriter(folder, binding(), CONTENTS)
    missing = writer.missing().tolist()
    writer.add(missing, records(missing))

    def full(path: Path, contents: Contents) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("multimodal.data.feature_cache.writer.seal", full)
        with pytest.raises(DataError, match=r"cannot be finished: No space left on device; make room and run the same again"):
            writer.finish({})
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(folder)
    assert is_right(writer.finish({}))
    writer.close()


def test_a_second_writer_is_told_that_there_is_one(tmp_path: Path) -> None:
    first = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    with pytest.raises(ConfigError, match=r"another process writes features to .*kept now: wait for it, or give another folder"):
        FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    first.close()
    assert is_right(complete(tmp_path / "kept"))


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the features of 10 images take \d+\.00 GiB \(2,199,023,255,552 bytes each: 1 patches of width .*\), and .* has .*iB left: give a"):
        FeatureWriter(tmp_path / "kept", binding(), Contents(patches=1, pooled=0, width=2**40))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_told_and_what_is_written_stays(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: writing beyond it fails in the same place, with another errno."""

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
        for i in range(N):
            writer.add([i], records([i]))

    room = 3 * CONTENTS.n_bytes + HEADER + 16 * N + 20
    stated = forked(fill).recv()
    assert "features cannot be written to" in stated
    assert "File too large; 3 of 10 images are there and stay: make room and run the same again" in stated
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(tmp_path / "kept")
    writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    assert writer.missing().tolist() == list(range(3, N))
    assert only_shard(tmp_path / "kept").stat().st_size == room - 20  # half a record takes no room
    writer.close()
    assert is_right(complete(tmp_path / "kept"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_disk_is_told_before_and_while_it_fills(small_disk: Path) -> None:
    large = Contents(patches=64, pooled=0, width=64)  # 8 KB
    with pytest.raises(DataError, match=r"take 0.08 MiB \(8,192 bytes each: .*\), and .* has 0.06 MiB left: give a folder on a larger disk"):
        FeatureWriter(small_disk / "kept", binding(), large)
    assert not (small_disk / "kept").exists()
    writer = FeatureWriter(small_disk / "kept", binding(images=6), large)
    (small_disk / "another").write_bytes(bytes(30_000))  # by somebody else, meanwhile
    with pytest.raises(DataError, match=r"No space left on device; [0-3] of 6 images are there and stay: make room and run the same again"):
        writer.add(list(range(6)), records(list(range(6)), large))
    writer.close()
    (small_disk / "another").unlink()
    writer = FeatureWriter(small_disk / "kept", binding(images=6), large)
    missing = writer.missing().tolist()
    writer.add(missing, records(missing, large))
    assert len(writer.finish({})) == 6


def test_killed_at_any_moment_it_goes_on_to_the_same_features(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    written_so_far = context.Value("i", 0)

    def write() -> None:
        writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
        for i in reversed(range(N)):
            writer.add([i], records([i]))
            written_so_far.value += 1

    process = context.Process(target=write)
    process.start()
    while written_so_far.value < 4:
        time.sleep(0.0002)
    process.kill()
    process.join()
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(tmp_path / "kept")
    writer = FeatureWriter(tmp_path / "kept", binding(), CONTENTS)
    assert len(writer.missing()) <= N - 4
    writer.close()
    assert is_right(complete(tmp_path / "kept"))


def retained(cache: FeatureCache, index: int) -> Tensor:
    found = cache[index]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_are_encoded_once_and_bad_ones_are_recorded(workers: int, tmp_path: Path) -> None:
    source = Drawn(40, bad=[1, 34])
    cache = write_features(tower(), source, tmp_path / "kept", all_contents(tower(), "float32"), workers=workers, budget=2)
    assert {index: bad.reason for index, bad in cache.bad.items()} == {1: "not an image", 34: "not an image"}
    for index in (0, 33, 39):
        alone = tower()(tower().preprocess(decode_image(source[index].image))[None]).joined[0]
        torch.testing.assert_close(retained(cache, index), alone, rtol=1e-5, atol=1e-5)
    again = write_features(tower(), source, tmp_path / "kept", all_contents(tower(), "float32"), budget=2)
    assert again.bad == cache.bad


def test_over_the_budget_of_bad_pictures_it_stops_and_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"2 bad samples, and at most 1 is allowed: 2 not an image"):
        write_features(tower(), Drawn(5, bad=[1, 2]), tmp_path / "kept", all_contents(tower()), budget=1)
    with pytest.raises(DataError, match="are not finished"):
        FeatureCache.open(tmp_path / "kept")


def test_features_do_not_depend_on_how_many_pictures_are_encoded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on an interruption: groups are those of the data set."""
    source = Drawn(9)
    caches = []
    for size in (1, 4, 32):
        monkeypatch.setattr(encoding, "GROUP", size)
        monkeypatch.setattr("multimodal.data.feature_cache.encode.GROUP", size)
        caches.append(write_features(tower(), source, tmp_path / str(size), all_contents(tower(), "float32")))
    for index in range(9):
        for cache in caches[1:]:
            torch.testing.assert_close(retained(cache, index), retained(caches[0], index), rtol=0, atol=1e-5)
            assert torch.equal(retained(cache, index).half(), retained(caches[0], index).half())


class Renamed:
    """Images of scenes, told by nothing but keys and bytes."""

    def __init__(self, n: int, prefix: str = "") -> None:
        self.scenes, self.prefix = Scenes(split="train", size=n), prefix

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        sample = self.scenes[index]
        return Sample(key=self.prefix + sample.key, image_id=index, image=sample.image, captions=("another caption",))


def test_features_are_bound_to_pictures_and_their_order_and_not_to_texts() -> None:
    own = bind(tower(), Drawn(5))
    assert bind(tower(), Drawn(5)) == own
    assert bind(tower(), Renamed(5)).data == own.data
    others = [bind(tower(), source).data for source in (Renamed(5, "x"), Chosen(Drawn(5), [0, 2, 1, 3, 4]), Drawn(5, bad=[3]))]
    assert own.data not in others
    assert len(set(others)) == 3
    assert bind(tower(), Scenes(split="train", size=5)) == bind(tower(), Scenes(split="train", size=5))
    assert bind(tower(), Scenes(split="train", size=5)).data != bind(tower(), Scenes(split="val", size=5)).data
    displayed = bind(tower(), Chosen(Scenes(split="train", size=5), [0, 1])).data
    assert displayed != bind(tower(), Chosen(Scenes(split="train", size=5), [0, 2])).data


def test_pictures_in_files_are_told_by_name_size_and_some_bytes(tmp_path: Path) -> None:
    class Files:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Sample:
            return Sample(key=str(index), image_id=index, image=tmp_path / f"{index}.png", captions=("a",))

    for index in range(3):
        image = Scenes(split="train", size=3)[index].image
        assert isinstance(image, bytes)
        (tmp_path / f"{index}.png").write_bytes(image)
    own = bind(tower(), Files()).data
    assert bind(tower(), Files()).data == own
    flip(tmp_path / "1.png", 50)
    flipped = bind(tower(), Files()).data
    (tmp_path / "1.png").unlink()
    assert len({own, flipped, bind(tower(), Files()).data}) == 3


def test_every_picture_that_was_replaced_by_another_of_its_size_is_found(tmp_path: Path) -> None:
    class Files:
        def __len__(self) -> int:
            return 200  # more than are read whole

        def __getitem__(self, index: int) -> Sample:
            return Sample(key=str(index), image_id=index, image=tmp_path / f"{index}.png", captions=("a",))

    for index in range(200):
        (tmp_path / f"{index}.png").write_bytes(bytes([index]) * (100_000 if index % 2 else 5_000))
    own = bind(tower(), Files())
    old = Binding.from_json({name: value for name, value in own.to_json().items() if name != "slices"})
    for index in (4, 7):
        whole = (tmp_path / f"{index}.png").read_bytes()
        (tmp_path / f"{index}.png").write_bytes(bytes(len(whole)))
        now = bind(tower(), Files())
        assert now.data == own.data
        with pytest.raises(ConfigError, match=r"an image was replaced by another of the same name and size"):
            refuse_other(own, now, tmp_path)
        refuse_other(old, now, tmp_path)  # a folder from before this was looked at is read
        (tmp_path / f"{index}.png").write_bytes(whole)
        assert bind(tower(), Files()) == own


def test_another_encoder_preprocessing_or_layer_is_another_binding(tmp_path: Path) -> None:
    source, one = Drawn(2), tower()
    own = bind(one, source)
    deeper = bind(VisionTower(_loaded(one), name=one.name, layer=-2), source)
    assert (deeper.layer, deeper.fingerprint) == (-2, own.fingerprint)
    assert deeper.features != own.features
    turned = VisionTower(_loaded(one), name=one.name)
    turned.preprocess = type(one.preprocess)(transform=lambda image: one.preprocess(image.transpose(0)))
    assert bind(turned, source).pixels.difference(own.pixels) > 0.5
    brighter = VisionTower(_loaded(one), name=one.name)
    brighter.preprocess = type(one.preprocess)(transform=lambda image: one.preprocess(image) + 1 / 255)
    assert 0 < bind(brighter, source).pixels.difference(own.pixels) < 0.01


def _loaded(one: VisionTower) -> object:
    from multimodal.encoders.base import Loaded

    return Loaded(encoder=one.encoder, preprocess=one.preprocess)

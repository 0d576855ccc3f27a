"""`adalink shards ...`: write a data set as shards, index shards that exist, and check a set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adalink.errors import ConfigError, DataError
from tasks.commands import Command

TYPE_CHECKING = False  # not typing's, whose blocks the argument parser runs
if TYPE_CHECKING:
    from multimodal.data.shards.manifest import Manifest
    from tasks.data.files import FileSource

__all__ = ["CHECK", "COCO", "FOLDER", "IMG2DATASET", "VQA", "shards_check", "shards_coco", "shards_folder", "shards_img2dataset", "shards_vqa"]

_FAULTS_DISPLAYED = 10


def shards_coco(
    *,
    images: Path,
    annotations: Path,
    out: Path,
    image_name: str | None = None,
    samples_per_shard: int = 1000,
    bad_samples: int = 0,
    workers: int = 4,
) -> Manifest:
    """Write COCO captions as shards.

    Args:
        images: The folder of images.
        annotations: The captions, in COCO's format, such as captions_train2014.json.
        out: A new or empty folder.
        image_name: The images' names, such as COCO_train2014_{image_id:012d}.jpg; by default those in the annotations.
        samples_per_shard: Images in one shard.
        bad_samples: How many images may be missing or unusable before the command stops.
        workers: Shards written at a time.
    """
    from tasks.data.coco import read_coco_captions

    source = read_coco_captions(images=images, annotations=annotations, image_name=image_name)
    return _write(source, out, samples_per_shard, bad_samples, workers)


def shards_vqa(
    *,
    images: Path,
    questions: Path,
    annotations: Path | None = None,
    out: Path,
    image_name: str | None = None,
    samples_per_shard: int = 1000,
    bad_samples: int = 0,
    workers: int = 4,
) -> Manifest:
    """Write VQAv2 questions and answers as shards, one image with all its questions.

    Args:
        images: The folder of images.
        questions: The questions, in VQAv2's format.
        annotations: The answers, in VQAv2's format; none for a test split.
        out: A new or empty folder.
        image_name: The images' names, such as image{image_id}.jpg; by default COCO's where the questions are about COCO.
        samples_per_shard: Images in one shard.
        bad_samples: How many images may be missing or unusable before the command stops.
        workers: Shards written at a time.
    """
    from tasks.data.vqa import read_vqa

    source = read_vqa(images=images, questions=questions, annotations=annotations, image_name=image_name)
    return _write(source, out, samples_per_shard, bad_samples, workers)


def shards_folder(*, images: Path, out: Path, samples_per_shard: int = 1000, bad_samples: int = 0, workers: int = 4) -> Manifest:
    """Write a folder of images, each with a text file of captions beside it, as shards.

    Args:
        images: The folder: cat.jpg and cat.txt, one caption a line; folders below it too.
        out: A new or empty folder.
        samples_per_shard: Images in one shard.
        bad_samples: How many images may be without a text or unusable before the command stops.
        workers: Shards written at a time.
    """
    from tasks.data.folder import read_caption_folder

    return _write(read_caption_folder(images=images), out, samples_per_shard, bad_samples, workers)


def shards_img2dataset(*, shards: Path, bad_samples: int = 0) -> Manifest:
    """Index webdataset shards that exist, such as img2dataset's, by writing a manifest beside them.

    Raises ConfigError where there is a manifest already, DataError where the shards hold no sample.

    Args:
        shards: The folder of tar files.
        bad_samples: How many samples may lack an image or a text, or be too large, before the command stops.
    """
    from multimodal.data.shards.check import checksummed
    from multimodal.data.shards.index import ShardLimits, index_shards
    from multimodal.data.shards.manifest import MANIFEST, write_manifest
    from multimodal.sample import BadSamples

    if (shards / MANIFEST).exists():
        raise ConfigError(f"{shards / MANIFEST} is there already; run `adalink shards check`, or delete it to index the shards again")
    found = index_shards(shards, ShardLimits())
    if len(found.manifest) == 0:
        reason = found.manifest.skipped[0].detail if found.manifest.skipped else "none has an image and a text"
        raise DataError(f"the shards in {shards} hold no sample: {reason}")
    BadSamples(budget=bad_samples, found=found.manifest.skipped).check()
    known = tuple(checksummed(shards / shard.file, shard) for shard in found.manifest.shards)
    manifest = replace(found.manifest, shards=known)
    write_manifest(manifest, shards)
    _report("indexed", manifest, shards)
    return manifest


def shards_check(*, shards: Path) -> None:
    """Check every byte of a set of shards against its manifest.

    Raises DataError with what is wrong.

    Args:
        shards: The folder of tar files with its manifest.json.
    """
    from multimodal.data.shards.check import verify_shards

    faults = verify_shards(shards)
    if faults:
        displayed = "; ".join(fault.detail for fault in faults[:_FAULTS_DISPLAYED])
        more = f"; and {len(faults) - _FAULTS_DISPLAYED} more" if len(faults) > _FAULTS_DISPLAYED else ""
        wrong = "1 thing is" if len(faults) == 1 else f"{len(faults)} things are"
        raise DataError(f"{wrong} wrong with the shards in {shards}: {displayed}{more}")
    print(f"the shards in {shards} are what their manifest says")


def _write(source: FileSource, out: Path, samples_per_shard: int, bad_samples: int, workers: int) -> Manifest:
    from multimodal.data.shards.writer import write_shards

    manifest = write_shards(source, out, samples_per_shard=samples_per_shard, budget=bad_samples, skipped=source.problems, workers=workers)
    _report("wrote", manifest, out)
    return manifest


def _report(verb: str, manifest: Manifest, folder: Path) -> None:
    from multimodal.sample import BadSamples

    size = sum(shard.size for shard in manifest.shards) / 2**20
    shards = "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    images = "1 image" if len(manifest) == 1 else f"{len(manifest)} images"
    print(f"{verb} {shards} with {images} ({size:.1f} MiB) in {folder}")
    if manifest.skipped:
        print(f"skipped: {BadSamples(budget=0, found=manifest.skipped).summary()}")
    if manifest.ignored:
        print("members that no sample uses: " + ", ".join(f"{count} .{suffix}" for suffix, count in sorted(manifest.ignored.items())))


COCO = Command.of(shards_coco, "adalink shards coco --images images --annotations captions.json --out shards/train")
VQA = Command.of(shards_vqa, "adalink shards vqa --images images --questions questions.json --out shards/vqa")
FOLDER = Command.of(shards_folder, "adalink shards folder --images photographs --out shards/photographs")
IMG2DATASET = Command.of(shards_img2dataset, "adalink shards img2dataset --shards downloaded --bad-samples 100")
CHECK = Command.of(shards_check, "adalink shards check --shards shards/train")

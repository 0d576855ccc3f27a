"""VQAv2's splits by name, from the official files that a user unpacked into one folder."""

from __future__ import annotations

from pathlib import Path

from adalink.errors import ConfigError, DataError
from tasks.file_source import FileSource
from tasks.vqa_files import read_vqa

__all__ = ["VQA_SPLITS", "read_vqa_split", "split_parts"]

# Name -> (what the files say, the folder that COCO keeps the pictures in). `test-dev` is the part of `test` that the server scores at once.
VQA_SPLITS = {
    "train": ("train2014", "train2014"),
    "val": ("val2014", "val2014"),
    "test": ("test2015", "test2015"),
    "test-dev": ("test-dev2015", "test2015"),
}
_UNANSWERED = ("test", "test-dev")


def read_vqa_split(files: Path, images: Path, split: str) -> FileSource:
    """One sample per picture of the split with all its questions; the key is the image's id.

    files    the folder of v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and the like
    images   the folder of pictures; COCO's may lie in train2014, val2014 and test2015 within it, or directly in it
    split    train, val, test or test-dev (also as train2014, ...), or several with `+`: the server's models are usually trained on
             `train+val`. Test splits have no answers.

    Raises ConfigError on an unknown split, and as `read_vqa` does; DataError where train and test questions are mixed.
    """
    sources = [_read(files, images, name) for name in split_parts(split)]
    if len(sources) == 1:
        return sources[0]
    samples = (source[i] for source in sources for i in range(len(source)))
    problems = (problem for source in sources for problem in source.problems)
    return FileSource(samples, problems, read_from=files, item_ids=(item for source in sources for item in source.item_ids))


def split_parts(split: str) -> list[str]:
    """The names in VQA_SPLITS of a split: ["train", "val"] for `train2014+val2014`.

    Raises ConfigError on a name that there is not, on one given twice, and on questions with and without answers in one split.
    """
    by_file = {file: name for name, (file, _) in VQA_SPLITS.items()}
    parts = [by_file.get(part, part) for part in split.split("+")]
    if unknown := [part for part in parts if part not in VQA_SPLITS]:
        raise ConfigError(f"VQAv2 has no split {unknown[0]!r}; it has {', '.join(VQA_SPLITS)}; several are joined as in train+val")
    if len(set(parts)) < len(parts) or {"test", "test-dev"} <= set(parts):
        raise ConfigError(f"the split {split!r} holds the same questions twice; name each once (test-dev is a part of test)")
    if len({part in _UNANSWERED for part in parts}) > 1:
        raise ConfigError(f"the split {split!r} mixes questions with answers and without; take train and val, or a test split")
    return parts


def _read(files: Path, images: Path, name: str) -> FileSource:
    said, folder = VQA_SPLITS[name]
    questions = files / f"v2_OpenEnded_mscoco_{said}_questions.json"
    annotations = None if name in _UNANSWERED else files / f"v2_mscoco_{said}_annotations.json"
    for path in (questions, annotations):
        if path is not None and not path.is_file():
            raise DataError(f"{path} is not there; VQAv2's split {name} needs it: unpack the official files into {files}")
    inside = f"{folder}/" if (images / folder).is_dir() else ""
    return read_vqa(images=images, questions=questions, annotations=annotations, image_name=f"{inside}COCO_{folder}_{{image_id:012d}}.jpg")

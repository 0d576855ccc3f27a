"""A sample's media and its kind; the field's name in version 0.1 is taken for one version more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from adalink.errors import DataError
from multimodal.sample import Sample


def test_media_is_taken_by_its_old_name_and_given_by_it() -> None:
    with pytest.warns(DeprecationWarning, match=r"^Sample\.image is now media; the old name goes with the next version$"):
        old = Sample(key="a", image_id=1, image=b"x")  # type: ignore[call-arg]
    assert old == Sample(key="a", image_id=1, media=b"x")
    assert old.image == b"x"  # type: ignore[attr-defined]
    assert replace(old, key="b").media == b"x"
    assert replace(old, image=b"y").media == replace(old, media=b"y").media == b"y"  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="media"):
        Sample(key="a", image_id=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("media", [b"", "a.mp4", Path("a.mp4")])
def test_a_clip_is_bytes_or_a_path(media: bytes | str | Path) -> None:
    clip = Sample(key="a", image_id=1, media=media, kind="video")
    assert clip.images == (media,)
    assert clip.file == ("a.mp4" if media else "")


def test_other_clips_are_refused() -> None:
    with pytest.raises(DataError, match=r"^sample 'a' is of the kind audio and holds images: give one clip, as the path of a file or the bytes of one$"):
        Sample(key="a", image_id=1, media=Image.new("RGB", (2, 2)), kind="audio")
    with pytest.raises(DataError, match="is of the kind video and holds images"):
        Sample(key="a", image_id=1, media=b"", kind="video", further=(b"",))
    with pytest.raises(DataError, match=r"^the kind of sample 'a' is 'sound': give image, video or audio$"):
        Sample(key="a", image_id=1, media=b"", kind="sound")  # type: ignore[arg-type]

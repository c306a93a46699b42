"""Any folder of images: found at any depth, sent as it is, trained by class sub-folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from corun import images, registry
from corun.errors import InputError
from corun.registry import DataOptions, request_payloads

folder = registry.load_plugin("datasets", "folder")


def options(root: Path | None, **changes: object) -> DataOptions:
    return DataOptions(root=root, image_size=32, **changes)


@pytest.fixture
def photos(tmp_path: Path, picture: Callable[..., Path]) -> Path:
    """Five pictures in two class folders, one at the top, and things that are no pictures."""
    for name in ("cats/1.jpg", "cats/deep/2.JPEG", "dogs/3.png", "dogs/4.jpg", "top.jpg"):
        picture(tmp_path / name, seed=len(name))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.jpg").write_bytes(b"")
    return tmp_path


def test_requests_find_every_picture(photos: Path) -> None:
    """All pictures at any depth are there once, named by their path below the folder; other files are not."""
    names = {payload.name for payload in folder.requests(options(photos))}
    assert names == {"cats/1.jpg", "cats/deep/2.JPEG", "dogs/3.png", "dogs/4.jpg", "top.jpg"}


def test_jpeg_files_are_sent_byte_for_byte(photos: Path) -> None:
    """A JPEG file is the payload; a PNG is re-encoded at its own size."""
    payloads = {payload.name: payload.data for payload in folder.requests(options(photos))}
    assert payloads["cats/1.jpg"] == (photos / "cats/1.jpg").read_bytes()
    assert payloads["dogs/3.png"].startswith(b"\xff\xd8\xff")
    assert images.decode_rgb(payloads["dogs/3.png"]).shape == (40, 60, 3)


def test_count_and_seed_choose(photos: Path) -> None:
    """At most `count` files are taken, the same ones for the same seed."""
    first = folder.requests(options(photos, count=2, seed=4))
    assert len(first) == 2
    assert first == folder.requests(options(photos, count=2, seed=4))
    chosen = {tuple(p.name for p in folder.requests(options(photos, count=2, seed=seed))) for seed in range(8)}
    assert len(chosen) > 1


def test_a_path_on_the_command_line_is_this_data_set(photos: Path) -> None:
    """A path in place of a data set's name resolves to the folder."""
    assert len(request_payloads(str(photos), DataOptions(image_size=32))) == 5


def test_training_takes_classes_from_sub_folders(photos: Path) -> None:
    """A class is the place of its folder in sorted order; pictures outside class folders are not used."""
    data = folder.training(options(photos))
    assert (len(data), data.num_classes) == (4, 2)
    assert [data[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert data[0][0].shape == (3, 32, 32)


def test_dehazing_takes_every_picture(photos: Path) -> None:
    """For dehazing each picture is a clear one and gets made haze."""
    data = folder.training(options(photos, task="dehazing"))
    hazy, clear = data[2]
    assert len(data) == 5
    assert hazy.shape == clear.shape == (3, 32, 32)


def test_bad_folders_say_what_was_expected(tmp_path: Path, picture: Callable[..., Path]) -> None:
    """No path, a missing folder, a file, an empty folder and a flat one for training: each named."""
    picture(tmp_path / "flat" / "one.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="needs a path"):
        folder.requests(options(None))
    with pytest.raises(InputError, match=r"nowhere does not exist(.|\n)*expected"):
        folder.requests(options(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="is not a folder"):
        folder.requests(options(tmp_path / "flat" / "one.jpg"))
    with pytest.raises(InputError, match="has no images"):
        folder.requests(options(tmp_path / "empty"))
    with pytest.raises(InputError, match="class sub-folders"):
        folder.training(options(tmp_path / "flat"))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    """A file that only claims to be a picture is reported by its path."""
    (tmp_path / "bad.png").write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"bad\.png"):
        folder.requests(options(tmp_path))


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    """Grey, palette and RGBA files all give three channels."""
    for mode in ("L", "P", "RGBA", "LA", "I;16"):
        target = tmp_path / "c" / f"{mode.replace(';', '')}.png"
        target.parent.mkdir(exist_ok=True)
        Image.new(mode, (9, 7)).save(target)
    data = folder.training(options(tmp_path))
    assert {tuple(data[i][0].shape) for i in range(len(data))} == {(3, 32, 32)}

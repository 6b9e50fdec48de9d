"""Sets of images in all formats, whole and damaged: `python -m pytest tests/data/test_images.py`."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lamina import pixels
from lamina.data import decoding
from lamina.data.decoding import Encoded, decode, read_all, resize
from lamina.data.images import Images
from lamina.data.pictures import Photos, Pictures
from lamina.errors import UserError
from lamina.pixels import Pixels

NAMES = ["bird", "cat", "dog"]


def noise(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> Pictures:
    """Every class in turn; lossless formats give them back as they are."""
    rng = np.random.default_rng(seed)
    return Pictures(rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8), np.arange(count) % len(NAMES))


def picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(pixels).save(file, kind, lossless=True) if kind == "WEBP" else picture(pixels).save(file, kind)
    return file.getvalue()


def write_classes(folder: Path, pictures: Pictures, ending: str = "png", names: list[str] = NAMES) -> Path:
    """A sub-folder per class; returns the folder. Names of files do not tell the order of the classes."""
    for number, (each, label) in enumerate(zip(pictures.images, pictures.labels, strict=True)):
        path = folder / names[label] / f"{number:03}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(each, "WEBP" if ending == "webp" else "PNG"))
    return folder


def write_sheets(folder: Path, part: str, pictures: Pictures, ending: str = "png", per_sheet: int = 50) -> None:
    side = pictures.images.shape[1]
    for number, start in enumerate(range(0, len(pictures.labels), per_sheet)):
        each = pictures.images[start : start + per_sheet]
        sheet = each.reshape(-1, 50, side, side, 3).swapaxes(1, 2).reshape(-1, 50 * side, 3)
        content = encoded(sheet, "WEBP" if ending == "webp" else "PNG")
        (folder / f"set_{part}_{number:02}.{ending}").write_bytes(content)
    np.save(folder / f"set_{part}_labels.npy", pictures.labels)
    (folder / "set_classes.json").write_text(json.dumps(NAMES), encoding="utf-8")


def write_cifar10(folder: Path, train: Pictures, test: Pictures) -> Path:
    parts = [Pictures(train.images[i::5], train.labels[i::5]) for i in range(5)]
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], [*parts, test], strict=True):
        planes = part.images.transpose(0, 3, 1, 2).reshape(len(part.labels), -1)
        (folder / f"{name}.bin").write_bytes(np.hstack([part.labels[:, None].astype(np.uint8), planes]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n", encoding="utf-8")
    return folder


def write_cifar100(folder: Path, train: Pictures, test: Pictures) -> Path:
    for name, part in (("train", train), ("test", test)):
        planes = part.images.transpose(0, 3, 1, 2).reshape(len(part.labels), -1)
        labels = np.stack([part.labels // 2, part.labels], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, planes]).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    (folder / "coarse_label_names.txt").write_text("flying\nrunning\n", encoding="utf-8")
    return folder


def table(pictures: Pictures, names: list[str] = NAMES) -> Any:
    """A `datasets.Dataset`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    cells = [{"bytes": encoded(each), "path": None} for each in pictures.images]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"img": cells, "label": pictures.labels.tolist()}, features=features)


def save(folder: Path, **parts: Any) -> Path:
    import datasets

    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def sorted_by_class(pictures: Pictures) -> Pictures:
    """In the order in which folders of classes are read."""
    order = np.argsort(pictures.labels, kind="stable")
    return Pictures(pictures.images[order], pictures.labels[order])


def assert_same(found: Pictures, wanted: Pictures) -> None:
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    assert (str(found.images.dtype), str(found.labels.dtype)) == ("uint8", "int64")


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


TRAIN, TEST = noise(30), noise(9, seed=1)
TRAIN32, TEST32 = noise(30, 32), noise(9, 32, seed=1)


# --- whole ---


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_folders_of_classes(tmp_path: Path, ending: str) -> None:
    for part, pictures in (("train", TRAIN), ("test", TEST), ("val", noise(3))):
        write_classes(tmp_path / part, pictures, ending)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("left alone", encoding="utf-8")
    task = Images(path=str(tmp_path))
    train, test = task.read()
    assert_same(train, sorted_by_class(TRAIN))
    assert_same(test, sorted_by_class(TEST))
    assert (task.classes(), task.side()) == (tuple(NAMES), 8)


def test_a_test_set_may_be_named_val_and_lie_deeper_and_lack_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", TRAIN)
    write_classes(tmp_path / "val", Pictures(TEST.images, np.full(9, 2)))
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "deep")
    (tmp_path / "val" / "dog").mkdir()
    (tmp_path / "val" / "deep").rename(tmp_path / "val" / "dog" / "images")
    assert_same(Images(path=str(tmp_path)).read()[1], Pictures(TEST.images, np.full(9, 2)))


def test_where_there_is_no_test_set_a_part_of_each_class_is_held_out(tmp_path: Path) -> None:
    write_classes(tmp_path, TRAIN)
    train, test = Images(path=str(tmp_path), test_fraction=0.3).read()
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == ([7, 7, 7], [3, 3, 3])


def test_a_class_without_test_images_is_told(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", TRAIN)
    write_classes(tmp_path / "test", Pictures(TEST.images, np.full(9, 2)))
    task = Images(path=str(tmp_path), devices=2).load(0, None, tmp_path)
    assert task.notes == ("2 of 3 classes have no test image: bird, cat",)
    whole = Images(path=str(tmp_path / "train"), devices=2).load(0, None, tmp_path)
    assert whole.notes == ()
    message = refusal(Images(path=str(tmp_path / "train"), test_fraction=0.01).read)
    assert message == f"task.test_fraction = 0.01 of {tmp_path}/train is no test image; raise it"


def test_a_test_set_elsewhere_has_the_same_classes_by_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "a", TRAIN)
    write_classes(tmp_path / "b", Pictures(TEST.images, np.arange(9) % 2), names=["cat", "dog"])
    train, test = Images(path=str(tmp_path / "a"), test_path=str(tmp_path / "b")).read()
    assert_same(train, sorted_by_class(TRAIN))
    wanted = sorted_by_class(Pictures(TEST.images, np.arange(9) % 2))
    assert_same(test, Pictures(wanted.images, wanted.labels + 1))


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_sheets(tmp_path: Path, ending: str) -> None:
    train, test = noise(250), noise(100, seed=1)
    write_sheets(tmp_path, "train", train, ending, per_sheet=100)
    write_sheets(tmp_path, "val", test, ending)
    task = Images(path=f"{tmp_path}/set")
    assert_same(task.read()[0], train)
    assert_same(task.read()[1], test)
    assert (task.classes(), task.side()) == (tuple(NAMES), 8)
    (tmp_path / "set_classes.json").write_text(json.dumps({"ids": [1, 2], "names": NAMES}), encoding="utf-8")
    assert Images(path=f"{tmp_path}/set").classes() == tuple(NAMES)


def test_cifar10(tmp_path: Path) -> None:
    task = Images(path=str(write_cifar10(tmp_path, TRAIN32, TEST32)))
    train, test = task.read()
    order = np.concatenate([np.arange(30)[i::5] for i in range(5)])
    assert_same(train, Pictures(TRAIN32.images[order], TRAIN32.labels[order]))
    assert_same(test, TEST32)
    assert (task.classes(), task.side()) == (tuple(NAMES), 32)


def test_cifar100(tmp_path: Path) -> None:
    write_cifar100(tmp_path, TRAIN32, TEST32)
    fine, coarse = (Images(path=str(tmp_path), fine=each) for each in (True, False))
    assert_same(fine.read()[0], TRAIN32)
    assert_same(coarse.read()[1], Pictures(TEST32.images, TEST32.labels // 2))
    assert (fine.classes(), coarse.classes()) == (tuple(NAMES), ("flying", "running"))


def test_folders_of_datasets(tmp_path: Path) -> None:
    save(tmp_path / "both", train=table(TRAIN), validation=table(TEST))
    task = Images(path=str(tmp_path / "both"))
    assert_same(task.read()[0], TRAIN)
    assert_same(task.read()[1], TEST)
    assert (task.classes(), task.side()) == (tuple(NAMES), 8)
    single = table(TRAIN).select(range(29, -1, -1)).add_column("id", list(range(30)))  # with a map of its rows
    single.save_to_disk(tmp_path / "single")
    train, test = Images(path=str(tmp_path / "single"), test_path=str(tmp_path / "both" / "validation")).read()
    assert_same(train, Pictures(TRAIN.images[::-1], TRAIN.labels[::-1]))
    assert_same(test, TEST)


def test_a_column_of_labels_among_several(tmp_path: Path) -> None:
    import datasets

    made = table(TRAIN).add_column("even", [number % 2 for number in range(30)])
    made = made.cast_column("even", datasets.ClassLabel(names=["yes", "no"]))
    save(tmp_path / "a", train=made)
    task = Images(path=str(tmp_path / "a"), label="even")
    assert task.classes() == ("yes", "no")
    assert np.bincount(np.concatenate([part.labels for part in task.read()])).tolist() == [15, 15]
    assert "it has 2 (of its columns img, label, even); name one with task.label" in refusal(
        Images(path=str(tmp_path / "a")).classes
    )
    assert "task.label = 'evn' is no column of class labels; did you mean 'even'?" in refusal(
        Images(path=str(tmp_path / "a"), label="evn").classes
    )


def test_the_task(tmp_path: Path) -> None:
    pixels.write(tmp_path / "net", Pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 8))
    write_classes(tmp_path / "set" / "train", noise(90))
    write_classes(tmp_path / "set" / "test", TEST)
    task = Images(path=str(tmp_path / "set"), split="shards", devices=6, classes_per_device=1).load(
        0, [0] * 6, tmp_path / "net"
    )
    assert (task.labels, task.kinds, task.scored, len(task.names)) == (tuple(NAMES), tuple(NAMES), 1, 6)
    assert task.mix.tolist() == [[15 * (label == each) for each in range(3)] for label in task.mix.argmax(axis=1)]
    assert sum(map(len, task.test)) == 9
    shard = task.train[0]
    assert isinstance(shard, Photos)
    assert (shard.shift, shard.flip, shard.pixels.mean) == (1, True, (0.1, 0.2, 0.3))
    rows = np.arange(len(shard))
    inputs, targets = shard.batch(rows)
    assert set(targets[:, 0]) == {int(task.mix[0].argmax())}
    wanted = (shard.pictures.images[shard.rows] / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(inputs, wanted.transpose(0, 3, 1, 2), atol=1e-5)
    assert all(isinstance(each, Photos) and not each.shift and not each.flip for each in task.test)


def test_grey_images(tmp_path: Path) -> None:
    """One channel if all are grey; colours in one of them make three. A network of one channel takes no colours."""
    pixels.write(tmp_path / "net", Pixels((0.5,), (0.5,), 8))
    write_classes(tmp_path / "set", noise(30, 8, 1))
    task = Images(path=str(tmp_path / "set"), devices=2)
    assert task.read()[0].images.shape[3] == 1
    assert task.load(0, [], tmp_path / "net").train[0].batch(np.arange(2))[0].shape == (2, 1, 8, 8)
    (tmp_path / "set" / "cat" / "x.png").write_bytes(encoded(TRAIN.images[0]))
    mixed = Images(path=str(tmp_path / "set"), devices=2)
    assert mixed.read()[0].images.shape[3] == 3
    assert "the images have colours, and network net takes grey ones" in refusal(
        lambda: mixed.load(0, [], tmp_path / "net")
    )


# --- decoding ---


@given(width=st.integers(1, 40), height=st.integers(1, 40), side=st.integers(1, 40), channels=st.sampled_from([1, 3]))
def test_resizing_is_that_of_pillow_in_the_middle_square(width: int, height: int, side: int, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    square = picture(image).crop((left, top, left + short, top + short))
    wanted = np.asarray(square.resize((side, side), Image.Resampling.BILINEAR)).reshape(side, side, channels)
    found = resize(image[None], side)[0]
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_images(mode: str) -> None:
    image = picture(TRAIN.images[0]).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    found = read_all([Encoded("x", file.getvalue())], None)
    wanted = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("L" if mode in ("1", "L", "LA") else "RGB"))
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_photos_are_held_upright() -> None:
    image = noise(1, 8).images[0, :, :4]
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture(image).save(file, "PNG", exif=exif)
    turned = Encoded("x", file.getvalue())
    np.testing.assert_array_equal(decode(turned, "RGB"), np.rot90(image, -1))
    assert (decoding.head(turned).width, decoding.head(turned).height) == (8, 4)


def test_all_images_in_all_formats_can_be_resized(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_cifar10(tmp_path / "a", TRAIN32, TEST32)
    write_sheets(tmp_path, "train", noise(600), per_sheet=300)
    for path in (tmp_path / "a", tmp_path / "set"):
        task, resized = (Images(path=str(path), size=size) for size in (None, 12))
        np.testing.assert_array_equal(resized.read()[0].images, resize(task.read()[0].images, 12))
        assert (resized.side(), resized.read()[0].images.shape[1:]) == (12, (12, 12, 3))


# --- damaged ---


def test_images_of_mixed_size(tmp_path: Path) -> None:
    write_classes(tmp_path, TRAIN)
    (tmp_path / "cat" / "wide.png").write_bytes(encoded(TRAIN.images[0][:6]))
    (tmp_path / "dog" / "wide.png").write_bytes(encoded(TRAIN.images[0][:5]))
    assert refusal(Images(path=str(tmp_path)).read) == (
        f"the images differ in size: 30 of 8 x 8 ({tmp_path}/bird/000.png), 1 of 8 x 6 ({tmp_path}/cat/wide.png), 1 of"
        f" 8 x 5 ({tmp_path}/dog/wide.png); set task.size, for example task.size = 32, to crop and resize them to"
        " squares of one size"
    )
    assert Images(path=str(tmp_path), size=4).read()[0].images.shape[1:] == (4, 4, 3)


def test_images_that_are_not_square(tmp_path: Path) -> None:
    write_classes(tmp_path, Pictures(TRAIN.images[:, :6], TRAIN.labels))
    task = Images(path=str(tmp_path))
    assert f"the images are 8 x 6 pixels (such as {tmp_path}/bird/000.png), not square; set task.size" in refusal(
        task.read
    )
    assert "not square" in refusal(task.side)


def test_test_images_of_another_size(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", TRAIN)
    write_classes(tmp_path / "test", TEST32)
    assert "have a side of 8 pixels, test images of 32; task.size = 8 resizes them" in refusal(
        Images(path=str(tmp_path)).read
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(keep=st.floats(0, 0.9))
def test_truncated_images(tmp_path: Path, kind: str, keep: float) -> None:
    content = encoded(TRAIN32.images[0], kind)
    damaged = Encoded("some.file", content[: int(keep * len(content))])
    assert refusal(lambda: read_all([damaged], 8)).startswith("some.file ")


@settings(max_examples=60)
@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), data=st.data())
def test_damaged_images_give_an_image_or_a_message(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(TRAIN32.images[0], kind))
    for place in data.draw(st.lists(st.integers(0, min(len(content), 80) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        assert read_all([Encoded("some.file", bytes(content))], 8).shape[:3] == (1, 8, 8)
    except UserError as error:
        assert str(error).startswith("some.file ")


def test_files_that_are_no_images_that_can_be_read(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (12000, 12000)).save(bomb, "PNG")
    deep = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(deep, "PNG")
    for content, message in (
        (b"not an image", "is not a PNG, JPEG or WebP image, or is damaged"),
        (b"", "is not a PNG, JPEG or WebP image, or is damaged"),
        (encoded(TRAIN.images[0], "GIF"), "is not a PNG, JPEG or WebP image, or is damaged"),
        (bomb.getvalue(), "is too large an image: Image size (144000000 pixels) exceeds limit"),
        (deep.getvalue(), "has pixels of more than 8 bits (mode I;16); 8 bits per channel are read"),
    ):
        folder = write_classes(tmp_path / str(len(content)), TRAIN)
        (folder / "cat" / "x.png").write_bytes(content)
        assert refusal(Images(path=str(folder)).read).startswith(f"{folder}/cat/x.png {message}")


def test_more_images_than_memory_is_given_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LIMIT_BYTES", 2**20)
    write_classes(tmp_path, TRAIN)
    assert refusal(Images(path=str(tmp_path), size=128).read) == (
        "30 images of 128 x 128 pixels take 1.4 MiB of memory; the limit is 1.0 MiB; lower task.size, or take fewer"
        " images"
    )


def test_empty_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "a" / "train", TRAIN)
    (tmp_path / "a" / "train" / "fox").mkdir()
    folder = tmp_path / "a" / "train" / "fox"
    assert f"class 'fox' is empty: {folder} has no image" in refusal(Images(path=str(tmp_path / "a")).read)
    write_cifar100(tmp_path, TRAIN32, TEST32)
    (tmp_path / "fine_label_names.txt").write_text("\n".join([*NAMES, "fox", "owl"]), encoding="utf-8")
    assert (
        refusal(Images(path=str(tmp_path)).read) == f"2 of the 5 classes of {tmp_path} have no training image: fox, owl"
    )


def test_names_of_classes_that_are_no_text(tmp_path: Path) -> None:
    write_classes(tmp_path / "a", TRAIN)
    os.mkdir(os.fsencode(tmp_path / "a") + b"/x\xff")
    assert refusal(Images(path=str(tmp_path / "a")).read) == (
        f"{tmp_path}/a has a folder 'x\\udcff', whose name is not UTF-8 text; give it another name"
    )
    write_sheets(tmp_path, "train", noise(100))
    (tmp_path / "set_classes.json").write_text('["a",\n"\\ud83d"]', encoding="utf-8")
    assert f"{tmp_path}/set_classes.json, line 2: \\ud83d is half a char" in refusal(
        Images(path=f"{tmp_path}/set").read
    )


def test_classes_of_the_test_set_alone(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", TRAIN)
    write_classes(tmp_path / "test", TEST, names=["bird", "cat", "fox"])
    assert "test/fox is the folder of a class that has no training images" in refusal(Images(path=str(tmp_path)).read)
    task = Images(path=str(tmp_path / "train"), test_path=str(tmp_path / "test"))
    assert f"it has classes that {tmp_path}/train lacks: fox" in refusal(task.read)
    both = Images(path=str(tmp_path / "train"), test_path=str(write_cifar10(tmp_path, TRAIN32, TEST32)))
    assert "must have one set, of the same classes; it has two sets" in refusal(both.read)


def test_one_class_is_none(tmp_path: Path) -> None:
    write_classes(tmp_path, Pictures(TRAIN.images, np.zeros(30, int)))
    assert "must have at least two classes, each with a name of its own; got ('bird',)" in refusal(
        Images(path=str(tmp_path)).read
    )
    write_classes(tmp_path / "x" / "train", TRAIN)
    (tmp_path / "x" / "test").mkdir()
    assert "x/test has no images: there must be a sub-folder" in refusal(Images(path=str(tmp_path / "x")).read)


def test_labels_that_are_missing_or_of_no_class(tmp_path: Path) -> None:
    write_cifar10(tmp_path, TRAIN32, Pictures(TEST32.images, TEST32.labels + 1))
    assert refusal(Images(path=str(tmp_path)).read) == (
        f"3 of the 9 images of the test set of {tmp_path} have no label of the 3 classes; the first is image 2 with"
        " label 3"
    )
    save(tmp_path / "d", train=table(Pictures(TRAIN.images, np.where(np.arange(30) == 4, -1, TRAIN.labels))))
    assert "1 of the 30 images of the training set" in refusal(Images(path=str(tmp_path / "d")).read)


def test_damaged_sheets(tmp_path: Path) -> None:
    def fails() -> str:
        return refusal(Images(path=f"{tmp_path}/set").read)

    def fresh() -> None:
        write_sheets(tmp_path, "train", noise(100), per_sheet=50)

    fresh()
    (tmp_path / "set_train_labels.npy").unlink()
    assert fails() == f"{tmp_path}/set_train_labels.npy is missing: it goes with the other files there"
    np.save(tmp_path / "set_train_labels.npy", np.array([{}, 1], object), allow_pickle=True)
    assert "set_train_labels.npy cannot be read as an array of numbers: Object arrays" in fails()
    np.save(tmp_path / "set_train_labels.npy", np.zeros(100))
    assert "must hold one integer per image" in fails()
    np.save(tmp_path / "set_train_labels.npy", np.zeros(99, int))
    assert "has 99 labels for the 100 images of 2 sheets" in fails()
    fresh()
    (tmp_path / "set_train_01.png").unlink()
    assert "has 100 labels for the 50 images of 1 sheets" in fails()
    (tmp_path / "set_train_01.png").write_bytes(encoded(noise(1, 32).images[0]))
    assert "is no sheet of images of 8 x 8, 50 in a row: it has 32 x 32 pixels" in fails()
    fresh()
    (tmp_path / "set_classes.json").write_text("{}", encoding="utf-8")
    assert "set_classes.json must hold a list of the names of the classes" in fails()
    (tmp_path / "set_classes.json").write_text("{", encoding="utf-8")
    assert "set_classes.json cannot be read as JSON" in fails()
    fresh()
    for each in tmp_path.glob("*.png"):
        each.unlink()
    assert "there is no" in fails()


def test_damaged_cifar(tmp_path: Path) -> None:
    def fails() -> str:
        return refusal(Images(path=str(tmp_path)).read)

    write_cifar10(tmp_path, TRAIN32, TEST32)
    whole = (tmp_path / "data_batch_3.bin").read_bytes()
    (tmp_path / "data_batch_3.bin").write_bytes(whole[:-1])
    assert fails() == (
        f"{tmp_path}/data_batch_3.bin is truncated, or of another kind: its {6 * 3073 - 1} bytes are no multiple of the"
        " 3073 of a record"
    )
    (tmp_path / "data_batch_3.bin").write_bytes(b"")
    assert "its 0 bytes" in fails()
    (tmp_path / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin is missing" in fails()
    (tmp_path / "batches.meta.txt").unlink()
    assert "batches.meta.txt is missing" in fails()


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    for folder, name in (("cifar-10-batches-py", "data_batch_1"), ("cifar-100-python", "train")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(pickle.dumps(Trap()))
        message = refusal(Images(path=str(tmp_path / folder)).read)
        assert message.startswith(f"{tmp_path / folder} has CIFAR's python version, which is pickled")
        assert "cifar-10-binary.tar.gz" in message
    assert not (tmp_path / "sprung").exists()


def test_damaged_folders_of_datasets(tmp_path: Path) -> None:
    def fails(path: Path) -> str:
        return refusal(Images(path=str(path)).read)

    save(tmp_path / "a", train=table(TRAIN))
    arrow = next((tmp_path / "a" / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "a cannot be read as a folder of the `datasets` library: " in fails(tmp_path / "a")
    save(tmp_path / "b", train=table(TRAIN).remove_columns("label"))
    assert "must have one column of class labels, it has 0 (of its columns img); name one" in fails(tmp_path / "b")
    save(tmp_path / "c", train=table(TRAIN).remove_columns("img"))
    assert "must have one column of images, it has 0 (of its columns label); keep one" in fails(tmp_path / "c")
    save(tmp_path / "d", test=table(TRAIN))
    assert "has no part 'train'; accepted: test" in fails(tmp_path / "d")
    save(tmp_path / "e", train=table(TRAIN), test=table(TEST, ["cat", "bird", "dog"]))
    assert "columns 'img' and 'label' of part 'test' differ from those of 'train'" in fails(tmp_path / "e")
    import datasets

    torn = table(TRAIN).cast_column("img", datasets.Image(decode=False)).to_dict()
    torn["img"][7] = None
    torn["img"][9] = {"bytes": b"torn", "path": None}
    save(tmp_path / "f", train=datasets.Dataset.from_dict(torn, features=table(TRAIN).features))
    assert "f: train: image 7 is missing: the column 'img' must hold the files themselves" in fails(tmp_path / "f")
    torn["img"][7] = torn["img"][8]
    save(tmp_path / "g", train=datasets.Dataset.from_dict(torn, features=table(TRAIN).features))
    assert "g: train: image 9 is not a PNG, JPEG or WebP image, or is damaged" in fails(tmp_path / "g")


def test_there_is_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, what in (
        ("none", "does not exist"),
        ("file.zip", "has none of the formats that can be read"),
        ("empty", "has none of the formats that can be read"),
    ):
        message = refusal(Images(path=str(tmp_path / name)).classes)
        assert message.startswith(f"{tmp_path / name} {what}: a folder with the binary version of CIFAR-10")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "task.size must be at least 1, got 0"),
        ({"test_fraction": 1.0}, "task.test_fraction must be above 0 and below 1, got 1.0"),
        ({"devices": 0}, "task.devices must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    assert refusal(lambda: Images(path="x", **fields)) == message


def test_a_plan_reads_names_and_one_head_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*arguments: Any) -> None:
        raise AssertionError("an image was decoded")

    write_classes(tmp_path / "a", TRAIN)
    write_sheets(tmp_path, "train", noise(50))
    monkeypatch.setattr(decoding, "decode", decoded)
    monkeypatch.setattr("lamina.data.formats.decode", decoded)
    for name in ("a", "set"):
        task = Images(path=str(tmp_path / name))
        assert (task.classes(), task.side(), task.device_count()) == (tuple(NAMES), 8, 100)

"""Image folders as people have them, and loaders that depend on nothing but their seed."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from secateurs.data import DataSource, load_data, loader, read_image
from secateurs.data.source import stratified_split
from secateurs.errors import DataError

MakeFolder = Callable[..., Path]
TWO_CLASSES = {"train/cat": 10, "train/dog": 6, "test/cat": 2, "test/dog": 3}


def load(root: Path, **settings: Any) -> DataSource:
    return load_data(root, image_size=8, **settings)


# --- the parts of a folder ---------------------------------------------------------------------------------


def test_folder_with_train_and_test_holds_out_a_validation_part(make_folder: MakeFolder) -> None:
    data = load(make_folder(TWO_CLASSES), val_share=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (13, 3, 5)
    assert Counter(data.val.labels) == {0: 2, 1: 1}
    assert data.class_names == ("cat", "dog")
    assert data.input_size == (3, 8, 8)
    assert set(data.train.numbers).isdisjoint(data.val.numbers)
    assert data.notes == ("no val/: 3 of the training images are held out for validation (seed 0)",)
    image, label = data.train[0]
    assert (image.shape, image.dtype, label) == ((3, 8, 8), torch.float32, 0)


def test_all_three_folders_need_no_split_and_no_note(make_folder: MakeFolder) -> None:
    data = load(make_folder({**TWO_CLASSES, "valid/cat": 1, "valid/dog": 1}))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 5)
    assert data.notes == ()


def test_no_test_folder_takes_the_same_split_at_every_seed_and_says_so(make_folder: MakeFolder) -> None:
    root = make_folder({"train/cat": 10, "train/dog": 10})
    one, two = load(root, seed=1), load(root, seed=2)
    assert one.test.numbers == two.test.numbers
    assert one.val.numbers != two.val.numbers
    assert Counter(one.test.labels) == {0: 2, 1: 2}
    assert one.notes[0].startswith("no test/: 4 of the training images, the same at every run, are held out")


@pytest.mark.parametrize("layout", [{".": 10}, {"train": 10, "test": 3}], ids=["flat", "parts"])
def test_images_without_folders_of_classes_come_without_labels(
    make_folder: MakeFolder, layout: dict[str, int]
) -> None:
    root = make_folder(layout)
    data, again = load(root, val_share=0.25), load(root, val_share=0.25)
    test = layout.get("test", 2)
    val = 2
    assert (len(data.train), len(data.val), len(data.test)) == (sum(layout.values()) - test - val, val, test)
    assert not data.is_labelled and data.class_names == ()
    assert {*data.train.labels, *data.val.labels, *data.test.labels} == {-1}
    assert data.notes[0].startswith("no folders of classes: the images of")
    assert f"{data}".startswith(f"{root}: no classes, ")
    assert data.val.numbers == again.val.numbers
    assert len({load(root, val_share=0.25, seed=seed).val.numbers for seed in range(4)}) > 1
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):
        torch.nn.functional.cross_entropy(torch.zeros(1, 3), torch.tensor([data.val[0][1]]))


def test_a_text_beside_folders_of_classes_is_no_loose_image(make_folder: MakeFolder) -> None:
    root = make_folder({"cat": 10, "dog": 10})
    (root / "README.txt").write_text("photographs of 2024")
    assert load(root).class_names == ("cat", "dog")


def test_a_folder_of_texts_has_no_image(make_folder: MakeFolder) -> None:
    root = make_folder({})
    (root / "README.txt").write_text("photographs of 2024")
    with pytest.raises(
        DataError, match=r"no image in images/: no file of it can be decoded \(not an image\)"
    ):
        load(root)


def test_folders_of_classes_without_train_are_taken_and_said(make_folder: MakeFolder) -> None:
    data = load(make_folder({"cat": 5, "dog": 5}))
    assert len(data.train) + len(data.val) + len(data.test) == 10
    assert data.notes[0].startswith("no train/: the 2 folders of")


def test_ranking_is_the_training_images_in_order_without_augmentation(make_folder: MakeFolder) -> None:
    data = load(make_folder(TWO_CLASSES))
    assert data.ranking.numbers == data.train.numbers
    assert data.ranking[3][0].equal(data.ranking[3][0])
    assert not data.train[3][0].equal(data.train[3][0])
    assert load(Path(data.name), augment=False).train[3][0].equal(data.ranking[3][0])


def test_nested_folders_hidden_files_and_litter(make_folder: MakeFolder) -> None:
    root = make_folder({**TWO_CLASSES, "train/cat/more": 2})
    (root / "train/.cache").mkdir()
    (root / "train/cat/.DS_Store").write_bytes(b"?")
    (root / "train/cat/Thumbs.db").write_bytes(b"?")
    data = load(root)
    assert len(data.train) + len(data.val) == 18
    assert data.skipped == ()


# --- folders that cannot be used ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({}, r"the folder '.*images' is empty: it holds no folder of images"),
        ({"cat": 3}, r"has no train/ folder \(it holds cat/\)"),
        ({"test/cat": 3, "test/dog": 3}, r"has no train/ folder \(it holds test/\)"),
        ({"train": 0}, r"train' is empty: it holds no folder of a class"),
        ({"train": 2}, "the folder train/ has too few images to hold some out as val/"),
        ({"train": 5, "test/cat": 2}, "train/ has images without classes, but test/ has the classes cat"),
        ({"cat": 2, "dog": 2, ".": 1}, r"images' mixes loose images \(000\.png\) and folders \(cat, dog\)"),
        (
            {"train/cat": 2, "train/dog": 2, "train": 1},
            r"train' mixes loose images .* and folders \(cat, dog\)",
        ),
        ({"train/cat": 3}, "there is one class only, 'cat', and a classifier needs two or more"),
        ({"train/cat": 3, "train/dog": 0}, "class 'dog' has no image in train/: its folder is empty"),
        ({"train/cat": 3, "train/dog": 1}, "class 'dog' has too few images to hold some out as test/"),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/Dog": 1},
            "train/ and test/ have different classes: only train/ has 'dog'; only test/ has 'Dog'",
        ),
        (
            {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/dog": 1, "test/owl": 1},
            "train/ and test/ have different classes: only test/ has 'owl'$",
        ),
        ({**TWO_CLASSES, "val/cat": 1}, "train/ and val/ have different classes: only train/ has 'dog'"),
        ({**TWO_CLASSES, "val/cat": 1, "val/dog": 0}, "class 'dog' has no image in val/: its folder is emp"),
    ],
)
def test_unusable_folders_get_one_clear_sentence(
    make_folder: MakeFolder, counts: dict[str, int], sentence: str
) -> None:
    root = make_folder(counts)
    with pytest.raises(DataError, match=f"(?m){sentence}"):
        load(root)


def test_missing_path_and_file_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '.*nowhere'"):
        load(tmp_path / "nowhere")
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"file\.zip' is a file, but a folder of images is needed"):
        load(tmp_path / "file.zip")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"image_size": 0}, "got image_size=0"),
        ({"channels": 4}, "got channels=4"),
        ({"mean": (0.5,), "channels": 3}, "mean and std need 3 values each"),
        ({"std": (0.0,)}, "every value of std must be positive"),
        ({"val_share": 1.0}, "got val_share=1.0"),
    ],
)
def test_unusable_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load_data("digits", **settings)


# --- files that cannot be decoded --------------------------------------------------------------------------


@pytest.fixture
def broken_folder(make_folder: MakeFolder) -> Path:
    root = make_folder(TWO_CLASSES)
    photo = root / "train/cat/photo.jpg"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(photo)
    whole = photo.read_bytes()
    photo.write_bytes(whole[: len(whole) // 2])
    (root / "train/dog/empty.png").write_bytes(b"")
    (root / "test/dog/notes.txt").write_text("not an image")
    damaged = root / "test/cat/damaged.png"
    shutil.copy(root / "train/cat/000.png", damaged)
    data = bytearray(damaged.read_bytes())
    data[60:90] = bytes(30)
    damaged.write_bytes(bytes(data))
    return root


@pytest.mark.parametrize("cache_bytes", [0, 2**30], ids=["checked small", "checked and kept"])
def test_undecodable_files_are_skipped_counted_and_named(broken_folder: Path, cache_bytes: int) -> None:
    data = load(broken_folder, cache_bytes=cache_bytes)
    names = {str(file.path.relative_to(broken_folder)) for file in data.skipped}
    in_train = {"train/cat/photo.jpg", "train/dog/empty.png"}
    assert names == in_train | {"test/dog/notes.txt", "test/cat/damaged.png"}
    assert (len(data.train) + len(data.val), len(data.test)) == (16, 5)
    (note,) = [note for note in data.notes if note.startswith("skipped 4 files that cannot be decoded: ")]
    assert all(name in note for name in names)
    assert "notes.txt (not an image)" in note
    assert "truncated" in note


def test_class_with_broken_files_only_says_why(make_folder: MakeFolder) -> None:
    root = make_folder({"train/cat": 4, "train/dog": 0, "test/cat": 1, "test/dog": 1})
    (root / "train/dog/a.jpg").write_bytes(b"not a photograph")
    with pytest.raises(DataError, match=r"class 'dog' has no image in train/: .* decoded \(not an image\)"):
        load(root)


def test_file_that_vanishes_after_the_start(make_folder: MakeFolder) -> None:
    root = make_folder(TWO_CLASSES)
    data = load(root, cache_bytes=0)
    shutil.rmtree(root / "test")
    with pytest.raises(DataError, match=r"image can no longer be read: no such file"):
        data.test[0]


def test_cached_and_uncached_images_are_the_same(make_folder: MakeFolder) -> None:
    root = make_folder(TWO_CLASSES)
    kept, read = load(root), load(root, cache_bytes=0)
    assert all(kept.ranking[index][0].equal(read.ranking[index][0]) for index in range(len(kept.ranking)))


# --- colour modes and shapes -------------------------------------------------------------------------------

RED = (200, 30, 30)


def red_palette() -> Image.Image:
    return Image.new("RGB", (30, 20), RED).quantize(4)


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (30, 20), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 15, 20))
    return image


def grey_16_bit() -> Image.Image:
    return Image.fromarray(np.full((20, 30), 30000, dtype=np.uint16))


@pytest.mark.parametrize(
    ("image", "suffix", "left", "right"),
    [
        (Image.new("RGB", (30, 20), RED), "png", RED, RED),
        (Image.new("RGB", (30, 20), RED), "jpg", RED, RED),
        (Image.new("L", (30, 20), 77), "png", (77,) * 3, (77,) * 3),
        (Image.new("1", (30, 20), 1), "png", (255,) * 3, (255,) * 3),
        (Image.new("RGB", (30, 20), RED).convert("CMYK"), "jpg", RED, RED),
        (Image.new("RGB", (30, 20), RED).convert("CMYK"), "tif", RED, RED),
        (red_palette(), "png", RED, RED),
        (red_palette(), "gif", RED, RED),
        (half_transparent(), "png", (255,) * 3, RED),
        (half_transparent(), "webp", (255,) * 3, RED),
        (half_transparent().convert("LA"), "png", (255,) * 3, (81,) * 3),
        (half_transparent().quantize(4), "png", (255,) * 3, RED),
        (grey_16_bit(), "png", (117,) * 3, (117,) * 3),
        (grey_16_bit(), "tif", (117,) * 3, (117,) * 3),
        (Image.new("I", (30, 20), 30000), "tif", (117,) * 3, (117,) * 3),
        (Image.new("F", (30, 20), 0.5), "tif", (128,) * 3, (128,) * 3),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_every_colour_mode_gives_the_colours_that_one_sees(
    tmp_path: Path, image: Image.Image, suffix: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    path = tmp_path / f"image.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    pixels = read_image(path, shorter_side=20)
    assert (pixels.shape, pixels.dtype) == ((3, 20, 30), torch.uint8)
    for column, colour in ((2, left), (27, right)):
        assert (pixels[:, 10, column].int() - torch.tensor(colour)).abs().max() <= 3


def test_phone_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.jpg", exif=exif)
    pixels = read_image(tmp_path / "a.jpg", shorter_side=10)
    assert pixels.shape == (3, 20, 10)
    assert pixels[:, 3].max() < 60 and pixels[:, 16].min() > 200


def test_sliver_does_not_become_a_million_columns(tmp_path: Path) -> None:
    Image.new("L", (3000, 1), 9).save(tmp_path / "sliver.png")
    assert read_image(tmp_path / "sliver.png", shorter_side=16).shape == (3, 16, 64)


def test_grey_images_for_a_one_channel_network(make_folder: MakeFolder) -> None:
    data = load(make_folder(TWO_CLASSES), channels=1)
    assert data.train[0][0].shape == data.input_size == (1, 8, 8)


def test_evaluation_image_is_the_normalised_centre(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / "train" / place).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), RED).save(tmp_path / "train" / place / f"{number}.png")
    data = load(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    expected = [(value / 255 - 0.5) / std for value, std in zip(RED, (0.5, 0.25, 1.0), strict=True)]
    assert data.val[0][0].mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-6)


# --- digits and splits -------------------------------------------------------------------------------------


def test_digits_are_all_there_once_and_in_ten_classes() -> None:
    data = load_data()
    parts = [data.train, data.val, data.test]
    assert sorted(number for part in parts for number in part.numbers) == list(range(1797))
    assert all(set(part.labels) == set(range(10)) for part in parts)
    assert load_data(seed=3).test.numbers == data.test.numbers
    pixels = torch.stack([image for image, _ in data.ranking])
    assert abs(pixels.mean().item()) < 0.05 and abs(pixels.std().item() - 1) < 0.05


def test_digits_of_another_size_and_in_colour() -> None:
    data = load_data("digits", image_size=32, channels=3)
    assert data.test[0][0].shape == data.input_size == (3, 32, 32)


@pytest.mark.parametrize(
    ("sizes", "share"), [((2, 2), 0.01), ((2, 2), 0.99), ((10, 90), 0.1), ((7, 3, 5), 0.5)]
)
def test_split_leaves_every_class_on_both_sides(sizes: tuple[int, ...], share: float) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    stay, off = stratified_split(labels, share, seed=0)
    assert sorted(stay + off) == list(range(len(labels)))
    counts = Counter(labels[index] for index in off)
    for label, size in enumerate(sizes):
        assert 1 <= counts[label] <= size - 1
        assert abs(counts[label] - share * size) <= 1


# --- the loader --------------------------------------------------------------------------------------------


def batches(data: DataSource, **settings: Any) -> Tensor:
    settings = {"batch_size": 5, "shuffle": True, "seed": 1, **settings}
    return torch.cat([images for images, _ in loader(data.train, **settings)])


def test_loader_depends_on_its_seed_alone() -> None:
    data = load_data()
    first = batches(data)
    torch.manual_seed(99)
    assert batches(data, batch_size=64).equal(first)
    assert batches(data, batch_size=64, workers=1).equal(first)
    assert not batches(data, seed=2).equal(first)


def test_same_image_is_augmented_differently_in_another_epoch() -> None:
    data = load_data()
    one, two = (batches(data, shuffle=False, seed=seed) for seed in (1, 2))
    changed = (one != two).flatten(1).any(dim=1).float().mean()
    assert changed > 0.9


def test_loader_leaves_no_trace_in_the_random_state() -> None:
    data = load_data()
    before = torch.get_rng_state()
    batches(data)
    assert torch.get_rng_state().equal(before)


class SaysItsThreads(Dataset[int]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        return torch.get_num_threads()


def test_images_are_prepared_on_one_thread_and_the_others_come_back() -> None:
    torch.set_num_threads(2)
    (batch,) = loader(SaysItsThreads(), batch_size=3, shuffle=True, seed=0)
    assert batch.tolist() == [1, 1, 1]
    assert torch.get_num_threads() == 2


def test_unshuffled_loader_keeps_the_order() -> None:
    data = load_data()
    labels = torch.cat([labels for _, labels in loader(data.test, batch_size=7, shuffle=False, seed=0)])
    assert labels.tolist() == list(data.test.labels)


@pytest.mark.slow
def test_real_photographs(shared_data: Path) -> None:
    data = load_data(shared_data / "catsdogs", image_size=160)
    assert (len(data.train), len(data.val), len(data.test)) == (1800, 200, 800)
    assert data.skipped == ()

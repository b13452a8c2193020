"""Image folders: ``train/``, ``test/`` and ``val/`` with a folder a class, or images without classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from secateurs.data.images import ImageFiles, files_in, image_paths, is_named_as_image, sub_folders
from secateurs.data.loading import ImageFormat, ImageSet
from secateurs.data.source import (
    NO_LABEL,
    TEST_SEED,
    TEST_SHARE,
    DataSource,
    SkippedFile,
    stratified_split,
)
from secateurs.errors import DataError, some

_PART_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_NAMED_FILES = 20  # of the files that are skipped, in the note; the list itself has them all
_ENLARGE = 256 / 224  # the shorter side is resized to this many times the centre crop
_LAYOUT = "lay the folder out as DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, with two classes or more"
_NAMELESS = ("",)  # images without classes are one class without a name, whose folder is the part's own


@dataclass(slots=True)
class _Part:
    """The files of one folder such as ``train/``, and the class of each."""

    folder: Path
    numbers: list[int]
    labels: list[int]

    def take(self, indices: list[int]) -> _Part:
        numbers, labels = ([values[index] for index in indices] for values in (self.numbers, self.labels))
        return _Part(self.folder, numbers, labels)


def folder_source(
    root: Path, form: ImageFormat, *, val_share: float, seed: int, augment: bool, cache_bytes: int
) -> DataSource:
    """The images below ``root``; see `secateurs.data.load_data`."""
    folders, notes = _find_parts(root)
    names = _class_names(folders)
    parts, paths = _list_files(folders, names)
    side = round(form.image_size * _ENLARGE)
    files = ImageFiles(paths, shorter_side=side, channels=form.channels, cache_bytes=cache_bytes)
    broken = files.check()
    for part in parts.values():
        _drop_broken(part, broken, names)
    skipped = tuple(SkippedFile(path=paths[number], reason=why) for number, why in broken.items())
    if skipped:
        notes.append(_skipped_note(skipped, root))
    if "test" not in parts:
        _split_off(parts, "test", TEST_SHARE, TEST_SEED, names)
        notes.append(f"no test/: {_count(parts['test'])}, the same at every run, are held out as a test set")
    if "val" not in parts:
        _split_off(parts, "val", val_share, seed, names)
        notes.append(f"no val/: {_count(parts['val'])} are held out for validation (seed {seed})")
    if names == _NAMELESS:
        notes.insert(0, f"no folders of classes: the images of {root} come without labels")
        for part in parts.values():
            part.labels = [NO_LABEL] * len(part.numbers)
    plain = form.plain()
    varied = form.vary_photo() if augment else plain
    sets = {name: ImageSet(files, part.numbers, part.labels, plain) for name, part in parts.items()}
    return DataSource(
        name=str(root),
        train=ImageSet(files, parts["train"].numbers, parts["train"].labels, varied),
        ranking=sets["train"],
        val=sets["val"],
        test=sets["test"],
        class_names=() if names == _NAMELESS else names,
        input_size=form.input_size,
        mean=form.mean,
        std=form.std,
        notes=tuple(notes),
        skipped=skipped,
        is_labelled=names != _NAMELESS,
    )


def _find_parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    if not root.exists():
        raise DataError(f"there is no folder {str(root)!r}", fix=_LAYOUT)
    if not root.is_dir():
        raise DataError(f"{str(root)!r} is a file, but a folder of images is needed", fix=_LAYOUT)
    present = {folder.name.lower(): folder for folder in sub_folders(root)}
    folders = {
        part: next(present[name] for name in names if name in present)
        for part, names in _PART_NAMES.items()
        if any(name in present for name in names)
    }
    if "train" in folders:
        return folders, []
    _check_not_mixed(root)
    if not present and files_in(root):
        return {"train": root}, []
    if not present:
        raise DataError(f"the folder {str(root)!r} is empty: it holds no folder of images", fix=_LAYOUT)
    if folders or len(present) < 2:
        found = ", ".join(f"{name}/" for name in present)
        raise DataError(f"{str(root)!r} has no train/ folder (it holds {found})", fix=_LAYOUT)
    return {"train": root}, [f"no train/: the {len(present)} folders of {root} are taken as classes"]


def _check_not_mixed(folder: Path) -> None:
    """Refuse images beside folders: it is not clear whether the folders are classes."""
    loose = [path.name for path in files_in(folder) if is_named_as_image(path)]
    inside = [entry.name for entry in sub_folders(folder)]
    if loose and inside:
        raise DataError(
            f"{str(folder)!r} mixes loose images ({some(loose)}) and folders ({some(inside)})",
            where=str(folder),
            fix="move each image into the folder of its class, or all images into one folder without others",
        )


def _class_names(folders: dict[str, Path]) -> tuple[str, ...]:
    for folder in folders.values():
        _check_not_mixed(folder)
    names = {part: tuple(entry.name for entry in sub_folders(folder)) for part, folder in folders.items()}
    train = names["train"]
    if not train and files_in(folders["train"]):
        return _nameless(folders, names)
    if not train:
        raise DataError(f"{str(folders['train'])!r} is empty: it holds no folder of a class", fix=_LAYOUT)
    if len(train) == 1:
        raise DataError(
            f"there is one class only, {train[0]!r}, and a classifier needs two or more",
            where=str(folders["train"]),
            fix=_LAYOUT,
        )
    for part, own in names.items():
        if own != train:
            _raise_classes_differ(folders, part, set(train) - set(own), set(own) - set(train))
    return train


def _nameless(folders: dict[str, Path], names: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The one class of images without classes, if no part has any."""
    for part, own in names.items():
        if own:
            raise DataError(
                f"{folders['train'].name}/ has images without classes, but {folders[part].name}/ has the "
                f"classes {some(list(own))}",
                where=str(folders[part]),
                fix="give every part a folder for each class, or none",
            )
    return _NAMELESS


def _raise_classes_differ(folders: dict[str, Path], part: str, missing: set[str], extra: set[str]) -> None:
    train, other = folders["train"].name, folders[part].name
    sides = [f"only {train}/ has {', '.join(map(repr, sorted(missing)))}"] if missing else []
    sides += [f"only {other}/ has {', '.join(map(repr, sorted(extra)))}"] if extra else []
    raise DataError(
        f"{train}/ and {other}/ have different classes: {'; '.join(sides)}",
        where=str(folders[part]),
        fix=f"give {other}/ the same folders as {train}/",
    )


def _list_files(folders: dict[str, Path], names: tuple[str, ...]) -> tuple[dict[str, _Part], list[Path]]:
    parts: dict[str, _Part] = {}
    paths: list[Path] = []
    for name, folder in folders.items():
        part = parts[name] = _Part(folder, [], [])
        for label, class_name in enumerate(names):
            found = image_paths(folder / class_name)
            part.numbers += range(len(paths), len(paths) + len(found))
            part.labels += [label] * len(found)
            paths += found
    return parts, paths


def _drop_broken(part: _Part, broken: dict[int, str], names: tuple[str, ...]) -> None:
    places = list(enumerate(part.numbers))
    bad = {part.labels[place]: broken[number] for place, number in places if number in broken}
    kept = part.take([place for place, number in places if number not in broken])
    for label in sorted(set(range(len(names))) - set(kept.labels)):
        why = f"no file of it can be decoded ({bad[label]})" if label in bad else "its folder is empty"
        named = f"class {names[label]!r} has no image in" if names[label] else "there is no image in"
        raise DataError(
            f"{named} {part.folder.name}/: {why}",
            where=str(part.folder / names[label]),
            fix=_LAYOUT,
        )
    part.numbers, part.labels = kept.numbers, kept.labels


def _split_off(parts: dict[str, _Part], name: str, share: float, seed: int, names: tuple[str, ...]) -> None:
    train = parts["train"]
    sizes = Counter(train.labels)
    for label, class_name in enumerate(names):
        if sizes[label] < 2:
            owner = f"class {class_name!r}" if class_name else f"the folder {train.folder.name}/"
            raise DataError(
                f"{owner} has too few images to hold some out as {name}/",
                where=str(train.folder / class_name),
                fix=f"add images, or give {name}/ of your own",
            )
    stay, off = stratified_split(train.labels, share, seed)
    parts["train"], parts[name] = train.take(stay), train.take(off)


def _count(part: _Part) -> str:
    return f"{len(part.numbers)} of the training images"


def _skipped_note(skipped: tuple[SkippedFile, ...], root: Path) -> str:
    named = [f"{file.path.relative_to(root)} ({file.reason})" for file in skipped[:_NAMED_FILES]]
    more = [f"and {len(skipped) - _NAMED_FILES} more"] if len(skipped) > _NAMED_FILES else []
    files = "1 file" if len(skipped) == 1 else f"{len(skipped)} files"
    return f"skipped {files} that cannot be decoded: {', '.join(named + more)}"

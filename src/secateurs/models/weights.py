"""Weights from a file, without executing anything that the file holds."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateurs.errors import ModelError, some
from secateurs.models.heads import NewHead

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts put the weights under
_PREFIXES = ("module.", "_orig_mod.")  # of nn.DataParallel and torch.compile
_RESAVE = "torch.save(model.state_dict(), 'weights.pth'), and pass that file"


def is_weights_file(weights: str) -> bool:
    """Whether a ``weights`` argument means a file and not the name of published weights."""
    return weights.endswith(_SUFFIXES) or "/" in weights or Path(weights).is_file()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or a PyTorch checkpoint, by name.

    A checkpoint may hold the weights themselves or have them under ``state_dict`` or ``model``. It is read
    with ``weights_only=True``: one that needs code to be executed is refused.

    Args:
        path: The file.

    Returns:
        Tensors on the CPU by parameter name, without the prefixes of wrappers.

    Raises:
        ModelError: The file is missing, damaged, holds no weights or would execute code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"module.bias": torch.zeros(2)}}, f"{folder}/a.pth")
        ...     read_weights(f"{folder}/a.pth")
        {'bias': tensor([0., 0.])}
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no weights file {str(path)!r}")
    found: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{path.name} holds no weights by name", where=str(path), fix=_RESAVE)
    strangers = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if strangers:
        raise ModelError(
            f"{path.name} holds more than tensors: {some(strangers)}", where=str(path), fix=_RESAVE
        )
    return {_without_prefixes(str(name)): value for name, value in found.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path.name} is not a whole safetensors file: {error}", where=str(path)) from error


def _read_checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" not in str(error):
            raise ModelError(f"{path.name} is not a whole PyTorch checkpoint", where=str(path)) from error
        raise ModelError(
            f"{path.name} can only be read by executing code that it names, which Secateurs never does",
            where=str(path),
            fix=f"where you trust the file: {_RESAVE}",
        ) from error
    except Exception as error:  # a damaged archive raises anything
        raise ModelError(f"{path.name} is not a whole PyTorch checkpoint", where=str(path)) from error


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def fit_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, name: str, where: str, head: NewHead | None
) -> None:
    """Copy weights into a model, all of them or none.

    Where a head was exchanged, the weights of a head are copied only if they fit as a whole: ImageNet's 1000
    classes are left out. Counters of batch norms (``num_batches_tracked``) may be missing.

    Args:
        model: Changed in place.
        weights: Tensors by name.
        name: What to call the model in an error.
        where: What to call the weights in an error.
        head: What was exchanged.

    Raises:
        ModelError: A name is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    given = dict(weights)
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    if head is not None and not _head_fits(own, given, head):
        kept = own.keys() - set(head.parameters)
        given = {key: value for key, value in given.items() if not _is_below(key, head.place) or key in kept}
        optional |= set(head.parameters)
    troubles = _differences(own, given, optional)
    if troubles:
        other_classes = head is None and given.keys() - optional == own.keys() - optional
        fix = "choose head='linear' if it was trained for other classes" if other_classes else None
        raise ModelError(f"the weights do not fit {name}: {'; '.join(troubles)}", where=where, fix=fix)
    model.load_state_dict(given, strict=False)


def _head_fits(own: Mapping[str, Tensor], given: Mapping[str, Tensor], head: NewHead) -> bool:
    return all(key in given and given[key].shape == own[key].shape for key in head.parameters)


def _is_below(key: str, place: str) -> bool:
    return key.startswith(f"{place}.")


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: set[str]) -> list[str]:
    missing = [key for key in own if key not in given and key not in optional]
    unexpected = [key for key in given if key not in own]
    reshaped = [
        f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in given.items()
        if key in own and own[key].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in kinds if keys]

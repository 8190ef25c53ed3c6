"""The tensors in a folder of *.safetensors, read with the safetensors library."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read on demand."""

    file: Any  # from safetensors
    name: str
    place: tuple[str, int]  # the file's path, and the tensor's rank in it
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int | None  # in the file, of FP8

    def read(self):
        if self.offset is None:
            return self.file.get_tensor(self.name)
        # The library cannot give numpy an FP8 tensor: numpy itself has no such type.
        count = int(np.prod(self.shape, dtype=np.int64))
        values = np.fromfile(self.place[0], self.dtype, count, offset=self.offset)
        return values.reshape(self.shape)


_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
}


def open_folder(folder):
    """{name: StoredTensor} of all files of a folder.

    Raises:
      FileNotFoundError: there is no file, or one that the index names is missing.
      ValueError: names the file that is damaged, and what is wrong.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names, named_by = _names_in_index(index), f"{index.name} names it"
        if not names:
            raise FileNotFoundError(f"{index} names no *.safetensors: download it again")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        named_by = "there is a link to it"
        if not names:
            raise FileNotFoundError(f"there are no *.safetensors in {folder}")
    tensors = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing, but {named_by}")
        tensors |= open_shard(folder / name)
    return tensors


def _names_in_index(path):
    """The names of the files that have the tensors of an index."""
    try:
        files = json.loads(path.read_text("utf-8"))["weight_map"].values()
        return sorted({str(name) for name in files})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{path} must be JSON with the files of all tensors under "weight_map"; '
            f"download it again ({type(error).__name__}: {error})"
        ) from error


def open_shard(path):
    """{name: StoredTensor} of one file."""
    from safetensors import SafetensorError, safe_open  # random weights need only jax

    try:
        file = safe_open(path, framework="numpy")
    except OSError as error:  # whose text does not always name the file
        raise ValueError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} {_damage(path) or f'is damaged: {error}; download it again'}"
        ) from error
    start, header = _header(path)
    tensors = {}
    for rank, name in enumerate(file.offset_keys()):
        stored = file.get_slice(name)
        if (kind := stored.get_dtype()) not in _DTYPES:
            raise ValueError(f"{path}: {name} is {kind}; supported are {', '.join(_DTYPES)}")
        dtype, shape = np.dtype(_DTYPES[kind]), tuple(stored.get_shape())
        offset = start + header[name]["data_offsets"][0] if kind.startswith("F8") else None
        tensors[name] = StoredTensor(file, name, (str(path), rank), dtype, shape, offset)
    return tensors


def _damage(path):
    """What is wrong with a file that safetensors cannot read, in words; None if not known here."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(24)
    if not start:
        return "is empty: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself: run git lfs pull in its folder"
    try:
        data, header = _header(path)
        ends = {name: data + entry["data_offsets"][1] for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None
    beyond = sorted((end, name) for name, end in ends.items() if end > size)
    if not beyond:
        return None
    return (
        f"is cut off: it has {size} bytes and needs {beyond[-1][0]}, so {beyond[0][1]} is not "
        f"complete ({len(beyond)} of {len(ends)} tensors are not). Download it again"
    )


def _header(path):
    """(where the data of a file begin, {name: entry}), which the library does not tell.

    The format: https://huggingface.co/docs/safetensors.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    header.pop("__metadata__", None)
    return 8 + length, header

"""Tensors of a checkpoint that lie beside it in shards, as `torch.distributed.checkpoint` writes them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

SHARDS = "tensor_shards"
"""Entry of a checkpoint that lists its shards: {file name: {"bytes": size, "sha256": digest}}."""

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "MetadataIndex", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int64",
        "int32",
        "uint8",
        "bool",
    },
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
}
"""What a table of shards may name; a pickle can name any function otherwise, and have it called."""


def shards_of(checkpoint: Path) -> Path:
    """Folder of a checkpoint's shards."""
    return checkpoint.with_suffix(".shards")


def read_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and number format of each tensor.

    Raises:
        OSError, pickle.UnpicklingError, ValueError: The table is missing, damaged, or names what it may not.
    """
    found = {}
    for name, one in _Reader(folder).read_metadata().state_dict_metadata.items():
        if not isinstance(one, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
        found[name] = (one.size, one.properties.dtype)
    return found


def fill(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read tensors in place: of a sharded one this rank's part, wherever it lies.

    Raises:
        CheckpointException, OSError, pickle.UnpicklingError: See `read_sizes`; or a tensor is not there.
    """
    with warnings.catch_warnings():
        # Each process reads for itself, which is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=_Reader(folder), no_dist=True)


def read_whole(folder: Path) -> dict[str, Any]:
    """All tensors in host memory, as the entries `model` and `optimizer` of a checkpoint hold them."""
    tensors = {
        name: torch.empty(size, dtype=dtype) for name, (size, dtype) in read_sizes(folder).items()
    }
    fill(tensors, folder)
    return nest(tensors)


def flatten(model: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dict of a model's tensors and an optimiser's; `nest` undoes it."""
    flat = {f"model.{name}": value for name, value in model.items()}
    for number, values in moments.items():
        flat |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    return flat


def nest(flat: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors by name, and the optimiser's by number and name."""
    model: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        part, _, name = key.partition(".")
        if part == "model":
            model[name] = value
        else:
            number, _, name = name.partition(".")
            moments.setdefault(int(number), {})[name] = value
    return {"model": model, "optimizer": {"state": dict(sorted(moments.items()))}}


def reason_of(error: BaseException) -> str:
    """What torch's reader or writer says last, which is what a disk or a file said first."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else repr(error)


class _Reader(FileSystemReader):
    """torch's reader, whose table of contents may hold plain descriptions and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table.

        Raises:
            ValueError: The file holds something else.
        """
        with open(Path(self.path) / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("no table of shards")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """A class by its name.

        Raises:
            pickle.UnpicklingError: It has no place in a table of shards.
        """
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a table of shards")
        return super().find_class(module, name)

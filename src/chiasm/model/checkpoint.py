"""Reading a checkpoint's tensors by canonical name, whatever its layout.

Files are memory-mapped and only the asked regions are touched: a server of one expert shard reads
no byte of any other expert. What `get` and `expert` return is a private copy, so the mapping can
be dropped. Only safetensors are read: pickle files can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from chiasm.errors import DataLoss, InvalidArgument, NotFound
from chiasm.model.config import ModelConfig
from chiasm.model.layouts import Piece, detect
from chiasm.model.manifest import Manifest
from chiasm.model.section import Section
from chiasm.model.shapes import Shape, expert_prefix
from chiasm.types import Modality

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams")
"""Files that can run code when they are read."""


class Checkpoint:
    """An open checkpoint directory. One thread uses it at a time.

    With `verified` each file is compared with the manifest's checksum before it is first read,
    unless it is one of these; it is one of them then, for the next who opens the checkpoint. Raises
    NotFound when the directory has no weights, or with `verified` no manifest, InvalidArgument when
    their format, layout or precision is not supported and DataLoss when a file is cut short or
    fails its checksum.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        *,
        verified: set[Path] | None = None,
    ) -> None:
        self._manifest = None if verified is None else Manifest.load(directory)
        self._verified = set() if verified is None else verified
        self.bytes_read = 0
        """Bytes copied out of the files so far."""
        self.config = config
        self._open: dict[Path, Any] = {}
        self._files = self._locate(directory)
        config.quantization.check_stored(self._files)
        self._naming = detect(config, self._files.keys(), self._shape_at_hand)

    def has(self, name: str) -> bool:
        """Whether the tensor is one of the model's and stored here."""
        try:
            return all(piece.key in self._files for piece in self._naming.pieces(name))
        except NotFound:
            return False

    def get(self, name: str, shape: Shape | None = None) -> torch.Tensor:
        """A tensor by canonical name, in the PyTorch orientation and its stored dtype.

        Its shape is always checked against the model's configuration; `shape` adds the caller's
        own expectation. Raises NotFound naming tensor and file, InvalidArgument naming both
        shapes.
        """
        views = [self._view(name, piece) for piece in self._naming.pieces(name)]
        # The one copy: cat and clone both leave the mapped file behind.
        tensor = torch.cat(views) if len(views) > 1 else _copy(views[0])
        if shape is not None and tensor.shape != shape:
            raise InvalidArgument(name, f"has the shape {list(tensor.shape)}, not {list(shape)}")
        self._count(tensor)
        return tensor

    def expert(
        self, layer: int, modality: Modality, expert: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up [2I, H] with the rows of gate first, down [H, I]) of a routed expert.

        `expert` counts within its bank. Raises as `get` does.
        """
        if not 0 <= expert < self.config.text.num_experts:
            raise InvalidArgument("expert", f"{expert} is not among the bank's experts")
        prefix = expert_prefix(self.config.text, layer, modality, expert)
        return self.get(f"{prefix}gate_up_proj.weight"), self.get(f"{prefix}down_proj.weight")

    @property
    def files(self) -> Mapping[str, Path]:
        """Every stored tensor's key and the file that holds it."""
        return self._files

    def keys_of(self, name: str) -> set[str]:
        """Keys of the stored tensors that a canonical name is made of."""
        return {piece.key for piece in self._naming.pieces(name)}

    def stored_name(self, name: str) -> str:
        """A canonical name of the language model, or the beginning of one, as stored here."""
        return self._naming.text_prefix + name.removeprefix("model.")

    def stored(self, key: str) -> tuple[str, Shape]:
        """The dtype, in safetensors' word, and the shape of the tensor stored under `key`.

        Raises NotFound naming tensor and file, DataLoss for a file that is damaged.
        """
        piece = self._slice(key)
        return piece.get_dtype(), tuple(piece.get_shape())

    def read_into(self, key: str, target: torch.Tensor) -> None:
        """Copies the tensor stored under `key`, which no layout renames, to memory of the caller.

        Its shape must be the target's. Codes and scales of low precision are never converted, so an
        integer tensor must be of the target's dtype. Raises as `get` does.
        """
        view = self._view(key, Piece(key=key, shape=tuple(target.shape)))
        if view.dtype != target.dtype and not (
            view.is_floating_point() and target.is_floating_point()
        ):
            raise InvalidArgument(key, f"has the dtype {view.dtype}, not {target.dtype}")
        target.copy_(view)
        self._count(view)

    def close(self) -> None:
        """Drops the mappings. Tensors already read stay valid."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _count(self, tensor: torch.Tensor) -> None:
        self.bytes_read += tensor.nbytes

    def _locate(self, directory: Path) -> dict[str, Path]:
        """Stored key -> its file."""
        if (directory / _INDEX).is_file():
            weight_map = Section.load(directory / _INDEX).section("weight_map")
            for key, file in weight_map.values.items():
                # A name from a downloaded index must not lead out of the directory.
                if not isinstance(file, str) or Path(file).name != file or not Path(file).suffix:
                    raise weight_map.error(key, f"{file!r} is not a file name")
                _refuse_pickle(Path(file))
            return {key: directory / file for key, file in weight_map.values.items()}
        single = directory / _SINGLE
        if single.is_file():
            return dict.fromkeys(self._file(single).keys(), single)
        for file in sorted(directory.glob("*")):
            _refuse_pickle(file)
        raise NotFound(f"{directory} holds neither {_SINGLE} nor {_INDEX}", reason="FILE_NOT_FOUND")

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            if self._manifest is not None and file not in self._verified:
                self._manifest.check(file)
                self._verified.add(file)
            try:
                self._open[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise DataLoss(
                    f"{file} is damaged or cut short: {error}", reason="CHECKPOINT_CORRUPT"
                ) from None
        return self._open[file]

    def _shape_at_hand(self, key: str) -> Shape | None:
        file = self._files[key]
        return tuple(self._slice(key).get_shape()) if file.is_file() else None

    def _slice(self, key: str) -> Any:
        """A lazy handle on a stored tensor."""
        file = self._files[key]
        if not file.is_file():
            raise NotFound(f"{key}: its file {file} does not exist", reason="FILE_NOT_FOUND")
        try:
            return self._file(file).get_slice(key)
        except SafetensorError:
            raise NotFound(f"{file} holds no tensor {key}", reason="TENSOR_NOT_FOUND") from None

    def _view(self, name: str, piece: Piece) -> torch.Tensor:
        """The piece as a view on the mapped file."""
        if piece.key not in self._files:
            files = ", ".join(sorted({file.name for file in self._files.values()})[:3])
            raise NotFound(
                f"{name} (stored as {piece.key}) is in none of the checkpoint's files ({files})",
                reason="TENSOR_NOT_FOUND",
            )
        stored = self._slice(piece.key)
        found = tuple(stored.get_shape())
        if found != piece.shape:
            raise InvalidArgument(
                piece.key,
                f"{self._files[piece.key].name} has it in the shape {list(found)}; "
                f"config.json asks for {list(piece.shape)}",
            )
        view: torch.Tensor = stored[...] if piece.expert is None else stored[piece.expert]
        view = view.t() if piece.transpose else view
        return view if piece.rows is None else view[piece.rows.start : piece.rows.stop]


def _copy(view: torch.Tensor) -> torch.Tensor:
    return view.clone(memory_format=torch.contiguous_format)


def _refuse_pickle(file: Path) -> None:
    if file.suffix in PICKLES:
        raise InvalidArgument(
            file.name, "pickle files can run code and are not read; convert them to safetensors"
        )

"""Checksums of a checkpoint's files, kept beside them in chiasm_manifest.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiasm.errors import DataLoss
from chiasm.model.section import Section

NAME = "chiasm_manifest.json"
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileEntry:
    """sha256 and size of a file, and what its writer wants to remember of it."""

    sha256: str
    num_bytes: int
    notes: Mapping[str, Any]

    def matches(self, file: Path) -> bool:
        """Whether a file is there and is the one; reads it whole where the size is right."""
        return (
            file.is_file() and file.stat().st_size == self.num_bytes and sha256(file) == self.sha256
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files by name. fingerprint: of what they were made from, and how."""

    fingerprint: str
    files: Mapping[str, FileEntry]

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Raises NotFound without a manifest, InvalidArgument for one that cannot be read."""
        root = Section.load(directory / NAME)
        files = root.section("files")
        entries = {}
        for name in files.values:
            entry = files.section(name)
            entries[name] = FileEntry(
                sha256=str(entry.values.get("sha256")),
                num_bytes=entry.integer("bytes", low=0, high=1 << 60),
                notes=entry.section("notes").values,
            )
        return cls(fingerprint=str(root.values.get("fingerprint")), files=entries)

    def save(self, directory: Path) -> None:
        """Replaces the manifest on the disk, whole or not at all."""
        document = {
            "version": 1,
            "fingerprint": self.fingerprint,
            "files": {
                name: {"sha256": entry.sha256, "bytes": entry.num_bytes, "notes": entry.notes}
                for name, entry in self.files.items()
            },
        }
        partial = directory / f"{NAME}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / NAME)

    def check(self, file: Path) -> None:
        """Reads a file whole. Raises DataLoss where it is not what the manifest says."""
        entry = self.files.get(file.name)
        if entry is None:
            raise DataLoss(f"{file} is not in {NAME}", reason="CHECKPOINT_CORRUPT")
        if not entry.matches(file):
            raise DataLoss(
                f"{file} does not match its checksum in {NAME}", reason="CHECKPOINT_CORRUPT"
            )


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

"""Enums of the wire and the values they stand for, both ways; the only place that pairs them."""

from __future__ import annotations

from chiasm.types import MediaKind, Modality
from chiasm.v1 import common_pb2

MODALITIES = {
    common_pb2.MODALITY_TEXT: Modality.TEXT,
    common_pb2.MODALITY_VISION: Modality.VISION,
}
MEDIA_KINDS = {
    common_pb2.MEDIA_KIND_IMAGE: MediaKind.IMAGE,
    common_pb2.MEDIA_KIND_VIDEO: MediaKind.VIDEO,
}
WIRE_MODALITIES = {modality: wire for wire, modality in MODALITIES.items()}
WIRE_MEDIA_KINDS = {kind: wire for wire, kind in MEDIA_KINDS.items()}

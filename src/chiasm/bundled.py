"""What comes with the package: a small trained checkpoint, and a picture to ask it about."""

from __future__ import annotations

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = _ASSETS / "bundled"
"""Directory of a model in the published layout, made by `chiasm train --preset bundled`."""
PICTURE = _ASSETS / "star.jpg"
"""A red star; none of the pictures trained on."""

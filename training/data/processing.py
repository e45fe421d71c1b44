"""How the bundled checkpoint wants its media prepared: as small as it was trained on.

A picture has 4 to 16 tokens whatever its size, a video at most 16 frames and no timestamps, which
would cover most of a frame this small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TOKEN_PIXELS = 28 * 28
_MIN_TOKENS, _MAX_IMAGE_TOKENS, _MAX_FRAME_TOKENS = 4, 16, 4
_MIN_FRAMES, _MAX_FRAMES = 2, 16

IMAGES: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {
        "longest_edge": _MAX_IMAGE_TOKENS * _TOKEN_PIXELS,
        "shortest_edge": _MIN_TOKENS * _TOKEN_PIXELS,
    },
    "temporal_conv_size": 2,
}
VIDEOS: dict[str, Any] = {
    "draw_on_frames": False,
    "max_frames": _MAX_FRAMES,
    "min_frames": _MIN_FRAMES,
    "size": {
        "longest_edge": _MAX_FRAME_TOKENS * _TOKEN_PIXELS,
        "shortest_edge": _MIN_TOKENS * _TOKEN_PIXELS,
    },
}


def write_processing(directory: Path) -> None:
    """Writes preprocessor_config.json and video_preprocessor_config.json."""
    for name, value in (("preprocessor_config", IMAGES), ("video_preprocessor_config", VIDEOS)):
        file = directory / f"{name}.json"
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

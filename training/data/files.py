"""Media as the files a client would send."""

from __future__ import annotations

import io

import av
import numpy as np
from PIL import Image

from chiasm.training.data.sample import Clip, Pixels

_X264 = {"crf": "12", "tune": "zerolatency"}
"""Better than what a phone records, but not lossless; and without looking ahead, which now and then
codes the same frames in another way."""


def to_png(pixels: Pixels) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def to_mp4(clip: Clip) -> bytes:
    """A video as an MP4 file of H.264, with colour at half the resolution as is usual."""
    out = io.BytesIO()
    _, height, width, _ = clip.frames.shape
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.fps, options=_X264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for pixels in clip.frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()

"""The conversations of the parity tests: as chiasm's messages and as the reference's text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from chiasm.client import Message, assistant, image, system, user, video

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"
IMAGE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
ANSWER = "\nAssistant: <think>\n\n</think>\n\n"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`text` is what the reference's processor is given; it expands the placeholders."""

    name: str
    messages: Sequence[Message]
    text: str
    images: Sequence[Pixels] = ()
    videos: Sequence[Pixels] = ()


def picture(height: int, width: int, seed: int) -> Pixels:
    """A smooth gradient with noise: neither flat nor white noise."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([(y * 255 / height), (x * 255 / width), (x + y) * 128 / (height + width)], -1)
    return (base + g.normal(0, 12, base.shape)).clip(0, 255).astype(np.uint8)


def png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def film(frames: Pixels, fps: int = 10) -> bytes:
    """Frames [T, H, W, 3] in a lossless video."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as output:
        stream = output.add_stream("png", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
    return file.getvalue()


@cache
def cases() -> tuple[Case, ...]:
    square, wide, tall = picture(84, 112, 1), picture(30, 420, 2), picture(333, 29, 3)
    odd = picture(61, 97, 4)
    clip = np.stack([picture(64, 80, 10 + t) for t in range(7)])
    return (
        Case(
            name="text",
            messages=[system("Be brief."), user("What is 12 + 34? 你好")],
            text=f"{BOS}Be brief.\nUser: What is 12 + 34? 你好{ANSWER}",
        ),
        Case(
            name="one image",
            messages=[user(image(png(square)), "What is in the picture?")],
            text=f"{BOS}User: Picture 1:{IMAGE}What is in the picture?{ANSWER}",
            images=[square],
        ),
        Case(
            name="three images of odd sizes",
            messages=[
                user("Compare", image(png(wide)), image(png(tall)), "and", image(png(odd)), "now.")
            ],
            text=f"{BOS}User: ComparePicture 1:{IMAGE}Picture 2:{IMAGE}andPicture 3:{IMAGE}now."
            f"{ANSWER}",
            images=[wide, tall, odd],
        ),
        Case(
            name="image in the middle of a conversation",
            messages=[
                user("Hello!"),
                assistant("Hello, what can I do?"),
                user("Look: ", image(png(odd))),
                assistant("I see."),
                user("Which colours?"),
            ],
            text=f"{BOS}User: Hello!\nAssistant: Hello, what can I do?{EOS}User: Look: "
            f"Picture 1:{IMAGE}\nAssistant: I see.{EOS}User: Which colours?{ANSWER}",
            images=[odd],
        ),
        Case(
            name="video",
            messages=[user(video(film(clip)), "What moves?")],
            text=f"{BOS}User: Video 1:{VIDEO}What moves?{ANSWER}",
            videos=[clip],
        ),
    )

"""Videos against transformers' video processor, bit for bit on losslessly stored frames."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from model.mp4_boxes import box, boxes, changed, table
from transformers import Ernie4_5_VLMoeVideoProcessor

from chiasm.errors import InvalidArgument
from chiasm.model.config import ModelConfig
from chiasm.model.geometry import num_tokens, video_grid
from chiasm.model.probe import VideoLimits, probe_video
from chiasm.model.processing import ProcessingConfig
from chiasm.model.video import preprocess_video, sample_indices, timestamp_text

SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16}


def _frames(num: int, width: int = 80, height: int = 64, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def _settings(
    tmp_path: Path, config: ModelConfig, **video: Any
) -> tuple[ProcessingConfig, Ernie4_5_VLMoeVideoProcessor]:
    """Ours, read from a file, and the reference with the same settings."""
    video = {"size": SIZE, "draw_on_frames": False, **video}
    (tmp_path / "processor_config.json").write_text(json.dumps({"video_processor": video}))
    ours = ProcessingConfig.load(tmp_path, config)
    return ours, Ernie4_5_VLMoeVideoProcessor(**video, font=str(ours.video.font))


def _expected(judge: Any, frames: np.ndarray, fps: float) -> Any:
    metadata = {
        "total_num_frames": len(frames),
        "fps": fps,
        "frames_indices": list(range(len(frames))),
    }
    return judge(videos=[frames.copy()], video_metadata=[metadata], return_tensors="pt")


def _assert_equal(data: bytes, frames: np.ndarray, fps: float, ours: Any, judge: Any) -> None:
    expected = _expected(judge, frames, fps)
    patches = preprocess_video(data, ours)
    assert list(patches.grid) == expected["video_grid_thw"][0].tolist()
    assert torch.equal(patches.pixels, expected["pixel_values_videos"])


@pytest.mark.parametrize("num_frames", [2, 3, 7, 17, 40, 200])
def test_frames_without_fps(num_frames, film, tmp_path, config):
    ours, judge = _settings(tmp_path, config)
    frames = _frames(num_frames, seed=num_frames)
    _assert_equal(film(frames), frames, 10.0, ours, judge)


@pytest.mark.parametrize(("start", "count"), [(0, 30), (7, 20), (25, 15), (39, 1)])
def test_frames_that_an_edit_cuts_off_do_not_count(start, count, film, tmp_path, config):
    """As a phone cuts a film: all is there, and an edit list says what is shown."""
    ours, judge = _settings(tmp_path, config, min_frames=4, max_frames=12)
    frames = _frames(40, seed=start)

    def cut(trak: bytes) -> bytes:
        found = []
        changed(trak, {b"stts": lambda body: found.append(body) or body})
        (ticks,) = struct.unpack(">I", found[0][12:16])  # of a frame
        edit = table(1, 1000 * count // 10, ticks * start, 1 << 16)(b"")
        kept = b"".join(box(k, b) for k, b in boxes(trak) if k != b"edts")
        return kept + box(b"edts", box(b"elst", edit))

    data = changed(film(frames, container="mp4"), {b"trak": cut})
    shown = frames[start : start + count]
    if count == 1:
        shown = np.repeat(shown, 2, axis=0)  # the reference cannot read a single one
    expected = _expected(judge, shown, 10.0)
    patches = preprocess_video(data, ours)
    assert list(patches.grid) == expected["video_grid_thw"][0].tolist()
    assert torch.equal(patches.pixels, expected["pixel_values_videos"])


def test_one_frame_is_doubled(film, tmp_path, config):
    """The reference cannot read a single decoded frame; two equal ones it can."""
    ours, judge = _settings(tmp_path, config)
    frames = _frames(1)
    expected = _expected(judge, np.repeat(frames, 2, axis=0), 10.0)
    assert torch.equal(preprocess_video(film(frames), ours).pixels, expected["pixel_values_videos"])


@pytest.mark.parametrize(("fps", "pace"), [(2, 10), (2.5, 25), (7, 24), (1, 60), (30, 30)])
def test_frames_by_fps(fps, pace, film, tmp_path, config):
    ours, judge = _settings(tmp_path, config, fps=fps, min_frames=4, max_frames=30)
    for num_frames in (3, 50, 99):
        frames = _frames(num_frames, 40, 36, seed=num_frames)
        _assert_equal(film(frames, fps=pace), frames, float(pace), ours, judge)


def test_a_fixed_number_of_frames(film, tmp_path, config):
    ours, judge = _settings(tmp_path, config, num_frames=9, min_frames=4)
    frames = _frames(31)
    _assert_equal(film(frames), frames, 10.0, ours, judge)


def test_no_sampling(film, tmp_path, config):
    ours, judge = _settings(tmp_path, config, do_sample_frames=False, max_frames=60)
    frames = _frames(50, 40, 36)
    _assert_equal(film(frames), frames, 10.0, ours, judge)
    with pytest.raises(InvalidArgument, match="61 frames, limit 60"):
        preprocess_video(film(_frames(61, 40, 36)), ours)


@pytest.mark.parametrize(
    ("width", "height"), [(300, 40), (36, 500), (320, 240), (30, 30), (57, 91)]
)
def test_sizes(width, height, film, tmp_path, config):
    ours, judge = _settings(tmp_path, config)
    frames = _frames(4, width, height)
    _assert_equal(film(frames), frames, 10.0, ours, judge)


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize(("container", "codec"), [("mov", "png"), ("matroska", "ffv1")])
def test_frames_are_turned_as_the_container_asks(
    rotation, container, codec, film, tmp_path, config
):
    ours, judge = _settings(tmp_path, config, draw_on_frames=True)
    frames = _frames(6, 200, 120)
    pix_fmt = "rgb24" if codec == "png" else "bgr0"
    data = film(frames, container=container, codec=codec, pix_fmt=pix_fmt, rotation=rotation)
    upright = np.rot90(frames, rotation // 90, axes=(1, 2))
    _assert_equal(data, upright, 10.0, ours, judge)
    info = probe_video(data, VideoLimits())
    planned = video_grid(info.num_frames, info.fps, info.width, info.height, ours)
    assert planned[1:] in (_grid_of(upright, ours), _grid_of(upright, ours)[::-1])


def _grid_of(frames: np.ndarray, ours: ProcessingConfig) -> tuple[int, int]:
    _, rows, columns = video_grid(len(frames), None, frames.shape[2], frames.shape[1], ours)
    return rows, columns


@pytest.mark.parametrize("pace", [Fraction(10), Fraction(30000, 1001), Fraction(1, 100)])
@pytest.mark.parametrize("sampled", [True, False])
def test_timestamps_are_drawn_as_in_transformers(sampled, pace, film, tmp_path, config):
    ours, judge = _settings(tmp_path, config, draw_on_frames=True, do_sample_frames=sampled)
    for width, height in ((200, 160), (90, 300)):
        frames = _frames(13, width, height)
        _assert_equal(film(frames, fps=pace), frames, float(pace), ours, judge)
        plain = replace(ours, video=replace(ours.video, draw_timestamps=False))
        with_stamps = preprocess_video(film(frames, fps=pace), ours).pixels
        assert not torch.equal(with_stamps, preprocess_video(film(frames, fps=pace), plain).pixels)


def test_a_frame_too_small_for_a_timestamp_stays_bare(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config, draw_on_frames=True)
    bare, _ = _settings(tmp_path, config)
    data = film(_frames(2, 20, 8))
    assert torch.equal(preprocess_video(data, ours).pixels, preprocess_video(data, bare).pixels)


def test_timestamp_text():
    assert timestamp_text(3723.5) == "time: 01:02:03.50"
    assert timestamp_text(0.0) == "time: 00:00:00.00"


def test_containers_that_do_not_count_their_frames(film, tmp_path, config):
    ours, judge = _settings(tmp_path, config, max_frames=20)
    frames = _frames(33, 40, 36)
    data = film(frames, container="matroska", codec="ffv1", pix_fmt="bgr0")
    assert probe_video(data, VideoLimits()).num_frames is None
    _assert_equal(data, frames, 10.0, ours, judge)


def test_lossy_codecs(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    frames = np.broadcast_to(
        np.linspace(0, 255, 96, dtype=np.uint8)[None, None, :, None], (20, 64, 96, 3)
    )
    for container, codec in (
        ("mp4", "libx264"),
        ("mp4", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("mpegts", "mpeg4"),
        ("asf", "wmv2"),
    ):
        data = film(frames, container=container, codec=codec, pix_fmt="yuv420p")
        lossless = preprocess_video(film(frames), ours)
        patches = preprocess_video(data, ours)
        assert patches.grid == lossless.grid
        assert (patches.pixels - lossless.pixels).abs().mean() < 0.1  # of a range of 3.7


def test_header_gives_the_grid(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config, fps=2, min_frames=3, max_frames=11)
    for num_frames in (1, 8, 30, 77):
        for container, codec in (("avi", "png"), ("matroska", "ffv1")):
            pix_fmt = "rgb24" if codec == "png" else "bgr0"
            data = film(_frames(num_frames), container=container, codec=codec, pix_fmt=pix_fmt)
            info = probe_video(data, VideoLimits())
            planned = video_grid(info.num_frames, info.fps, info.width, info.height, ours)
            grid = preprocess_video(data, ours).grid
            if info.num_frames:
                assert planned == grid
            else:
                assert planned.t >= grid.t
                assert planned[1:] == grid[1:]
            assert num_tokens(grid, config.vision) == grid.t * grid.h * grid.w // 8


def test_sampled_indices_stay_inside(tmp_path, config):
    ours, judge = _settings(tmp_path, config, fps=2)
    for num_frames in range(1, 1200, 7):
        for fps in (10.0, 23.976, 29.97, 60.0):
            indices = sample_indices(num_frames, fps, ours.video)
            metadata = type("Metadata", (), {"total_num_frames": num_frames, "fps": fps})
            expected = judge.sample_frames(metadata, fps=2).tolist()
            assert indices == [i for i in expected if i < num_frames]
            assert 0 < len(indices) <= 181


def test_frame_size_is_bounded_before_decoding(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    data = film(_frames(3, 100, 80), container="mpegts", codec="mpeg4", pix_fmt="yuv420p")
    preprocess_video(data, ours, limits=VideoLimits(max_pixels=8000))
    with pytest.raises(InvalidArgument, match="7999") as error:
        preprocess_video(data, ours, limits=VideoLimits(max_pixels=7999))
    assert error.value.field == "video"
    small = film(_frames(3, 50, 40), container="mpegts", codec="mpeg4", pix_fmt="yuv420p")
    with pytest.raises(InvalidArgument):  # grows behind its header's back
        preprocess_video(small + data, ours, limits=VideoLimits(max_pixels=2000))
    huge = film(_frames(1, 900, 700), container="avi", codec="png")
    with pytest.raises(InvalidArgument, match="900 x 700 pixels, limit 2000"):
        preprocess_video(huge, ours, limits=VideoLimits(max_pixels=2000))


@pytest.mark.parametrize("container", ["flv", "mpegts", "mp4"])
def test_opening_takes_no_memory_for_frames(container, film, tmp_path):
    """In a process of its own, as the peak is one of processes."""
    size = 4096
    path = tmp_path / container
    frames = np.zeros((1, size, size, 3), np.uint8)
    path.write_bytes(film(frames, container=container, codec="libx264", pix_fmt="yuv420p"))
    code = f"""
import os, pathlib
from chiasm.model.probe import VideoLimits, probe_video
from processes import memory_bytes
data, before = pathlib.Path({str(path)!r}).read_bytes(), memory_bytes(os.getpid(), "VmHWM")
info = probe_video(data, VideoLimits())
print(info.width, info.height, memory_bytes(os.getpid(), "VmHWM") - before)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    width, height, taken = map(int, ran.stdout.split())
    assert (width, height) == (size, size)
    assert taken < size * size // 2


def test_number_of_frames_is_bounded(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    for container, codec, pix_fmt in (("avi", "png", "rgb24"), ("matroska", "ffv1", "bgr0")):
        data = film(_frames(12, 40, 36), container=container, codec=codec, pix_fmt=pix_fmt)
        preprocess_video(data, ours, limits=VideoLimits(max_frames=12))
        with pytest.raises(InvalidArgument, match="frames") as error:
            preprocess_video(data, ours, limits=VideoLimits(max_frames=11))
        assert error.value.field == "video"


def test_pixels_of_all_frames_are_bounded(film, tmp_path, config):
    """By what the container tells, and where it tells nothing by what comes."""
    ours, _ = _settings(tmp_path, config)
    for container, codec, pix_fmt in (("avi", "png", "rgb24"), ("matroska", "ffv1", "bgr0")):
        data = film(_frames(12, 40, 36), container=container, codec=codec, pix_fmt=pix_fmt)
        total = 12 * 40 * 36
        preprocess_video(data, ours, limits=VideoLimits(max_decoded_pixels=total))
        with pytest.raises(InvalidArgument, match="pixels in all frames") as error:
            preprocess_video(data, ours, limits=VideoLimits(max_decoded_pixels=total - 1))
        assert error.value.field == "video"
        if container == "avi":
            with pytest.raises(InvalidArgument, match="pixels in all frames"):
                probe_video(data, VideoLimits(max_decoded_pixels=total - 1))


@pytest.mark.parametrize(("damaged", "is_used"), [(3, False), (4, True)])
def test_only_frames_that_are_used_must_be_whole(damaged, is_used, film, tmp_path, config):
    ours, _ = _settings(tmp_path, config, min_frames=4, max_frames=6)
    data = film(_frames(12), codec="mpeg4", pix_fmt="yuv420p")
    with av.open(io.BytesIO(data)) as file:
        packet = list(file.demux(video=0))[damaged]
        middle = packet.pos + packet.size // 2
    data = data[:middle] + bytes(40) + data[middle + 40 :]
    if is_used:
        with pytest.raises(InvalidArgument, match="frame 4 is damaged"):
            preprocess_video(data, ours)
    else:
        assert preprocess_video(data, ours).grid.t == 6


def test_codecs_without_decoder_are_refused(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    data = film(_frames(3), container="mov", codec="png").replace(b"png ", b"zzzz")
    with pytest.raises(InvalidArgument, match="codec") as error:
        preprocess_video(data, ours)
    assert error.value.field == "video"


def test_damaged_videos_are_refused(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    frames = _frames(30)
    whole = film(frames)
    mp4 = film(frames, container="mp4", codec="libx264", pix_fmt="yuv420p")
    for broken in (
        whole[: len(whole) // 2],
        mp4[: len(mp4) // 2],
        whole[:9000] + bytes(2000) + whole[11000:],
        b"",
        b"nonsense" * 100,
        whole[:40],
    ):
        with pytest.raises(InvalidArgument) as error:
            preprocess_video(broken, ours)
        assert error.value.field == "video"


def test_playlists_are_not_followed(film, tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    segment = tmp_path / "segment.ts"
    segment.write_bytes(film(_frames(5), container="mpegts", codec="mpeg4", pix_fmt="yuv420p"))
    playlists = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{segment}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{segment}'\n",
    )
    for playlist in playlists:
        with pytest.raises(InvalidArgument):
            preprocess_video(playlist.encode(), ours)


def test_files_without_video_are_refused(tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    sound = io.BytesIO()
    with av.open(sound, "w", format="avi") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), layout="mono")
        frame.rate = 8000
        for packet in stream.encode(frame):
            output.mux(packet)
    with pytest.raises(InvalidArgument, match="no video stream"):
        preprocess_video(sound.getvalue(), ours)


def test_hub_settings_of_videos(tmp_path, config):
    hub = {"video_fps": 2, "video_min_pixels": 4000, "video_max_pixels": 9000}
    hub |= {"video_max_frames": 90, "video_target_frames": -1, "min_pixels": 3136}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hub))
    video = ProcessingConfig.load(tmp_path, config).video
    assert (video.fps, video.max_frames, video.num_frames) == (2.0, 90, None)
    assert (video.pixels.min_pixels, video.pixels.max_pixels) == (4000, 9000)
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"fps": 4}))
    assert ProcessingConfig.load(tmp_path, config).video.fps == 4.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 2, "num_frames": 20},
        {"num_frames": 5},
        {"min_frames": 200},
        {"temporal_patch_size": 1},
        {"fps": 0},
    ],
)
def test_settings_that_cannot_be_followed_are_refused(wrong, tmp_path, config):
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(InvalidArgument, match=r"video_preprocessor_config\.json"):
        ProcessingConfig.load(tmp_path, config)


def test_the_checkpoints_own_font_is_used(tmp_path, config):
    ours, _ = _settings(tmp_path, config)
    (tmp_path / "Roboto-Regular.ttf").write_bytes(ours.video.font.read_bytes())
    assert ProcessingConfig.load(tmp_path, config).video.font == tmp_path / "Roboto-Regular.ttf"

"""Reading and writing clips: real files, made here or shipped in media/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import weakref
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips import CLIP, bars, make_video
from numpy.typing import NDArray
from PIL import Image

from halovae import media
from halovae.base import files
from halovae.base.errors import InputError
from halovae.evaluation import psnr
from halovae.media import FrameRange, read, write
from halovae.media.video import LivePictures, codec_words


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(1)])
def test_mp4_keeps_size_rate_count_and_colour(tmp_path: Path, fps: Fraction) -> None:
    pixels = bars()
    assert write(tmp_path / "o.mp4", pixels, fps) == ()
    clip = read(tmp_path / "o.mp4")
    assert clip.frames.shape == pixels.shape
    assert clip.fps == fps
    # Inside of the bars, away from the edges that 4:2:0 blurs.
    assert np.abs(clip.frames[:, 60, 12::24].astype(int) - pixels[:, 60, 12::24]).max() <= 3


def test_mp4_of_odd_size_is_written_and_said(tmp_path: Path) -> None:
    (note,) = write(tmp_path / "o.mp4", bars()[:, :51, :67], Fraction(25))
    assert "67x51 is odd" in note
    assert read(tmp_path / "o.mp4").frames.shape == (5, 51, 67, 3)


def test_mp4_says_which_colours_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "o.mp4", bars(), Fraction(25))
    with av.open(str(tmp_path / "o.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)


def test_png_is_kept_to_the_bit(tmp_path: Path) -> None:
    write(tmp_path / "o.png", bars(1), Fraction(1))
    assert np.array_equal(read(tmp_path / "o.png").frames, bars(1))


def test_png_takes_one_frame(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one image, but there are 5 frames"):
        write(tmp_path / "o.png", bars(), Fraction(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "start", "stop"), [("0:5", 0, 5), ("3:", 3, None), (":4", 0, 4), (":", 0, None)])
def test_frame_range_is_read(text: str, start: int, stop: int | None) -> None:
    assert FrameRange.parse(text) == FrameRange(start, stop)


@pytest.mark.parametrize("text", ["", "5", "a:b", "3:3", "4:2", "-1:4", "1:2:3", "1e3:", "0:" + "9" * 40])
def test_frame_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--frames"):
        FrameRange.parse(text)


def test_frame_range_is_exact() -> None:
    whole = read(CLIP, frames=FrameRange(0, 8), height=72).frames
    assert whole.shape == (8, 72, 128, 3)
    assert np.array_equal(read(CLIP, frames=FrameRange(3, 6), height=72).frames, whole[3:6])


@pytest.mark.parametrize("wanted", [FrameRange(0, 6), FrameRange(5), FrameRange(40, 50)])
def test_frames_beyond_the_end_are_refused(tmp_path: Path, wanted: FrameRange) -> None:
    with pytest.raises(InputError, match="which has 5 frames"):
        read(make_video(tmp_path / "o.mp4", frames=5), frames=wanted)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(None, None, (64, 96)), (32, None, (32, 48)), (None, 48, (32, 48)), (33, 67, (33, 67)), (128, 30, (128, 30))],
)
def test_scaling_covers_and_crops_around_the_centre(
    tmp_path: Path, height: int | None, width: int | None, expected: tuple[int, int]
) -> None:
    pixels = np.zeros((1, 64, 96, 3), np.uint8)
    pixels[:, :, 48:] = 255
    write(tmp_path / "o.png", pixels, Fraction(1))
    clip = read(tmp_path / "o.png", height=height, width=width)
    assert clip.frames.shape[1:3] == expected
    assert clip.source_size == (64, 96)
    assert abs(clip.frames.mean() - 127.5) < 2  # the border between black and white is still in the middle


def test_absurd_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="--height 99999 --width 177776: more than"):
        read(CLIP, height=99_999)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_display_matrix_is_followed(tmp_path: Path, degrees: int, mirrored: bool) -> None:
    """Turned counterclockwise, then mirrored: as players show it."""
    with av.open(str(tmp_path / "o.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for pixels in bars():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    expected = np.rot90(bars(), degrees // 90, axes=(1, 2))
    expected = expected[:, :, ::-1] if mirrored else expected
    clip = read(tmp_path / "o.mp4")
    assert clip.frames.shape == expected.shape
    assert np.abs(clip.frames.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_clip_of_jpegs_is_followed(tmp_path: Path, orientation: int) -> None:
    """As that of one JPEG is."""
    image = Image.fromarray(bars(1)[0])
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "o.jpg", exif=exif, quality=95)
    with av.open(str(tmp_path / "o.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(3):
            packet = av.Packet((tmp_path / "o.jpg").read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            container.mux(packet)
    still, clip = read(tmp_path / "o.jpg").frames, read(tmp_path / "o.avi").frames
    assert clip.shape == (3, *still.shape[1:])
    assert np.abs(clip.astype(int) - still).mean() < 3


def test_colour_is_sampled_where_the_file_says(tmp_path: Path) -> None:
    """Half a pixel off costs 13 dB here."""
    y, x = np.mgrid[0:128, 0:192]
    waves = np.stack([x / 7, y / 9 + 1, (x + y) / 11], -1)
    pixels = (127 + 120 * np.sin(waves)).astype(np.uint8)[None]
    write(tmp_path / "o.mp4", pixels, Fraction(25), crf=0)
    assert psnr(pixels, read(tmp_path / "o.mp4").frames) > 48
    if shutil.which("ffmpeg"):
        left = "scale=in_h_chr_pos=0:in_v_chr_pos=128:flags=lanczos+accurate_rnd+full_chroma_int,format=rgb24"
        subprocess.run(["ffmpeg", "-v", "error", "-i", "o.mp4", "-vf", left, "o.png"], check=True, cwd=tmp_path)
        assert psnr(pixels, read(tmp_path / "o.png").frames) > 48
        probe = ["ffprobe", "-v", "error", "-show_streams", "o.mp4"]
        assert b"chroma_location=left" in subprocess.run(probe, cwd=tmp_path, capture_output=True, check=True).stdout


@pytest.mark.parametrize("times", [(), (0, 3000, 9000, 12000, 15000, 20000)], ids=["evenly", "unevenly"])
def test_lossless_keeps_every_pixel(tmp_path: Path, times: tuple[int, ...]) -> None:
    """Of odd sizes too; and only such a file says that nothing was lost."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 51, 67, 3), dtype=np.uint8)
    (note,) = write(tmp_path / "o.mp4", noise, Fraction(25), times=times, lossless=True)
    assert "which not every player shows" in note
    clip = read(tmp_path / "o.mp4")
    assert (clip.frames == noise).all()
    assert clip.times == times
    assert media.Film(tmp_path / "o.mp4").lossy == ""
    write(tmp_path / "o.mp4", noise, Fraction(25), crf=0)
    assert media.Film(tmp_path / "o.mp4").lossy == "h264"
    assert write(tmp_path / "o.png", noise[:1], Fraction(25), lossless=True) == ()
    Image.fromarray(noise[0]).save(tmp_path / "o.jpg")
    assert [media.Film(tmp_path / name).lossy for name in ("o.png", "o.jpg")] == ["", "JPEG"]


@pytest.mark.parametrize(("matrix", "said"), [(8, "YCgCo"), (10, "BT.2020 with constant luminance"), (14, "ICtCp")])
def test_colours_that_cannot_be_converted_are_named(tmp_path: Path, matrix: int, said: str) -> None:
    with av.open(str(tmp_path / "o.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.colorspace = matrix
        container.mux(stream.encode(av.VideoFrame.from_ndarray(bars(1)[0], format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=f"its colours are {said}, which can't be converted"):
        read(tmp_path / "o.mp4")


def test_the_default_track_is_taken(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "o.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, size in zip(streams, (32, 64), strict=True):
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        streams[0].disposition, streams[1].disposition = Disposition.dub, Disposition.default
        for stream in streams:
            for pixels in bars(3, stream.height, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    clip = read(tmp_path / "o.mkv")
    assert clip.frames.shape == (3, 64, 64, 3)
    assert clip.notes == ("1 other video track is left out",)


def test_exif_orientation_is_undone(tmp_path: Path) -> None:
    image = Image.fromarray(bars(1)[0])
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "o.png", exif=exif)
    assert np.array_equal(read(tmp_path / "o.png").frames[0], np.rot90(bars(1)[0], -1))


def test_pixels_that_are_not_square_become_so(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "o.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for pixels in bars():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert read(tmp_path / "o.mp4").frames.shape == (5, 64, 128, 3)


@pytest.mark.parametrize(
    ("pixel_format", "codec"), [("yuv420p10le", "libx264"), ("yuv444p", "libx264"), ("gray", "ffv1"), ("bgra", "ffv1")]
)
def test_pixel_formats(tmp_path: Path, pixel_format: str, codec: str) -> None:
    clip = read(make_video(tmp_path / "o.mkv", pixel_format, codec))
    grey = bars().astype(float) @ [0.299, 0.587, 0.114]
    expected = np.repeat(grey[..., None], 3, -1) if pixel_format == "gray" else bars()
    assert np.abs(clip.frames[:, 60, 12::24].astype(int) - expected[:, 60, 12::24]).max() <= 6


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA", "RGBA", "I;16"])
def test_image_modes(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8) * 2, (64, 1)))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    image = wide if mode == "I;16" else grey.convert(mode)
    path = tmp_path / ("o.tiff" if mode == "CMYK" else "o.png")
    image.save(path)
    clip = read(path)
    assert clip.frames.shape == (1, 64, 96, 3)
    tolerance = 255 if mode == "1" else 3
    assert np.abs(clip.frames[0, :, :, 0].astype(int) - np.asarray(grey)).max() <= tolerance
    assert clip.notes == (("the alpha channel is left out",) if mode in ("LA", "RGBA") else ())


class TestTimes:
    """Frames keep the moments at which they are shown."""

    MILLISECONDS = (0, 40, 80, 500, 540, 1000, 1040, 1080, 3000)

    def screen_recording(self, path: Path, milliseconds: Sequence[int] = MILLISECONDS) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for pixels, moment in zip(bars(len(milliseconds)), milliseconds, strict=True):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = moment, Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    @pytest.mark.parametrize("name", ["o.mkv", "o.mp4"])
    def test_uneven_ones_are_kept_and_written(self, tmp_path: Path, name: str) -> None:
        clip = read(self.screen_recording(tmp_path / name))
        assert clip.times[:-1] == tuple(90 * moment for moment in self.MILLISECONDS)
        assert len(clip.frames) / clip.fps == pytest.approx(clip.times[-1] / 90_000)
        (note,) = clip.notes
        assert "the frames come unevenly" in note
        write(tmp_path / "again.mp4", clip.frames, clip.fps, times=clip.times)
        again = read(tmp_path / "again.mp4")
        assert (again.times, again.fps) == (clip.times, clip.fps)

    def test_a_part_has_its_own(self, tmp_path: Path) -> None:
        path = self.screen_recording(tmp_path / "o.mkv")
        part = read(path, frames=FrameRange(0, 3))
        assert (part.fps, part.times) == (25, ())
        assert read(path, frames=FrameRange(2, 5)).times == (0, 420 * 90, 460 * 90, 920 * 90)

    def test_rounded_ones_are_even(self, tmp_path: Path) -> None:
        path = self.screen_recording(tmp_path / "o.mkv", [round(1000 * n / 24) for n in range(40)])
        clip = read(path)
        assert (clip.times, clip.notes) == ((), ())
        assert len(clip.frames) / clip.fps == pytest.approx(40 / 24, abs=0.02)

    @pytest.mark.parametrize("kind", ["gif", "png", "webp", "avif"])
    def test_animations(self, tmp_path: Path, kind: str) -> None:
        first, *others = [Image.fromarray(pixels) for pixels in bars(4)]
        lasts = [100, 50, 400, 200]
        first.save(tmp_path / f"o.{kind}", save_all=True, append_images=others, duration=lasts)
        clip = read(tmp_path / f"o.{kind}")
        assert clip.times == (0, 9000, 13500, 49500, 67500)
        assert np.abs(clip.frames.astype(int) - bars(4)).mean() < 12
        first.save(tmp_path / f"even.{kind}", save_all=True, append_images=others, duration=100)
        even = read(tmp_path / f"even.{kind}")
        assert (len(even.frames), even.fps, even.times) == (4, 10, ())
        assert not media.inspect(tmp_path / f"o.{kind}").is_image

    def test_pages_are_frames_without_times(self, tmp_path: Path) -> None:
        first, *others = [Image.fromarray(pixels) for pixels in bars(3)]
        first.save(tmp_path / "o.tiff", save_all=True, append_images=others)
        clip = read(tmp_path / "o.tiff")
        assert np.array_equal(clip.frames, bars(3))
        assert clip.fps == 10
        assert any("without a time of their own" in note for note in clip.notes)
        first.save(tmp_path / "sizes.tiff", save_all=True, append_images=[others[0].resize((48, 32))])
        with pytest.raises(InputError, match="pages of 96x64 and of 48x32, which can't be frames"):
            read(tmp_path / "sizes.tiff")
        assert len(read(tmp_path / "sizes.tiff", frames=FrameRange(0, 1)).frames) == 1

    def test_previews_are_no_frames(self, tmp_path: Path) -> None:
        first, other = (Image.fromarray(pixels) for pixels in bars(2))
        first.save(tmp_path / "o.mpo", save_all=True, append_images=[other])
        clip = read(tmp_path / "o.mpo")
        assert len(clip.frames) == 1
        assert clip.notes == ("of the 2 pictures in it the first is taken",)


def test_sound_is_left_out_and_said() -> None:
    assert read(CLIP, frames=FrameRange(0, 1), height=36).notes == ("the sound is left out",)


class TestWriting:
    def test_an_old_file_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "o.mp4"
        path.write_text("old")

        def interrupt() -> None:
            assert path.read_text() == "old"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(path, bars(), Fraction(25), interrupt)
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]
        write(path, bars(), Fraction(25))
        assert len(read(path).frames) == 5
        assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]

    def test_a_writer_holds_a_few_frames_and_gives_up_where_nobody_wants_them(self, tmp_path: Path) -> None:
        path, alive = tmp_path / "o.mp4", list[weakref.ref[Any]]()
        path.write_text("old")

        def interrupted() -> None:
            with media.Writer(path, Fraction(25)) as writer:
                for number in range(40):
                    frame = np.full((64, 96, 3), number, np.uint8)
                    alive.append(weakref.ref(frame))
                    writer.put(frame)
                    assert sum(each() is not None for each in alive) <= 12
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert path.read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["o.mp4"]

    def test_who_watches_gets_each_frame_when_the_next_one_is_there(self, tmp_path: Path) -> None:
        path, seen, pictures = tmp_path / "o.mp4", b"", LivePictures()
        shown: list[NDArray[np.uint8]] = []

        def watch() -> None:
            nonlocal seen
            words = path.read_bytes()[len(seen) :] if path.exists() else b""
            seen += words
            for at in range(0, len(words), 100):
                shown.extend(map(np.asarray, pictures.feed(words[at : at + 100])))

        with media.Writer(path, Fraction(25), lossless=True, live=True) as writer:
            for number, frame in enumerate(bars()):
                writer.put(frame)
                until = time.monotonic() + 60
                while len(shown) < number:
                    assert time.monotonic() < until
                    watch()
        watch()
        assert codec_words(seen[:20]) == ""
        assert re.fullmatch(r"avc1\.[0-9a-f]{6}", codec_words(seen))
        assert np.array_equal(shown, bars())
        assert np.array_equal(read(path).frames, bars())

    def test_what_is_being_written_can_be_removed(self, tmp_path: Path) -> None:
        with files.atomic(tmp_path / "o.mp4") as draft:
            draft.write_text("half")
            files.remove_partial()
            assert not draft.exists()
            draft.write_text("whole")
        assert (tmp_path / "o.mp4").read_text() == "whole"

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which nobody can write")
    @pytest.mark.parametrize("name", ["o.mp4", "o.png"])
    def test_read_only_folder(self, name: str) -> None:
        with pytest.raises(InputError, match=r"can't write .*/proc"):
            files.check_output(Path("/proc") / name, media.SUFFIXES)
        with pytest.raises(InputError, match=r"can't write .*/proc"):
            write(Path("/proc") / name, bars(1), Fraction(25))

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / f".o.{os.getpid()}.part.mp4").symlink_to("/dev/full")
        with pytest.raises(InputError, match="no space left"):
            write(tmp_path / "o.mp4", bars(), Fraction(25))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("name", "message"),
        [("o.avi", "must end with"), ("none/o.mp4", "does not exist"), ("folder.mp4", "is a folder")],
    )
    def test_output_is_checked_before_work(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / "folder.mp4").mkdir()
        with pytest.raises(InputError, match=message):
            files.check_output(tmp_path / name, media.SUFFIXES)

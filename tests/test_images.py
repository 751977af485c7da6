import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from cxa_jax.data import images
from cxa_jax.errors import UserError

REAL = pathlib.Path(__file__).parents[2] / "shared/data"
GREY = np.random.default_rng(0).integers(0, 256, (24, 30), np.uint8)


def _triangle_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bilinear resize by its definition: a triangle as wide as an output pixel, cut at the border."""

    def weights(length: int) -> np.ndarray:
        scale = length / size
        centers = (np.arange(size) + 0.5) * scale - 0.5
        matrix = np.maximum(0, 1 - np.abs(np.arange(length) - centers[:, None]) / max(scale, 1))
        return matrix / matrix.sum(1, keepdims=True)

    return weights(pixels.shape[0]) @ pixels.astype(np.float64) @ weights(pixels.shape[1]).T


def _save(path: pathlib.Path, image: Image.Image) -> pathlib.Path:
    image.save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_every_mode_of_a_grey_picture_gives_the_same_pixels(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(GREY).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(255 - GREY))  # transparency must not matter
    pixels, seen = images.decode_grey(_save(tmp_path / "a.png", image))
    assert seen == mode
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, GREY)


def test_one_bit_and_transparent_palette(tmp_path):
    bits, mode = images.decode_grey(_save(tmp_path / "1.png", Image.fromarray(GREY > 100)))
    assert mode == "1"
    np.testing.assert_array_equal(bits, np.where(GREY > 100, 255, 0))
    palette = Image.fromarray(GREY).convert("P")
    palette.info["transparency"] = bytes(256)
    np.testing.assert_array_equal(images.decode_grey(_save(tmp_path / "p.png", palette))[0], GREY)


def test_colour_becomes_luminance(tmp_path):
    color = np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)
    pixels, _ = images.decode_grey(_save(tmp_path / "c.png", Image.fromarray(color)))
    assert np.abs(pixels - color @ np.array([0.299, 0.587, 0.114])).max() <= 0.51


@pytest.mark.parametrize(("bits", "divisor"), [(8, 1), (12, 16), (16, 256)])
def test_sixteen_bit_files_use_their_true_range(tmp_path, bits, divisor):
    raw = np.random.default_rng(2).integers(0, 1 << bits, (20, 20)).astype(np.uint16)
    raw[0, 0] = (1 << bits) - 1
    assert cv2.imwrite(str(tmp_path / "x.png"), raw)
    pixels, _ = images.decode_grey(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels, raw // divisor)
    assert pixels.max() == 255


def test_exif_orientation_is_told_and_not_applied(tmp_path):
    for orientation, notes in ((1, ()), (6, ("its EXIF orientation 6 is not applied",))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
        pixels, _, found = images.read_grey(tmp_path / "a.png")
        np.testing.assert_array_equal(pixels, GREY)
        assert found == notes
    Image.fromarray(GREY).save(tmp_path / "a.jpg", exif=b"Exif\0\0damaged")
    assert images.read_grey(tmp_path / "a.jpg")[2] == ()


@pytest.mark.parametrize("size", [8, 24, 30, 50])
def test_resize_is_antialiased_bilinear(size):
    result = images.resize_square(GREY, size)
    assert result.shape == (size, size)
    assert np.abs(result - _triangle_resize(GREY, size)).max() <= 1.01


def test_resize_averages_where_plain_bilinear_would_alias():
    stripes = np.tile(np.array([[0, 200]], np.uint8), (64, 32))
    assert np.abs(images.resize_square(stripes, 8)[:, 1:-1].astype(int) - 100).max() <= 2


def test_resize_keeps_pixels_of_the_right_size():
    square = GREY[:24, :24]
    assert images.resize_square(square, 24) is square


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "missing"])
def test_damaged_files_are_named(tmp_path, damage):
    path = _save(tmp_path / "bad.png", Image.fromarray(GREY))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 8
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}.get(damage, data))
    if damage == "missing":
        path.unlink()
    with pytest.raises(UserError, match=r"bad\.png"):
        images.load_grey(path, 8)


def test_a_later_frame_without_dimensions(tmp_path):
    """Pillow raises a TypeError of it, when the frames are counted."""
    frames = [Image.fromarray(GREY), Image.fromarray(GREY)]
    frames[0].save(tmp_path / "bad.tif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "bad.tif").read_bytes()
    width = b"\x00\x01\x04\x00\x01\x00\x00\x00\x1e"  # tag 256, of 30 px
    assert data.count(width) == 2
    data = data[: data.rindex(width)] + b"\x09\x09" + width[2:] + data[data.rindex(width) + len(width) :]
    (tmp_path / "bad.tif").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.tif"):
        images.read_grey(tmp_path / "bad.tif")


def test_floats_and_wide_integers_are_refused(tmp_path):
    with pytest.raises(UserError, match="floating point"):
        images.decode_grey(_save(tmp_path / "f.tiff", Image.fromarray(GREY.astype(np.float32))))
    with pytest.raises(UserError, match="16 bits"):
        images.decode_grey(_save(tmp_path / "i.tiff", Image.fromarray(GREY.astype(np.int32) * 100_000)))


def test_measure_image(tmp_path):
    assert images.measure_image(_save(tmp_path / "a.png", Image.fromarray(GREY))) == (30, 24)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_convert_images_keeps_order(tmp_path, num_workers):
    rng = np.random.default_rng(3)
    paths = [_save(tmp_path / f"{i}.png", Image.fromarray(rng.integers(0, 256, (12, 12), np.uint8))) for i in range(70)]
    converted = list(images.convert_images(paths, 6, num_workers))
    assert len(converted) == 70
    for path, image in zip(paths, converted, strict=True):
        np.testing.assert_array_equal(image.pixels, images.load_grey(path, 6).pixels)
        assert (image.mode, image.width, image.height) == ("L", 12, 12)


def test_convert_images_names_every_bad_file_in_one_error(tmp_path):
    paths = [_save(tmp_path / f"{i:02d}.png", Image.fromarray(GREY)) for i in range(40)]
    for i in (3, 20, 39):
        paths[i].write_bytes(paths[i].read_bytes()[:200])
    with pytest.raises(UserError, match=r"(?s)3 of 40 images.*03\.png.*20\.png.*39\.png"):
        list(images.convert_images(paths, 8, 1))


@pytest.mark.skipif(not (REAL / "chestxray14_1024").is_dir(), reason="the real images are not here")
def test_real_rgba_files_show_the_same_picture_as_the_small_grey_copies():
    small = {path.name: path for path in (REAL / "chestxray14_128/images").iterdir()}
    checked = 0
    for path in (REAL / "chestxray14_1024/images").iterdir():
        with Image.open(path) as image:
            mode = image.mode
        if mode == "RGBA" and path.name in small:
            # The copies were halved without antialiasing, so they are noisier than ours.
            ours = images.load_grey(path, 128).pixels.astype(float)
            theirs = images.decode_grey(small[path.name])[0].astype(float)
            assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99
            assert abs(ours.mean() - theirs.mean()) < 1
            checked += 1
    assert checked > 0

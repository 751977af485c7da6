"""Image files that nobody should send, drawn by hypothesis: right, odd, damaged, and bombs."""

import io
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from PIL import Image

MODES = ("1", "L", "LA", "RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "I;16", "I", "F")
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif", "WEBP": ".webp", "PPM": ".png"}
SIZES = ((1, 1), (2, 3), (17, 9), (40, 33), (60_000, 1), (1, 60_000))
MAGIC = (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM", b"GIF89a", b"RIFF",
         b"P5\n9 9\n255\n", b"\0" * 128 + b"DICM", b"%PDF-1.4", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
         b"8BPS\0\x01", b"\0\0\x01\0", b"DDS ",
         b"\x8aMNG")  # fmt: skip


def make_bomb(width: int, height: int, bits: int, colour: int) -> bytes:
    """Return a PNG of a few bytes whose header promises width x height."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return MAGIC[1] + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


def encode(mode: str, kind: str, size: tuple[int, int], seed: int, num_frames: int) -> bytes:
    """Return an image file; a mode that the format does not know becomes RGB or L."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    frames = []
    for _ in range(num_frames):
        grey = rng.integers(0, 256, size[::-1], np.uint8)
        if mode == "I;16":
            frames.append(Image.fromarray(grey.astype(np.uint16) * int(rng.choice([1, 16, 257]))))
        elif mode == "PA":
            frames.append(Image.fromarray(grey).convert("P").convert("PA"))
        else:
            frames.append(Image.fromarray(grey).convert(mode))
    more = {"save_all": True, "append_images": frames[1:]} if num_frames > 1 and kind in ("TIFF", "GIF", "PNG") else {}
    try:
        frames[0].save(file, kind, **more)
    except (OSError, ValueError, KeyError):
        file = io.BytesIO()
        frames[0].convert("L" if mode in ("1", "I;16", "I", "F") else "RGB").resize((9, 7)).save(file, kind)
    return file.getvalue()


@st.composite
def damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Leave data as they are, or cut, flip, zero, drop or insert some, or exchange the first bytes."""
    what = draw(st.sampled_from(("none", "cut", "flip", "zero", "drop", "insert", "magic", "empty", "header")))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    some = draw(st.binary(min_size=1, max_size=8))
    match what:
        case "cut":
            return data[:at]
        case "flip":
            return data[:at] + bytes([data[at] ^ some[0]]) + data[at + 1 :] if data else data
        case "zero":
            return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
        case "drop":
            return data[:at] + data[at + len(some) :]
        case "insert":
            return data[:at] + some + data[at:]
        case "magic":
            return draw(st.sampled_from(MAGIC)) + data[draw(st.integers(0, 16)) :]
        case "header":  # most of what a decoder trusts stands in the first bytes
            at = draw(st.integers(0, min(120, max(0, len(data) - 1))))
            return data[:at] + some + data[at + len(some) :]
        case "empty":
            return b""
        case _:
            return data


@st.composite
def image_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a file name and its bytes."""
    kind = draw(st.sampled_from(tuple(FORMATS)))
    suffix = draw(st.sampled_from((FORMATS[kind],) * 3 + (".png", ".jpg", ".dcm", "")))
    if draw(st.integers(0, 30)) == 0:
        sides = st.sampled_from((1, 20_000, 60_000, 2**31 - 1, 2**32 - 1, 0))
        return f"bomb{suffix}", make_bomb(draw(sides), draw(sides), draw(st.sampled_from((1, 8, 16, 7))), draw(st.sampled_from((0, 2, 6, 3))))  # fmt: skip  # noqa: E501
    data = encode(draw(st.sampled_from(MODES)), kind, draw(st.sampled_from(SIZES)), draw(st.integers(0, 9)), draw(st.sampled_from((1, 1, 1, 3))))  # fmt: skip  # noqa: E501
    name = draw(st.sampled_from(("a", "ein Röntgenbild", "胸部 X線", "a b'c\"d", "-x", "#1%20")))
    return f"{name}{suffix}", draw(damage(data))

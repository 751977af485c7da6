"""Pictures of predictions: X-ray, map and both (Fig. 1), one file each, and contact sheets. Drawn by Pillow: fast."""

import functools
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxa_jax.figures import FONT_FILE, superimpose

TILE_PX = 170  # longer side of an image on a contact sheet
COLUMNS, LINES = 6, 5
FOOTER = "Research software, not a medical device."
BOX_COLOUR, INK, ALARM = (0, 220, 90), (30, 30, 30), (190, 60, 0)
_GAP, _LINE, _BAR = 10, 20, 44


class Prediction(NamedTuple):
    """What a picture shows of one image.

    Attributes:
      name: number and name of the file.
      display: uint8 [h, w].
      heat: [S, S] in [0, 1], the map in the network's frame.
      box: x, y, w, h in px of `display`, or None.
      verdict: score and decision in words.
      warnings: what is odd about the image, in words.
      is_positive: the decision.
    """

    name: str
    display: np.ndarray
    heat: np.ndarray
    box: np.ndarray | None
    verdict: str
    warnings: list[str]
    is_positive: bool


def draw_panels(prediction: Prediction, map_name: str, intensity: float, remark: str) -> Image.Image:
    """Draw X-ray, map on a fixed scale from 0 to 1, and the map superimposed at `intensity`; the box on the first.

    Args:
      prediction: what to show.
      map_name: what the map is.
      intensity: 0.2 in the paper.
      remark: stands below, before the line that this is no medical device.
    """
    grey, heat = _stretch(prediction.display), _fit(prediction.heat, prediction.display.shape)
    height, width = grey.shape
    top = _GAP + (3 if prediction.warnings else 2) * _LINE + _LINE
    canvas = Image.new("RGB", (5 * _GAP + 3 * width + _BAR, top + height + 2 * _LINE), "white")
    draw = ImageDraw.Draw(canvas)
    _write(draw, (_GAP, _GAP), prediction.name, canvas.width, 14)
    _write(draw, (_GAP, _GAP + _LINE), prediction.verdict, canvas.width, 14)
    if prediction.warnings:
        _write(draw, (_GAP, _GAP + 2 * _LINE), "; ".join(prediction.warnings), canvas.width, 12, ALARM)
    lefts = (_GAP, 2 * _GAP + width, 4 * _GAP + 2 * width + _BAR)
    colours = superimpose(np.zeros(grey.shape), heat, 1.0)
    pictures = (np.repeat(grey[..., None], 3, axis=2), colours, superimpose(grey, heat, intensity))
    captions = ("X-ray", map_name, f"superimposed at {intensity:g}")
    for left, picture, caption in zip(lefts, pictures, captions, strict=True):
        _write(draw, (left, top - _LINE), caption, width, 12)
        canvas.paste(_to_image(picture), (left, top))
    if prediction.box is not None:
        x, y, w, h = prediction.box
        draw.rectangle((_GAP + x, top + y, _GAP + x + w - 1, top + y + h - 1), outline=BOX_COLOUR, width=2)
    _draw_scale(canvas, draw, (lefts[1] + width + _GAP, top), height)
    _write(draw, (_GAP, top + height + _LINE // 2), f"{remark} {FOOTER}".strip(), canvas.width, 12)
    return canvas


class ContactSheets:
    """Superimposed maps, thirty to a page, written when a page is full; a context manager that writes the last one."""

    def __init__(self, folder: pathlib.Path, intensity: float, remark: str):
        """Remember where to write, the intensity of the maps, and a remark that stands below every page."""
        self._folder, self._intensity = folder, intensity
        self._footer = f"{remark} {FOOTER} ! = see its warnings.".strip()
        self._tiles: list[Image.Image] = []
        self.num_pages = 0

    def __enter__(self) -> "ContactSheets":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tiles:
            self._write_page()

    def add(self, prediction: Prediction) -> None:
        """Add one image; its frame is green where the decision is cardiomegaly."""
        small = Image.fromarray(prediction.display)
        small.thumbnail((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)
        grey, heat = _stretch(np.asarray(small)), _fit(prediction.heat, small.size[::-1])
        picture = _to_image(superimpose(grey, heat, self._intensity))
        mark = "! " if prediction.warnings else ""
        self._add(picture, mark + prediction.verdict.split(",")[0], prediction.name, prediction.is_positive)

    def add_error(self, name: str) -> None:
        """Add an empty tile for a file that could not be read."""
        self._add(Image.new("RGB", (TILE_PX, TILE_PX), (225, 225, 225)), "not read", name, False)

    def _add(self, picture: Image.Image, text: str, name: str, is_framed: bool) -> None:
        tile = Image.new("RGB", (TILE_PX + 2 * _GAP, TILE_PX + _GAP + 2 * _LINE), "white")
        left, top = (tile.width - picture.width) // 2, _GAP // 2 + (TILE_PX - picture.height) // 2
        tile.paste(picture, (left, top))
        draw = ImageDraw.Draw(tile)
        if is_framed:
            frame = (left - 3, top - 3, left + picture.width + 2, top + picture.height + 2)
            draw.rectangle(frame, outline=BOX_COLOUR, width=3)
        _write(draw, (_GAP, TILE_PX + _GAP), text, TILE_PX, 12, ALARM if text[0] in "!n" else INK)
        _write(draw, (_GAP, TILE_PX + _GAP + _LINE - 4), name, TILE_PX, 10)
        self._tiles.append(tile)
        if len(self._tiles) == COLUMNS * LINES:
            self._write_page()

    def _write_page(self) -> None:
        self.num_pages += 1
        width, height = self._tiles[0].size
        lines = -(-len(self._tiles) // COLUMNS)
        page = Image.new("RGB", (COLUMNS * width, lines * height + _LINE), "white")
        for i, tile in enumerate(self._tiles):
            page.paste(tile, (i % COLUMNS * width, i // COLUMNS * height))
        _write(ImageDraw.Draw(page), (_GAP, lines * height), self._footer, page.width, 12)
        page.save(self._folder / f"sheet_{self.num_pages:03d}.png")
        self._tiles = []


def _stretch(pixels: np.ndarray) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    return (pixels - low) / (high - low) if high > low else pixels / 255.0


def _fit(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    small = Image.fromarray(heat.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.clip(np.asarray(small, np.float64), 0, 1)


def _to_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(255 * picture).astype(np.uint8))


def _draw_scale(canvas: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], height: int) -> None:
    ramp = np.repeat(np.linspace(1, 0, height)[:, None], 14, axis=1)
    canvas.paste(_to_image(superimpose(np.zeros(ramp.shape), ramp, 1.0)), corner)
    for value in (0.0, 0.5, 1.0):
        y = corner[1] + (1 - value) * (height - 1)
        _write(draw, (corner[0] + 17, y - 7 if 0 < value < 1 else (y - 13 if value == 0 else y)), f"{value:g}", 40, 12)


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, width: int, size: int, ink: tuple = INK
) -> None:
    """Write one line, cut with '...' where it would leave `width` px."""
    font = _load_font(size)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # a file's name may be no text
    text = "".join(letter if letter.isprintable() else "?" for letter in text)  # a file's name may hold a line's end
    room = width - (corner[0] if width == draw.im.size[0] else 0)
    if draw.textlength(text, font) > room:
        while text and draw.textlength(text + "...", font) > room:
            text = text[:-1]
        text += "..."
    draw.text(corner, text, fill=ink, font=font)


@functools.cache
def _load_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT_FILE, size)

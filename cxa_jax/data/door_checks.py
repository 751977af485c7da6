"""What is odd about an image that a user brings: rules whose findings stand beside its score. Nothing is corrected.

  blank        99th minus 1st percentile of the pixels below 16 of 255 grey levels
  inverted     correlation with the mean training image below -0.3
  colour       more than 1 % of the pixels have channels that differ by more than 16 levels (told by the reader)
  small        the shorter side is below the network's input, so pixels were invented
  oblong       the longer side is more than 1.5 times the shorter, so the chest was squeezed
  unusual      mean, standard deviation, 5th, 50th or 95th percentile of the pixels, or the correlation with the mean
               training image, outside the training images' 0.1-99.9 % range
  DICOM        modality or view position of another kind of image (told by the reader)

The correlations need the run's `input_statistics.json`. An image of the training set's kind is called unusual by one of
the six numbers in about one case of a hundred.
"""

import numpy as np

from cxa_jax.data.images import GreyImage
from cxa_jax.data.input_statistics import InputStatistics, describe_image

BLANK_SPAN = 16
INVERTED_BELOW = -0.3
OBLONG_ABOVE = 1.5


def check_image(image: GreyImage, statistics: InputStatistics | None) -> list[str]:
    """Return what is odd about an image, in words; empty if nothing.

    Args:
      image: as the network gets it, uint8 [S, S], with its file's mode, width, height (px) and notes.
      statistics: of the training images; None leaves out the rules that need them.

    Returns:
      One phrase for each finding: its rule's name, a colon, the number found.
    """
    found = [f"note: {note}" for note in image.notes]
    short, long = sorted((image.width, image.height))
    side = image.pixels.shape[0]
    if short < side:
        found.append(f"small: {image.width} x {image.height} px, enlarged to {side}")
    if long > OBLONG_ABOVE * short:
        found.append(f"oblong: {image.width} x {image.height} px, squeezed to a square")
    low, high = np.percentile(image.pixels, (1, 99))
    if high - low < BLANK_SPAN:
        return [*found, f"blank: grey levels {low:.0f} to {high:.0f}"]
    return found if statistics is None else found + _compare(image.pixels, statistics)


def _compare(pixels: np.ndarray, statistics: InputStatistics) -> list[str]:
    values = describe_image(pixels, statistics.thumbnail)
    if values["similarity"] < INVERTED_BELOW:
        return [f"inverted: correlation with the mean training image {values['similarity']:.2f}"]
    found = []
    for name, (low, high) in statistics.ranges.items():
        if not low <= values[name] <= high:
            digits = 2 if name == "similarity" else 0
            expected = f"{low:.{digits}f} to {high:.{digits}f}"
            found.append(f"unusual: {name} {values[name]:.{digits}f}, training images {expected}")
    return found

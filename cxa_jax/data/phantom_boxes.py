"""How a phantom's box is drawn: about the heart alone, or about the cardiac silhouette, as a radiologist's box is.

'mask': the tight box of the heart's mask. It is the heart as segmentations have it: the pixels whose rays pass through
the heart (SCR database, van Ginneken et al. 2006).

'radiologist': the tight box of heart and pulmonary trunk, the outline that is read as the cardiac silhouette. Of
ChestX-ray14's boxes it is known that a board-certified radiologist drew them by hand (Wang et al. 2017, on B-Boxes),
not by which rule, so the rule is that of the textbooks. On a frontal film the silhouette's right border is the right
atrium, its left one, from above, the pulmonary trunk, the left atrial appendage and the left ventricle down to the
apex; below it blends with the diaphragm (Ellis, Clinical Anatomy). The trunk stands on the heart without an edge
between them, so that a box about an enlarged heart takes it in. The aortic arch above has an edge of its own, the knob,
and where radiologists box findings it is one of its own, aortic enlargement (VinDr-CXR, Nguyen et al. 2022): it is left
out. In the drawing the trunk is a disc, to the half height of its edge, where the heart's mask ends too.

The silhouette is as wide as the heart, whose width is what the cardiothoracic ratio measures; of enlarged hearts of
'hard' it is higher, .375 of the side for .346 (mean of 198). A box's share of the width is that ratio times the chest's
share, .69 in these drawings: where chests fill more of the frame boxes are wider, and no rule for boxes makes up for
that. Nothing here is fitted to boxes of X-rays.
"""

import numpy as np

BOXES = ("mask", "radiologist")


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight box x, y, w, h in px of what is not zero in a mask [S, S]."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1

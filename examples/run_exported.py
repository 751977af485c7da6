"""Run an exported network with jax alone: python run_exported.py model.stablehlo xray.png ... No medical device."""

import pathlib
import sys

import numpy as np
from jax import export
from PIL import Image

network = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
size = network.in_avals[0].shape[1]
for path in sys.argv[2:]:
    image = Image.open(path)
    if image.mode.startswith(("I", "F")):
        sys.exit(f"{path}: only files of 8 bits are read here")
    image = np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))
    # Bytes; images of floats, grey levels 0-255, would go the other way round: uint8 empty.
    out = network.call(uint8=image[None], float32=np.zeros((0, size, size), np.float32))
    row, column = np.unravel_index(out["attention"][0].argmax(), out["attention"].shape[1:])
    print(f"{path}: probability {out['probability'][0]:.4f}, attention highest in cell {row}, {column}")

"""Run an exported network with jax alone: python run_exported.py model.stablehlo xray.png ...

Research software, not a medical device.
"""

import pathlib
import sys

import numpy as np
from jax import export
from PIL import Image

network = export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
size = network.in_avals[0].shape[1]
for path in sys.argv[2:]:
    image = Image.open(path).convert("L").resize((size, size), Image.Resampling.BILINEAR)
    out = network.call(np.asarray(image, np.float32)[None])
    row, column = np.unravel_index(out["attention"][0].argmax(), out["attention"].shape[1:])
    print(f"{path}: probability {out['probability'][0]:.4f}, attention highest in cell {row}, {column}")

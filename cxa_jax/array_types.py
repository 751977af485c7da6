"""Array types of the field, by shape: B batch, H W image, h w feature map, C channels."""

from typing import Any, TypedDict

from jaxtyping import Array, Bool, Float, Int, UInt8

Images = Float[Array, "B H W 3"]  # [0, 1] unless a normalisation says otherwise
RawImages = UInt8[Array, "B H W 1"]  # grey bytes, as stored and as they cross to the device
Features = Float[Array, "B h w C"]  # F
AttentionLogits = Float[Array, "B h w M"]  # z; M = 1 shared map, or one map for each class
Attention = Float[Array, "B h w M"]  # W = sigmoid(z), in [0, 1]
Pooled = Float[Array, "B C"]  # f
Logits = Float[Array, " B"]
Labels = Int[Array, " B"]  # 1 = cardiomegaly, 0 = no finding
Mask = Bool[Array, " B"]  # True = real row, False = padding
PyTree = Any


class Batch(TypedDict):
    """What a pipeline hands to a step; `index` is the row in the split, which names the image."""

    image: RawImages
    label: Labels
    mask: Mask
    index: Int[Array, " B"]

"""The legend of letters and the aliases of tensors that signatures use.

n   faces or photos in a batch          c   colour channels, always 3 (sRGB)
h,w height and width in pixels          z   width of a latent
k   number of style inputs of a generator ("num_ws")
v   width of a style                    d   number of weights in a flattened vector

Images are float32, sRGB, nominally in [0, 1]; a generator may stray outside, so clamp where you display.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n 3 h w"]
LowImages = Float[Tensor, "n 3 lh lw"]
Latents = Float[Tensor, "n z"]
Styles = Float[Tensor, "n k v"]
Vector = Float[Tensor, "d"]

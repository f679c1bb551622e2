"""Every tensor shape of the package, named once; jaxtyping and beartype check them under pytest and cost users
nothing."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "n 3 h w"]  # pixels in [0, 1], float32
Resized = Float[Tensor, "n 3 _ _"]  # the same images at another size
Embeddings = Float[Tensor, "n d"]  # raw, not on the sphere
TextEmbeddings = Float[Tensor, "classes d"]  # of texts that meet images, raw as well
PatchTokens = Float[Tensor, "n patches d"]  # of the patches of images, in the space of embeddings
Logits = Float[Tensor, "n classes"]
Labels = Int[Tensor, " n"]
Owners = Int[Tensor, " classes"]  # of such texts: for each the number of its image, or its own place
PerImage = Float[Tensor, " n"]
Mask = Bool[Tensor, " n"]
Seeds = Int[Tensor, " n"]  # one 64-bit key per sample, from which all its noise is drawn
Context = Float[Tensor, "*images tokens width"]  # learned tokens, for each image or for all
Deeper = Float[Tensor, "layers tokens width"]  # such tokens before the second layer of a tower, the third and so on
Spliced = Float[Tensor, "*images texts d"]  # raw embeddings of texts with these

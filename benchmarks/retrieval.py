"""What it takes to score a retrieval: time and peak memory of ranking a whole gallery in both directions.

    python benchmarks/retrieval.py --images 5000 --captions 5 --dimensions 512

The embeddings are random, so nothing but the scoring is measured; the size of COCO's test set is the default.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from crossguard.gallery import image_ranks, text_ranks
from crossguard.models.base import cosine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, options.dimensions, generator=generator)
    owners = torch.arange(options.images).repeat_interleave(options.captions)
    texts = images[owners] + 12.0 * torch.randn(len(owners), options.dimensions, generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    recalls = [float((ranks(images, texts, owners, cosine) == 0).float().mean()) for ranks in (image_ranks, text_ranks)]
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        json.dumps(
            {
                "gallery": f"{len(images)} x {len(texts)}",
                "seconds": round(seconds, 1),
                "megabytes": grown // 1024,
                "recall at 1": [round(one, 3) for one in recalls],
            }
        )
    )


if __name__ == "__main__":
    main()

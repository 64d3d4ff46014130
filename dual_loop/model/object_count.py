"""Sa2VA's rule that every image of a batch counts with the same number of objects.

The original brings each image to exactly five: fewer are repeated cyclically (two give 0, 1, 0, 1, 0), more are drawn
by a random permutation. So an image with one object weighs as much in the mask losses as one with five. Here it is the
option ``loss.num_objects``; the default, None, counts every object once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dual_loop.errors import PromptError, explain


def object_order(image_index: Tensor, num_images: int, num_objects: int, seeds: Tensor) -> Tensor:
    """Return which objects stand for each image, image by image.

    Args:
        image_index: (N,) int64, the image of each object, in any order.
        num_images: B.
        num_objects: how many objects an image is brought to, at least 1.
        seeds: (N,) int64; that of an image's first object draws its permutation, where it has more than
            ``num_objects``. Neither the other images nor the device matter.

    Returns:
        (B * num_objects,) int64 indices into the N objects, on the device of ``image_index``.

    Raises:
        PromptError: an image has no object at all.
    """
    owners, order = image_index.tolist(), []
    for image in range(num_images):
        own = [index for index, owner in enumerate(owners) if owner == image]
        if not own:
            where, expected = f"image {image} of the batch", f"1 or more, to be brought to {num_objects}"
            fix = "leave the image out of the batch, or set loss.num_objects=None"
            raise PromptError(explain("an image has no object", where, "no [SEG] token", expected, fix))
        if len(own) > num_objects:
            generator = torch.Generator().manual_seed(int(seeds[own[0]]))
            own = [own[k] for k in torch.randperm(len(own), generator=generator).tolist()]
        order += [own[k % len(own)] for k in range(num_objects)]
    return torch.tensor(order, dtype=torch.long, device=image_index.device)


def object_multiplicity(image_index: Tensor, num_images: int, num_objects: int, seeds: Tensor) -> Tensor:
    """Return how often each object stands in :func:`object_order`: (N,) float32.

    As weights of the objects these give the same losses as the repeated objects, for one decoder pass an object.
    """
    order = object_order(image_index, num_images, num_objects, seeds)
    return torch.bincount(order, minlength=len(image_index)).float()

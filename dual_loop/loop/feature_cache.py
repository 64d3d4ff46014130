"""An opt-in cache on disk for what the frozen image encoders compute: a second epoch then reads it.

A file holds the features of one image tile, or of one grounding image, in the dtype they were computed in, so nothing
changes. Its name is a hash of the pixels, of the encoder's weights and of the dtype: another image, model or precision
cannot be mistaken for this one. For the 4B model an image takes about 31 MiB (SAM 2's three levels in bfloat16), so
this is for small sets that are seen many times; ``docs/performance.md`` says when it pays.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dual_loop.data.index_file import replacing
from dual_loop.errors import ConfigError, EnvironmentProblem, explain
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import Batch, Seen

logger = logging.getLogger("dual_loop")

GIB = 2**30


class FeatureCache:
    """Features of the two frozen encoders, from disk where they are there.

    Ranks and runs may share a folder: files are written under another name and moved into place.

    Args:
        folder: where the files are; made if missing.
        limit_gib: nothing more is written once the folder holds so much.
        num_images: of an epoch, for the line that is printed before anything is written.

    Raises:
        ConfigError: an encoder trains, so its features change.
        EnvironmentProblem: the folder cannot be made.
    """

    def __init__(self, model: Sa2VA, folder: str | Path, limit_gib: float, num_images: int = 0) -> None:
        encoders = {"vision": model.mllm.model.vision_tower, "grounding": model.grounding_encoder.vision_encoder}
        for name, encoder in encoders.items():
            if any(parameter.requires_grad for parameter in encoder.parameters()):
                what = f"the {name} encoder trains, so its features cannot be cached"
                raise ConfigError(explain(what, "speed.feature_cache", str(folder), fix="set speed.feature_cache none"))
        self.model, self.folder, self.limit, self.num_images = model, Path(folder), int(limit_gib * GIB), num_images
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentProblem(explain("the feature cache cannot be made", str(folder), str(error))) from error
        self._marks = {name: weights_mark(encoder) for name, encoder in encoders.items()}
        # Levels that come out before the neck's convolutions are not those that come out behind them.
        self._marks["grounding"] += f" open {getattr(encoders['grounding'].neck, 'open_levels', ())}"
        self.used = sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))
        self.is_announced = False
        self.num_read = self.num_computed = self.num_not_stored = 0

    @torch.no_grad()
    def see(self, batch: Batch) -> Seen:
        """Return ``model.see(batch)``, from disk as far as it is there."""
        if not self.is_announced:
            logger.info("%s", self.announcement(batch))
        [vision] = self._look_up("vision", batch.pixel_values, lambda x: [self.model.encode_vision(x)])
        return Seen(vision, self._look_up("grounding", batch.g_pixel_values, self.model.encode_grounding))

    @torch.no_grad()
    def bytes_of(self, batch: Batch) -> int:
        """Return how many bytes the features of ``batch`` take; it runs both encoders on its first image."""
        tile = self.model.encode_vision(batch.pixel_values[:1])
        levels = self.model.encode_grounding(batch.g_pixel_values[:1])
        return tile.nbytes * len(batch.pixel_values) + sum(level.nbytes for level in levels) * batch.num_images

    def announcement(self, batch: Batch) -> str:
        """Return the line that says what an image and all images of an epoch take."""
        self.is_announced = True
        each = self.bytes_of(batch) / batch.num_images
        whole = each * self.num_images
        rest = " (the rest is computed anew every time)" if whole > self.limit else ""
        return (
            f"Feature cache {self.folder}: {each / 2**20:.1f} MiB an image, {whole / GIB:.1f} GiB for "
            f"{self.num_images:,} images; {self.used / GIB:.1f} GiB are there, at most {self.limit / GIB:.1f} GiB are "
            f"kept{rest}"
        )

    def _look_up(self, name: str, pixels: Tensor, compute: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Return the features of all pixels, (n, ...) each: those on disk, and one pass over all others."""
        precision = "autocast" if torch.is_autocast_enabled(pixels.device.type) else "plain"
        paths = [self._path(name, image, precision) for image in pixels.cpu()]
        rows = [self._read(path, pixels.device) for path in paths]
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing:
            for index, *row in zip(missing, *compute(pixels[missing]), strict=True):
                rows[index] = row
                self._write(paths[index], row)
        self.num_read += len(rows) - len(missing)
        self.num_computed += len(missing)
        return [torch.stack(level) for level in zip(*(row for row in rows if row is not None), strict=True)]

    def _path(self, name: str, image: Tensor, precision: str) -> Path:
        values = image.contiguous()
        text = f"{name} {self._marks[name]} {precision} {values.dtype} {tuple(values.shape)} "
        mark = hashlib.blake2b(text.encode(), digest_size=20)
        mark.update(values.view(torch.uint8).numpy().data)
        digest = mark.hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def _read(self, path: Path, device: torch.device) -> list[Tensor] | None:
        try:
            stored = load_file(str(path), device=str(device))
        except (OSError, SafetensorError):
            return None  # not there, or damaged: it is computed and written again
        return [stored[f"{level}"] for level in range(len(stored))]

    def _write(self, path: Path, levels: list[Tensor]) -> None:
        size = sum(level.nbytes for level in levels)
        if self.used + size > self.limit:
            self.num_not_stored += 1
            return
        try:
            with replacing(path) as temporary:
                save_file({f"{k}": level.contiguous() for k, level in enumerate(levels)}, str(temporary))
        except OSError as error:
            what, fix = "the feature cache cannot be written", "free space there, or lower speed.feature_cache_gib"
            raise EnvironmentProblem(explain(what, str(path), str(error), fix=fix)) from error
        self.used += size


def weights_mark(module: nn.Module) -> str:
    """Return a hash of all parameters of ``module``, by name."""
    mark = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(module.named_parameters()):
        mark.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        mark.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return mark.hexdigest()

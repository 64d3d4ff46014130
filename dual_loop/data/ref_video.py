"""Reader of videos with referring expressions: MeViS and Ref-DAVIS17 (:data:`LAYOUTS`), an entry a video.

MeViS is of Ding et al., ICCV 2023 (2308.08544). An expression names its masks by ``anno_id``: keys of
``mask_dict.json``, whose values are a run-length code, or null, for each frame; several are one mask. Ref-DAVIS17 is of
Khoreva et al., ACCV 2018 (1803.08006), in the form of Ref-YouTube-VOS that ReferFormer's ``convert_davis_to_ytvos.py``
writes: ``obj_id`` is the value of the object's pixels in palette images, 255 is void (it counts nowhere), and every
object has four expressions, one of each annotator (two of them saw the first frame, two the whole video).

Reasons of :class:`~dual_loop.errors.SampleError`: ``missing_file``, ``truncated_file``, ``broken_json``,
``broken_rle``, ``size_mismatch``, ``bad_array``, ``unsafe_path``, ``special_token``, ``broken_text``, ``missing_key``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dual_loop.data.captions import check_captions
from dual_loop.data.images import open_image_file, read_picture
from dual_loop.data.layout import layout_error
from dual_loop.data.limits import of_content, parse_json, read_file
from dual_loop.data.masks import decode_rle, safe_join
from dual_loop.data.reader import Reader, read_annotations
from dual_loop.errors import bad_sample, shorten
from dual_loop.types import SkippedRegion

LAYOUTS = {
    "mevis": """
  root/
    SPLIT/meta_expressions.json
    SPLIT/mask_dict.json    (where masks are public: train, valid_u)
    SPLIT/JPEGImages/VIDEO/FRAME.jpg
""",
    "refdavis17": """
  root/
    meta_expressions/SPLIT/meta_expressions.json
    SPLIT/JPEGImages/VIDEO/FRAME.jpg
    SPLIT/Annotations/VIDEO/FRAME.png
""",
}
TITLES = {"mevis": "MeViS", "refdavis17": "Ref-DAVIS17"}

PROTOCOLS = {
    "mevis": "an expression means the union of its objects",
    "refdavis17": "an expression is compared with its own object alone, void left out; every object has one expression"
    " of each of 4 annotators, so a mean over expressions is that of the annotators' means",
}
"""What a set fixes, printed with the result."""

ANNOTATORS, VOID = 4, 255


@dataclass(frozen=True)
class Expression:
    """An expression about a video: its name there, and the names of the masks that are together what it means."""

    name: str
    text: str
    objects: tuple[str, ...]


@dataclass(frozen=True)
class Clip:
    """A video of one or more frames, which are read when they are asked for.

    Attributes:
        source: the data set. sample_id: the video's name. passed_over: nothing; as of ``RegionSample``.
    """

    source: str
    sample_id: str
    expressions: tuple[Expression, ...]
    frames: tuple[str, ...]
    reader: RefVideos
    passed_over: tuple[SkippedRegion, ...] = ()

    def image(self, number: int) -> np.ndarray:
        """Return a frame, (H, W, 3) uint8.

        Raises:
            SampleError: it cannot be read.
        """
        return read_picture(self.reader.file_of(self, number, "JPEGImages", "jpg"), apply_exif=False).pixels

    def masks(self, number: int, expressions: Sequence[Expression], size: tuple[int, ...]) -> np.ndarray | None:
        """Return what the expressions mean on a frame of ``size`` (H, W), and where is void: (n + 1, H, W) bool.

        None where the masks are not public.

        Raises:
            SampleError: a mask is missing, broken or of another size.
        """
        return self.reader.masks_of(self, number, expressions, size)


class RefVideos(Reader):
    """MeViS or Ref-DAVIS17.

    Args:
        dataset: a key of :data:`LAYOUTS`. root: of the layout, or a folder that holds it under the name of ``dataset``.
        split: the folder's name.

    Raises:
        ConfigError: a folder or a file of the layout is not there.
        SampleError: ``broken_json``.
    """

    def __init__(self, dataset: str, root: str | Path, split: str) -> None:
        self.name, self.title, self.layout = dataset, TITLES[dataset], LAYOUTS[dataset]
        self.protocol = PROTOCOLS[dataset]
        super().__init__(own if (own := Path(root) / dataset).is_dir() else root)
        self.folder = self.root / split
        listing = (
            self.folder if dataset == "mevis" else self.root / "meta_expressions" / split
        ) / "meta_expressions.json"
        for path in (listing, self.folder / "JPEGImages"):
            if not path.exists():
                raise layout_error(
                    f"{self.title} lacks a part of its split {split}", path, "nothing there", self.layout
                )
        with of_content(str(listing)):
            self.videos: dict[str, Any] = dict(read_annotations(listing, str(listing))["videos"])  # type: ignore[index]
        self.listing, self.names = listing, list(self.videos)
        self._rows = np.arange(len(self.names))

    def entry_id(self, index: int) -> str:
        """Return the video's name."""
        return self.names[index]

    def load_all(self, index: int) -> Clip:
        """Return a video with all its expressions; no frame is read yet.

        Raises:
            SampleError: its record cannot be used.
        """
        name, key = self.names[index], {"mevis": "anno_id", "refdavis17": "obj_id"}[self.name]
        where, expressions = f"{self.listing}: {name}", []
        with of_content(where):
            frames = tuple(map(str, self.videos[name]["frames"]))
            for number, record in self.videos[name]["expressions"].items():
                objects = record.get(key, [])
                objects = objects if isinstance(objects, list) else [objects]
                expressions.append(Expression(number, str(record["exp"]), tuple(str(int(one)) for one in objects)))
        if not frames or not expressions:
            seen = f"{len(frames)} frames, {len(expressions)} expressions"
            raise bad_sample("broken_json", "a video has nothing to measure", where, seen, "1 or more of both")
        check_captions((one.text for one in expressions), where)
        counts = Counter(one.objects for one in expressions)
        if self.name == "refdavis17" and set(counts.values()) != {ANNOTATORS}:
            seen = ", ".join(f"object {' '.join(own)}: {count}" for own, count in counts.items())
            what = "an object has not one expression of each annotator"
            raise bad_sample("broken_json", what, where, shorten(seen), f"{ANNOTATORS} of each object")
        return Clip(self.name, name, tuple(expressions), frames, self)

    def file_of(self, clip: Clip, number: int, part: str, ending: str) -> Path:
        return safe_join(self.folder / part, f"{clip.sample_id}/{clip.frames[number]}.{ending}")

    @cached_property
    def codes(self) -> Mapping[str, Any] | None:
        """The run-length codes of MeViS by name, then by frame; None where they are not public."""
        path = self.folder / "mask_dict.json"
        if not path.exists():
            return None
        with of_content(str(path)):
            return dict(parse_json(read_file(path)))

    def masks_of(
        self, clip: Clip, number: int, expressions: Sequence[Expression], size: tuple[int, ...]
    ) -> np.ndarray | None:
        """See :meth:`Clip.masks`."""
        found = np.zeros((len(expressions) + 1, *size), bool)
        if self.name == "mevis":
            if self.codes is None:
                return None
            for own, one in zip(found, expressions, strict=False):
                for name in one.objects:
                    where = f"{self.folder / 'mask_dict.json'}: {name}, frame {number} of {clip.sample_id}"
                    with of_content(where):
                        code = self.codes[name][number]
                    if code is not None:
                        mask = decode_rle(code, where)
                        self._check_size(mask.shape, size, where)
                        own |= mask
            return found
        if not (self.folder / "Annotations").exists():
            return None
        path = self.file_of(clip, number, "Annotations", "png")
        values = np.asarray(open_image_file(path))
        if values.ndim != 2 or values.dtype != np.uint8:
            expected = "an image of 8-bit palette or grey values, one an object"
            raise bad_sample("bad_array", "an annotation is no map of objects", str(path), values.shape, expected)
        self._check_size(values.shape, size, str(path))
        for own, one in zip(found, expressions, strict=False):
            own |= np.isin(values, [int(name) for name in one.objects])
        found[-1] = values == VOID
        return found

    @staticmethod
    def _check_size(seen: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
        if seen != expected:
            raise bad_sample("size_mismatch", "a mask and its frame differ in size", where, seen, expected)

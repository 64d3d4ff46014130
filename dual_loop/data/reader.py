"""What all readers share: a root, a cap, regions that are drawn until enough pass."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dual_loop.data.captions import check_text
from dual_loop.data.images import Picture, read_picture
from dual_loop.data.layout import check_root
from dual_loop.data.limits import SAMPLE_BYTES, parse_json, read_file
from dual_loop.data.masks import check_mask, target_vanished
from dual_loop.data.shares import choose_capped
from dual_loop.data.string_table import StringTable
from dual_loop.errors import SampleError, bad_sample, explain, printable
from dual_loop.types import NeededSize, RegionSample, SkippedRegion

CANDIDATES = 4
"""Regions that are looked at for each that is kept, under ``data.region_choice = hard``."""


class Drawn(NamedTuple):
    """Regions of an image: their numbers, the mask (H, W) bool of each, and the tried ones that cannot be used."""

    numbers: list[int]
    masks: list[np.ndarray]
    passed_over: list[SkippedRegion]


class Reader:
    """A data set on disk as an indexed collection of images with regions; a user's own source may extend it.

    ``len()`` and :meth:`entry_id` work from the index alone and never open an image. A reader writes :meth:`load`, or
    :meth:`load_reduced` where it can decode an image at a smaller scale.

    Args:
        root: folder of the data set; ``title`` and ``layout`` are what the message about a bad one shows.
        index_dir: see :func:`~dual_loop.data.index.load_or_build`.
        regions_per_image: most regions of one sample.
        min_area: least share of the image that a mask covers, 0..1; ``max_area`` is the most.

    The readers of the package also take ``max_samples``, see :func:`~dual_loop.data.shares.choose_capped`.

    Raises:
        ConfigError: the root is not a folder that can be listed.
    """

    name = ""
    """Of the data set, in logs, results and settings."""

    title = ""
    layout = ""
    region_choice = "random"
    """``data.region_choice``: which regions of an image are drawn together."""
    class_captions = "off"
    """``data.class_captions``: what the class name of a region without caption is taken for."""
    exif = "ignore"
    """``data.exif``: whether a photograph whose masks fit either way is turned as its EXIF orientation says."""
    vanishes: Callable[[np.ndarray], bool] | None = None
    """Whether nothing of a mask (H, W) is left in what the model learns from; training sets it."""
    has_class_names = False
    """Whether the classes of regions are known by name, for ``class_captions``."""
    contents = ""
    """What is there, in words, where the index knows it: images, regions, captions."""
    protocol = ""
    """What an evaluation set of the field fixes, printed with the result."""
    judge = ""
    """The program that reads the captions of an evaluation set, where there is one: the authors' own, with an LLM."""
    left_out: Mapping[str, int] = {}
    """What the files hold or name that is no entry, in words, and how many of each; 0 is not shown."""
    _names: Sequence[StringTable] = ()
    _rows = np.empty(0, np.int64)
    _has_warned = False

    def __init__(
        self,
        root: str | Path,
        index_dir: str | Path | None = None,
        regions_per_image: int = 1,
        min_area: float = 0.0,
        max_area: float = 1.0,
    ) -> None:
        self.root = check_root(root, self.title, self.layout)
        self.index_dir, self.regions_per_image = index_dir, regions_per_image
        self.min_area, self.max_area = min_area, max_area

    def _set_entries(self, rows: np.ndarray, max_samples: int | None, setting: str, *names: StringTable) -> None:
        """Keep ``rows`` of the index as entries, or ``max_samples`` of them; ``names`` hold an entry's name, by row."""
        self._rows, self._names = rows[choose_capped(len(rows), max_samples, setting)], names

    def __len__(self) -> int:
        return len(self._rows)

    def named_rows(self) -> tuple[Sequence[StringTable], np.ndarray]:
        """Return tables whose rows contain the entries' names (none: ask for each), and the row of each, (n,) int64."""
        return self._names, self._rows

    def read_classes(self) -> None:
        """Read what ``class_captions`` needs beside the index; ConfigError where it is not there."""

    def entry_id(self, index: int) -> str:
        """Return the name of entry ``index`` (the file stem or image id), for logs and exact resume checks."""
        raise NotImplementedError

    def image_path(self, index: int) -> Path | None:
        """Return the file of the captioned image of entry ``index``; None where no file holds the image alone.

        Raises:
            SampleError: the file is missing, or its name leaves the root.
        """
        return None

    def load(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Read entry ``index``; choose regions with ``rng`` only, so that the result depends on nothing else.

        Raises:
            SampleError: the entry cannot be used; the module of each reader lists the reasons.
        """
        return self.load_reduced(index, rng, None)

    def load_reduced(self, index: int, rng: np.random.Generator, needed: NeededSize | None) -> RegionSample:
        """Read what :meth:`load` reads, with an image that may be smaller but not below ``needed`` of its size."""
        if type(self).load is Reader.load:
            raise NotImplementedError
        return self.load(index, rng)

    def _draw(
        self,
        rng: np.random.Generator,
        count: int,
        decode: Callable[[int], np.ndarray],
        where: str,
        *,
        region_id: Callable[[int], str] = str,
        limits: str = "",
        picture: Callable[[], Picture | None] = lambda: None,
        classes: Sequence[object] = (),
    ) -> Drawn:
        """Draw regions of an image, one or more, until ``regions_per_image`` pass the limits on the area.

        Only drawn regions are decoded. Under ``region_choice = hard`` the first is drawn as ever, then four times as
        many as are wanted, those of its class before all others, and the ones that look most like it are kept
        (:func:`most_alike`).

        Args:
            count: regions of the image.
            decode: see :func:`take_regions`; an empty mask, and one that vanishes in training, is passed over too.
            where, limits: for the message: the image, and what a region had to pass before.
            picture: returns the image, once a mask is decoded. classes: of the regions, where they are known.

        Raises:
            SampleError: ``no_region_left``; the reason of the first region where none can be decoded.
        """
        order, most = rng.permutation(count).tolist(), self.regions_per_image
        is_hard = self.region_choice == "hard" and most > 1 and count > 0
        if is_hard:
            first, most = order[0], most * CANDIDATES
            classes = classes or [None] * count
            order.sort(key=lambda number: classes[number] != classes[first])

        def passing(number: int) -> np.ndarray | None:
            mask, place = decode(number), f"{where}: {region_id(number)}"
            check_mask(mask, place)
            if not self.min_area <= np.count_nonzero(mask) / mask.size <= self.max_area:
                return None
            if self.vanishes is not None and self.vanishes(mask):
                raise target_vanished(mask, place)
            return mask

        drawn = take_regions(order, passing, region_id, most)
        if not drawn.numbers:
            broken = [region for region in drawn.passed_over if region.reason != "empty_mask"]
            expected = f"one of {limits}{self.min_area:g} to {self.max_area:g} of the image, 1 pixel or more"
            seen = f"{count} masks, {len(broken)} of them unusable, {count - len(broken)} outside the limits"
            seen += f" (the first: {broken[0].message})" if broken else ""
            reason = broken[0].reason if broken and len(broken) == count else "no_region_left"
            raise bad_sample(reason, "no region of an image is left", where, seen, expected)
        image = picture()
        if not is_hard or image is None:
            return drawn
        kept = most_alike(drawn.masks, image.pixels, [classes[number] for number in drawn.numbers])
        kept = kept[: self.regions_per_image]
        return Drawn([drawn.numbers[k] for k in kept], [drawn.masks[k] for k in kept], drawn.passed_over)

    def _turned_to_fit(self, picture: Picture, path: Path, fits: Callable[[tuple[int, int]], bool]) -> Picture:
        """Return the picture as ``data.exif`` says, or in the other orientation where a mask fits only that.

        ``fits``: whether the mask fits an image of (H, W). Where it fits either way, the first time warns.
        """
        if picture.orientation == 1:
            return picture
        if not fits(picture.size):
            other = read_picture(path, apply_exif=self.exif != "apply")
            return other if fits(other.size) else picture
        if (picture.orientation < 5 or fits(picture.size[::-1])) and not self._has_warned:
            self._has_warned = True
            what = "a photograph has an EXIF orientation, and its masks fit either way"
            fix = "look at `dual-loop data preview`, and set data.exif to apply where masks lie beside their objects"
            warnings.warn(explain(what, str(path), f"data.exif = {self.exif}", fix=fix), stacklevel=2)
        return picture

    def _sample(
        self,
        index: int,
        picture: Picture,
        drawn: Drawn,
        ids: Sequence[str],
        captions: Sequence[tuple[str, ...]] | None = None,
        class_names: Sequence[str | None] = (),
    ) -> RegionSample:
        """Return the drawn regions of one image as a sample; without ``captions`` it has no text.

        ``class_names`` of the regions, where they are known, serve as ``class_captions`` says, below any caption.
        """
        texts = [()] * len(ids) if captions is None else list(captions)
        if self.class_captions == "reference" and class_names:
            texts = [own or ((name,) if name else ()) for own, name in zip(texts, class_names, strict=True)]
        for text in (text for own in texts for text in own):
            check_text(text, f"{self.name}: {self.entry_id(index)}")
        return RegionSample(
            source=self.name,
            sample_id=self.entry_id(index),
            image=picture.pixels,
            masks=np.stack(drawn.masks),
            region_ids=tuple(map(printable, ids)),
            captions=tuple(texts),
            image_reduction=picture.reduction,
            passed_over=tuple(drawn.passed_over),
            fallbacks=tuple(class_names) if self.class_captions == "fallback" else (),
        )


def take_regions(
    order: Iterable[int],
    decode: Callable[[int], np.ndarray | None],
    region_id: Callable[[int], str],
    most: int | None = None,
) -> Drawn:
    """Decode the regions of an image in ``order`` until ``most`` can be used; None takes all of them.

    ``decode`` returns the mask (H, W) bool of a region, None where it is not wanted; a ``SampleError`` passes it over.
    """
    taken = Drawn([], [], [])
    for number in order:
        try:
            mask = decode(number)
        except SampleError as error:
            taken.passed_over.append(SkippedRegion(region_id(number), error.reason, str(error)))
            continue
        if mask is not None:
            taken.numbers.append(number)
            taken.masks.append(mask)
            if len(taken.numbers) == most:
                break
    return taken


def most_alike(masks: Sequence[np.ndarray], image: np.ndarray, classes: Sequence[object]) -> list[int]:
    """Return the places of n masks (H, W) bool, the first one, and then the easier to be taken for it the earlier.

    Parts of it, and what it is a part of, come last (more than half of the smaller mask lies in the other). Of the rest
    those of its class come first, and then the mean colour in ``image`` (H, W, 3) uint8 decides.
    """
    first, colours = masks[0], [image[mask].mean(0) for mask in masks]

    def strangeness(place: int) -> tuple[bool, bool, float]:
        overlap = np.count_nonzero(masks[place] & first)
        is_part = place > 0 and bool(2 * overlap > min(np.count_nonzero(masks[place]), np.count_nonzero(first)))
        distance = float(np.square(colours[place] - colours[0]).sum())
        return is_part, classes[place] != classes[0], distance

    return sorted(range(len(masks)), key=strangeness)


def read_annotations(file: Path | io.BytesIO, where: str) -> object:
    """Return what a JSON file of annotations holds; ``missing_file`` and ``broken_json`` name it by ``where``."""
    fix = "download this file again"
    try:
        return parse_json(read_file(file, SAMPLE_BYTES) if isinstance(file, Path) else file.getvalue())
    except FileNotFoundError as error:
        raise bad_sample("missing_file", "an annotation file is missing", where, fix=fix) from error
    except (OSError, ValueError) as error:
        raise bad_sample("broken_json", "an annotation file is damaged", where, error, "complete JSON", fix) from error

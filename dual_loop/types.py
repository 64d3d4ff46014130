"""The typed borders between the packages, and the letters used in every shape.

Letters: ``B`` images, ``N`` regions in the batch (ragged over images), ``K`` captions per region, ``R = N*K``,
``G`` side of the prompt grid (16 for Sa2VA), ``M = G*G`` image tokens of one tile, ``T`` image tiles, ``V`` views
(an image that the vision tower sees; a frame pair has two), ``L`` sequence length, ``A`` answer length,
``D`` language width, ``C`` SAM 2 prompt width, ``S`` SAM 2 input side, ``Q = S/4`` side of the mask logits,
``H, W`` original size. ``G``, ``M``, ``S``, ``Q`` follow from the model's configuration.

Only these types cross from one package to another: ``RegionSample`` -> ``Batch`` -> ``Seen``, ``RegionCaption`` ->
``PackedBatch`` -> ``StepOutput``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch

NeededSize = Callable[[int, int], tuple[int, int]]
"""From the stored (H, W) of an image to the least (H, W) that a model needs of it."""

SOURCES = ("sav", "sa1b", "openimages", "refcoco")


@dataclass(frozen=True)
class SkippedRegion:
    """A region of a good image that cannot be used, with the reason that is counted and the message that is logged."""

    region_id: str
    reason: str
    message: str


@dataclass(frozen=True)
class RegionSample:
    """One image with N regions, from any data set.

    Attributes:
        source: name of the data set, one of :data:`SOURCES` or the name of a user's own source.
        sample_id: names the image inside its source, in logs and results (for example ``"sa_223750"``).
        image: (H, W, 3) uint8 RGB, the image that is captioned (and segmented, unless ``target_image`` is given).
        masks: (N, H, W) bool, N >= 1, every mask non-empty, on ``image``.
        region_ids: N names, unique inside the sample.
        captions: N tuples of reference expressions; an empty tuple where a region has no text.
        target_image: (H2, W2, 3) uint8 RGB, the other frame of a pair; None where the same image is used twice.
        target_masks: (N, H2, W2) bool, the same N objects on ``target_image``; None exactly when it is None.
        later_targets: of a clip the frames behind ``target_image``, each with its masks as there.
        image_reduction: above 1 only where ``Reader.load_reduced`` was asked: masks keep the stored size (H, W), and
            ``image`` is (ceil(H / image_reduction), ceil(W / image_reduction), 3).
        passed_over: regions that were drawn and cannot be used.
        no_target: expressions of which the data set says that the image shows nothing.
        undrawn_captions: expressions of further regions of the image.
        fallbacks: N texts that step 2 reads where a written caption fails, None where there is none; or empty.
        groups: N names of a part of the data set that is also measured alone, or "" each; or empty.
        ignored: (H, W) bool, pixels that no measure counts and no mask has; None where all count.
    """

    source: str
    sample_id: str
    image: np.ndarray
    masks: np.ndarray
    region_ids: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    target_image: np.ndarray | None = None
    target_masks: np.ndarray | None = None
    image_reduction: int = 1
    later_targets: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    passed_over: tuple[SkippedRegion, ...] = ()
    no_target: tuple[str, ...] = ()
    undrawn_captions: tuple[str, ...] = ()
    fallbacks: tuple[str | None, ...] = ()
    groups: tuple[str, ...] = ()
    ignored: np.ndarray | None = None

    @property
    def num_regions(self) -> int:
        return int(self.masks.shape[0])

    def without(self, passed_over: Mapping[int, SkippedRegion]) -> RegionSample:
        """Return the sample without the regions (0..N-1, not all) that are passed over."""
        kept = [place for place in range(self.num_regions) if place not in passed_over]
        return replace(
            self,
            masks=self.masks[kept],
            region_ids=tuple(self.region_ids[place] for place in kept),
            captions=tuple(self.captions[place] for place in kept),
            target_masks=None if self.target_masks is None else self.target_masks[kept],
            later_targets=tuple((image, masks[kept]) for image, masks in self.later_targets),
            passed_over=(*self.passed_over, *passed_over.values()),
            fallbacks=tuple(self.fallbacks[place] for place in kept) if self.fallbacks else (),
            groups=tuple(self.groups[place] for place in kept) if self.groups else (),
        )

    @property
    def segmentation_image(self) -> np.ndarray:
        """(H, W, 3) uint8: the image that step 2 segments."""
        return self.image if self.target_image is None else self.target_image

    @property
    def segmentation_masks(self) -> np.ndarray:
        """(N, H, W) bool: the masks that step 3 compares with."""
        return self.masks if self.target_masks is None else self.target_masks


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was skipped, with the reason that is counted and the message that is logged.

    With ``region_id`` it is one region of a good image that was passed over.
    """

    source: str
    sample_id: str
    reason: str
    message: str
    region_id: str | None = None


@dataclass
class LaterFrame:
    """A further frame of a clip, whose objects are segmented from the [SEG] of those on its first target frame.

    Attributes:
        image: 0..B-1, the image whose n regions it shows. view: its tiles, as ``Batch.target_view``.
        g_pixel_values: (3, S, S) uint8. target_masks: (n, Q, Q), and full_masks: one of (n, H, W) or none, as those of
            a batch.
    """

    image: int
    view: int
    g_pixel_values: torch.Tensor
    target_masks: torch.Tensor
    full_masks: list[torch.Tensor]

    def with_pixels(self, function: Callable[[torch.Tensor], torch.Tensor]) -> LaterFrame:
        """Return the frame with ``function`` of its tensors."""
        full = [function(own) for own in self.full_masks]
        return LaterFrame(self.image, self.view, function(self.g_pixel_values), function(self.target_masks), full)


@dataclass
class Batch:
    """Tensors of B images with N regions in all. Pixels and target masks go to the device, all else stays on the host.

    Attributes:
        pixel_values: (T, 3, I, I) float32, ImageNet-normalised tiles of all views, view by view.
        tiles_per_view: V integers that sum to T. The last tile of a view shows the whole image (thumbnail).
        caption_view: B view indices: the view in which image b is captioned.
        target_view: B view indices: the view in which image b is segmented (the same view for a single image).
        g_pixel_values: (B, 3, S, S) uint8, 0..255, the segmentation image resized straight to S x S.
        prompt_masks: (N, G, G) bool, the caption-side masks on the token grid, at least one cell each.
        grid_rescued: (N,) bool, True where pooling alone would have left no cell.
        target_masks: (N, Q, Q) in 0..1, the segmentation-side masks (``data.prepare.resize_targets``): float32, the
            covered part of each cell, or uint8 0/1.
        full_masks: B tensors (n, H, W) bool, the same masks at their stored size or S, the smaller; none where nobody
            reads them (``loss.points_from``).
        region_image: (N,) int64, index of the image (0..B-1) of each region, ascending.
        region_seeds: (N,) int64, seed of everything random about a region (points of the mask loss, sampling);
            independent of how the global batch is split over ranks and micro-batches.
        captions: N chosen reference expressions, None where a region has no text.
        region_names: N strings ``source/sample_id#region_id`` for logs.
        sources: B source names.
        skipped: the samples that were skipped while this batch was collected. passed_over: regions of its images.
        later_frames: of the images that are clips, in the order of the images.
        references: N tuples of all reference expressions, the chosen one among them; by default that alone.
        no_target, undrawn_captions: of each of the B images, as those of a sample.
        fallbacks: N texts in place of ``loop.fallback_caption``, None where there is none.
    """

    pixel_values: torch.Tensor
    tiles_per_view: list[int]
    caption_view: list[int]
    target_view: list[int]
    g_pixel_values: torch.Tensor
    prompt_masks: torch.Tensor
    grid_rescued: torch.Tensor
    target_masks: torch.Tensor
    region_image: torch.Tensor
    region_seeds: torch.Tensor
    captions: list[str | None]
    region_names: list[str]
    sources: list[str]
    full_masks: list[torch.Tensor] = field(default_factory=list)
    skipped: list[SkippedSample] = field(default_factory=list)
    passed_over: list[SkippedSample] = field(default_factory=list)
    later_frames: list[LaterFrame] = field(default_factory=list)
    references: list[tuple[str, ...]] = field(default_factory=list)
    fallbacks: list[str | None] = field(default_factory=list)

    no_target: list[tuple[str, ...]] = field(default_factory=list)
    undrawn_captions: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.no_target = self.no_target or [()] * len(self.sources)
        self.undrawn_captions = self.undrawn_captions or [()] * len(self.sources)
        self.references = self.references or [() if text is None else (text,) for text in self.captions]
        self.fallbacks = self.fallbacks or [None] * len(self.captions)

    @property
    def num_images(self) -> int:
        return len(self.sources)

    @property
    def num_regions(self) -> int:
        return len(self.region_names)

    @property
    def binary_targets(self) -> torch.Tensor:
        """The target masks cut at half, (N, Q, Q) bool: what predicted masks are compared with."""
        return self.target_masks >= 0.5

    @property
    def tile_offsets(self) -> list[int]:
        """The index of each view's first tile among the T tiles."""
        return list(accumulate(self.tiles_per_view, initial=0))[:-1]

    @property
    def views_read(self) -> list[list[int]]:
        """The views that step 2 reads of each of the B images: its own, and those of the later frames of a clip."""
        views = [[view] for view in self.target_view]
        for frame in self.later_frames:
            views[frame.image].append(frame.view)
        return views

    def images(self, start: int, stop: int) -> Batch:
        """Return images ``start`` to ``stop`` (exclusive, at most B) with their views and regions.

        What was skipped stays with the first image; the batch itself comes back where all images are asked for.
        """
        stop = min(stop, self.num_images)
        if (start, stop) == (0, self.num_images):
            return self
        views = sorted({*self.caption_view[start:stop], *chain.from_iterable(self.views_read[start:stop])})
        offsets, counts = self.tile_offsets, self.tiles_per_view
        tiles = [offsets[view] + number for view in views for number in range(counts[view])]
        owners = self.region_image.tolist()
        regions = [region for region, owner in enumerate(owners) if start <= owner < stop]
        return Batch(
            pixel_values=self.pixel_values[tiles],
            tiles_per_view=[counts[view] for view in views],
            caption_view=[views.index(view) for view in self.caption_view[start:stop]],
            target_view=[views.index(view) for view in self.target_view[start:stop]],
            g_pixel_values=self.g_pixel_values[start:stop],
            prompt_masks=self.prompt_masks[regions],
            grid_rescued=self.grid_rescued[regions],
            target_masks=self.target_masks[regions],
            region_image=self.region_image[regions] - start,
            region_seeds=self.region_seeds[regions],
            captions=[self.captions[region] for region in regions],
            references=[self.references[region] for region in regions],
            fallbacks=[self.fallbacks[region] for region in regions],
            region_names=[self.region_names[region] for region in regions],
            sources=self.sources[start:stop],
            no_target=self.no_target[start:stop],
            undrawn_captions=self.undrawn_captions[start:stop],
            full_masks=self.full_masks[start:stop],
            skipped=self.skipped if start == 0 else [],
            passed_over=self.passed_over if start == 0 else [],
            later_frames=[
                replace(frame, image=frame.image - start, view=views.index(frame.view))
                for frame in self.later_frames
                if start <= frame.image < stop
            ],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with pixels and target masks on ``device``; what says how rows are built stays here."""
        return self._with_pixels(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with what :meth:`to` moves in pinned memory (called by the data loader)."""
        return self._with_pixels(lambda tensor: tensor.pin_memory())

    def _with_pixels(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        pixels, grounding, masks = map(function, (self.pixel_values, self.g_pixel_values, self.target_masks))
        full = [function(own) for own in self.full_masks]
        later = [frame.with_pixels(function) for frame in self.later_frames]
        moved = replace(self, pixel_values=pixels, g_pixel_values=grounding, target_masks=masks)
        return replace(moved, full_masks=full, later_frames=later)


@dataclass(frozen=True)
class WrittenCaption:
    """One caption that step 1 generated.

    Attributes:
        text: the cleaned caption.
        token_ids: the generated ids, up to and with what ended the turn.
        gate: why it may earn no reward (``loop.gates``), None where it may.
        truncated: whether it met ``loop.max_new_tokens`` before it ended.
        unreadable: why step 2 cannot read it (``empty``, ``special_token``), None where it can.
    """

    text: str
    token_ids: tuple[int, ...]
    gate: str | None
    truncated: bool
    unreadable: str | None = None


@dataclass
class RegionCaption:
    """The caption of one region.

    Attributes:
        text: what step 2 reads: the data set's own caption, what step 1 wrote, or a fallback.
        is_reference: whether it is the data set's own.
        token_ids: generated ids of ``text``, up to and with the end of the turn; empty for a reference.
        rejected: why the generated caption was refused, None where it was not.
        is_kept: False where the region is left out of step 2 (``on_rejected = drop``).
        greedy: the caption of greedy decoding, None where none was asked for.
        samples: K sampled captions; empty where none were asked for.
    """

    text: str
    is_reference: bool = False
    token_ids: tuple[int, ...] = ()
    rejected: str | None = None
    is_kept: bool = True
    greedy: WrittenCaption | None = None
    samples: tuple[WrittenCaption, ...] = ()

    @property
    def written(self) -> tuple[WrittenCaption, ...]:
        """Every generated caption of the region, greedy before sampled."""
        return self.samples if self.greedy is None else (self.greedy, *self.samples)


@dataclass
class Seen:
    """What the frozen image encoders make of a batch; no graph.

    Attributes:
        vision: (T, M, D_vision) of all tiles, pixel-shuffled, before the projector.
        levels: SAM 2's three feature maps of the B images, fine to coarse, before ``conv_s0`` and ``conv_s1``; None
            where its encoder trains, so that steps 2 and 3 run it themselves.
    """

    vision: torch.Tensor
    levels: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class Turn:
    """Ids of a question and its answer, as they follow an image prefix; labels are -100 where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass
class RegionTurn:
    """A turn about one region, and where it stands once it is packed.

    Attributes:
        region: 0..N-1.
        turn: its ids.
        is_caption: asks about the image that is captioned, with the region's prompt; else about the one that is
            segmented.
        continues: belongs to the conversation of the turn before it in its row, which it then sees.
        is_extra: its [SEG] is none of the regions'; whoever adds the turn reads it.
        prompt: (G, G) bool on the host, a region prompt in place of the region's own.
        row, start: set by ``loop.packing.pack_turns``: its row, and the column of its first id.
    """

    region: int
    turn: Turn
    is_caption: bool = False
    continues: bool = False
    is_extra: bool = False
    prompt: torch.Tensor | None = None
    row: int = -1
    start: int = -1

    def places(self, token: int) -> list[tuple[int, int]]:
        """Return row and column of each ``token`` of its ids."""
        return [(self.row, self.start + k) for k, own in enumerate(self.turn.input_ids) if own == token]


@dataclass
class PackedBatch:
    """The rows of steps 2 and 3: an image prefix a row, and side by side the turns that ask about the image.

    The first B rows hold the images that are segmented, in the batch's order; captioning turns of a frame pair have
    rows of their own behind them.

    Attributes:
        batch: the images, regions and masks.
        captions: N, one a region.
        input_ids: (R, L) int64, padded on the right, on the host. position_ids: the same shape.
        attention_mask: (R, 1, L, L) bool, true where the second position may be seen from the first.
        row_lengths: R columns without padding.
        read_from: the first column whose hidden state is read.
        row_tiles: for each row the indices of its tiles among the T of the batch.
        region_tile: (P,) int64, the tile (counted over the rows) of each region prompt, ascending, on the host.
        prompt_masks: (P, G, G) bool, the region prompts in the order in which they stand in the rows, on the host.
        seg_positions: (2, n) int64, rows and columns of the regions' [SEG] tokens, turn by turn; those of clips come
            again behind all others for each later frame.
        answer_positions: (2, A) int64, rows and columns that predict a token with loss. answer_ids: (A,) that token.
        region_weights: (N,) float32, weight of each region in the mask losses.
        vision: (tiles of the rows, M, D_vision), None where the tower trains and has to run with a graph.
        levels: as in :class:`Seen`.
        counts: items of each loss term, known before the forward pass.
        metrics: sums and counts for the records; those of the forward pass are tensors, for which nothing waits.
        lessons: what each signal keeps for its terms, by its name.
        seg_images: (n,) int64, the image on which each [SEG] is segmented, where that is not always the one of its row.
    """

    batch: Batch
    captions: list[RegionCaption]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    row_lengths: list[int]
    read_from: int
    row_tiles: list[list[int]]
    region_tile: torch.Tensor
    prompt_masks: torch.Tensor
    seg_positions: torch.Tensor
    answer_positions: torch.Tensor
    answer_ids: torch.Tensor
    region_weights: torch.Tensor
    vision: torch.Tensor | None = None
    levels: list[torch.Tensor] | None = None
    counts: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float | torch.Tensor] = field(default_factory=dict)
    lessons: dict[str, object] = field(default_factory=dict)
    seg_images: torch.Tensor | None = None


@dataclass
class Segmentation:
    """What the mask decoder returns for N prompts.

    Attributes:
        mask_logits: (N, Q, Q) float, the chosen candidate.
        predicted_iou: (N, 3) or (N, 1) float in 0..1, one for each candidate.
        chosen: (N,) int64 index of the chosen candidate.
        object_score_logits: (N, 1) float.
        seg_embeds: (N, C) the projected [SEG] embeddings that prompted the masks, where there were any.
    """

    mask_logits: torch.Tensor
    predicted_iou: torch.Tensor
    chosen: torch.Tensor
    object_score_logits: torch.Tensor
    seg_embeds: torch.Tensor | None = None


class RunState(TypedDict, total=False):
    """Of a rank's task: counts of generated and rejected captions, and what the probe remembers (once ``auditor``)."""

    captioner: list[int]
    probe: list[str]
    auditor: dict[str, list[str]]


class RankComm:
    """What the loop needs of the other ranks, as one alone has it; all make the same calls with the same keys."""

    def reduce(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Add ``sums`` over all ranks."""
        return dict(sums)

    def gather(self, own: Sequence[str]) -> list[str]:
        """Return the texts of all ranks, rank by rank."""
        return list(own)


@dataclass
class LossTerm:
    """A loss as a weighted sum and what it is to be divided by, so that averages are taken once, globally.

    Attributes:
        total: scalar tensor with graph, already multiplied by the term's weight.
        count: number of items (objects, tokens) that ``total`` sums over; a tensor where their weights are one, so that
            nothing waits for the device.
    """

    total: torch.Tensor
    count: float | torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The average over this batch alone (for logs; training divides by the global count)."""
        return self.total / max(self.count, 1.0)


@dataclass
class StepOutput:
    """Of one micro-batch: ``mask_loss``, ``dice_loss``, ``llm_loss`` and what signals add; and one mask a region."""

    terms: Mapping[str, LossTerm]
    masks: Segmentation

"""What every option that teaches something is made of, so that the task loops over signals and branches on none.

One optimiser step calls, in this order: :meth:`Signal.asks` (captions to be scored), :meth:`Signal.listen` (with the
listener's weights), :meth:`Signal.plan` (turns and weights of the rows), :meth:`Signal.lessons` (what the terms need,
once rows are packed), and in each micro-batch's forward pass :meth:`Signal.edit` and :meth:`Signal.terms`.

Those that learn from generated ids read them again (``loop.spoken``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dual_loop.loop.packing import RowPlan
from dual_loop.loop.scorer import RegionText
from dual_loop.loop.spoken import predicting_positions as predicting_positions
from dual_loop.loop.spoken import spoken_turns as spoken_turns
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import Batch, LossTerm, PackedBatch, RegionCaption, Seen, Segmentation


@dataclass
class MicroBatch:
    """One micro-batch of an accumulation window, as step 1 leaves it.

    Attributes:
        batch, seen, captions: images, their features, and one caption a region.
        plan: what goes into its rows.
        scores: the IoU (N,) of a text's mask with every region, by region and text.
        rows: what steps 2 and 3 read; set once they are packed.
    """

    batch: Batch
    seen: Seen
    captions: list[RegionCaption]
    plan: RowPlan
    scores: dict[RegionText, Tensor] = field(default_factory=dict)
    rows: PackedBatch = field(init=False)

    @property
    def generated(self) -> list[int]:
        """The regions whose caption step 1 wrote."""
        return [region for region, caption in enumerate(self.captions) if not caption.is_reference]


class Signal:
    """A source of further lessons; as it stands here it teaches nothing.

    Attributes:
        name: key of what it keeps in ``PackedBatch.lessons``.
        num_samples: K, captions that step 1 samples for each region.
        needs_greedy: whether it compares with a greedy caption.
        reads_samples: whether step 2 may read the first sample in place of a greedy caption.
    """

    name = ""
    num_samples = 0
    needs_greedy = False
    reads_samples = False

    def asks(self, micro: MicroBatch) -> Iterable[RegionText]:
        """Return the texts of a micro-batch whose masks it wants to be compared with the regions."""
        return ()

    def listen(self, window: Sequence[MicroBatch]) -> None:
        """Look at the captions while the weights of ``reward.listener`` are in the model."""

    def plan(self, window: Sequence[MicroBatch]) -> None:
        """Change the plans of all micro-batches before rows are packed; every rank calls this once a step."""

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        """Keep in ``rows.lessons`` what :meth:`terms` needs, and count its items in ``rows.counts``.

        ``progress``: share of the run that is done, 0..1, for schedules.
        """

    def edit(self, model: Sa2VA, embeds: Tensor, packed: PackedBatch) -> Tensor:
        """Change what enters the language model, (R, L, D)."""
        return embeds

    def terms(self, model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch) -> dict[str, LossTerm]:
        """Return loss terms by name."""
        return {}

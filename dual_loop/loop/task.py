"""The loop on one screen: mask -> caption -> mask' -> losses::

    packed = task.prepare(window)          step 1, no graph, once an optimiser step
    output = task(packed[i])               steps 2 and 3, once a micro-batch; what DDP wraps

Options are signals (``loop.signals``): each may add turns, lessons and terms, and this file branches on none of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dual_loop.config import Config, LossConfig
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.cheating_probe import CheatingProbe
from dual_loop.loop.feature_cache import FeatureCache
from dual_loop.loop.gates import CaptionGates
from dual_loop.loop.judge import Judge
from dual_loop.loop.packing import RowPlan, pack_step
from dual_loop.loop.scorer import Scorer
from dual_loop.loop.signals import build_signals
from dual_loop.loop.signals.base import MicroBatch
from dual_loop.losses import dice_loss, mask_cross_entropy, sum_objects
from dual_loop.model.adapters import trainable_parameters
from dual_loop.model.ema import ExponentialMovingAverage
from dual_loop.model.prompts import Prompter, prompt_texts
from dual_loop.model.sa2va import Sa2VA
from dual_loop.model.stored_weights import StartingWeights, StoredWeights, weights
from dual_loop.points import mask_sample, point_sample, sample_points
from dual_loop.types import Batch, LossTerm, PackedBatch, RankComm, RunState, Seen, Segmentation, StepOutput

REMEMBERED_CAPTIONS = 512


class DualLoopTask(nn.Module):
    """Owns the model, the losses and the signals.

    Args:
        model: its weights at this moment are the starting weights, which the cheating probe listens with.
        prompter: token ids of prompts.
        config: the settings ``loop``, ``policy``, ``reward``, ``loss`` and ``speed`` are read.
        average: the weight average: the teacher, and the listener ``average``; None where neither is asked for.
        comm: sums and texts of all ranks; None for one process.
        judge: asked by the caption reward, if there is one.
        num_images: of an epoch, for the feature cache's announcement.
        listeners: by the paths that ``train.audit_listener`` and ``reward.listener`` name, the trainable parameters of
            models that were trained apart.
    """

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: Config,
        average: ExponentialMovingAverage | None = None,
        comm: RankComm | None = None,
        judge: Judge | None = None,
        num_images: int = 0,
        listeners: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.prompter, self.config, self.average = model, prompter, config, average
        comm = comm or RankComm()
        gates, temperature = CaptionGates(config.reward.gates, prompt_texts()), config.policy.temperature
        self.captioner = Captioner(model, prompter, config.loop, gates, temperature)
        self.scorer = Scorer(model, prompter, config.loop)
        self.signals = build_signals(model, prompter, config, average, comm, judge)
        on_disk = config.speed.start_on_disk and config.reward.listener != "frozen"  # else read at every step
        trained = trainable_parameters(model)
        self.starting = StartingWeights(trained, on_disk)
        self.listeners = {path: StoredWeights(trained, values) for path, values in (listeners or {}).items()}
        self.independent = self.listeners[config.train.audit_listener] if config.train.audit_listener else None
        self.probe = CheatingProbe(model, prompter, config.loop, self.starting, comm, self.independent)
        self.recent: deque[str] = deque(maxlen=REMEMBERED_CAPTIONS)  # for the words that the probe counts
        folder, limit = config.speed.feature_cache, config.speed.feature_cache_gib
        self.cache = None if folder is None else FeatureCache(model, folder, limit, num_images)

    # ---- step 1: image + mask -> caption -----------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch], progress: float = 0.0, audit: bool = False) -> list[PackedBatch]:
        """Caption all micro-batches of an optimiser step, and pack the rows that step 2 reads.

        Args:
            batches: the accumulation window of this rank; the parameters do not change inside it.
            progress: share of the run that is done, 0..1, for schedules.
            audit: also measure the cheating probe.
        """
        seen = [self.see(batch) for batch in batches]
        samples = max((signal.num_samples for signal in self.signals), default=0)
        replaced = any(signal.reads_samples for signal in self.signals)
        greedy = not replaced or any(signal.needs_greedy for signal in self.signals)
        captions = self.captioner.write(seen, batches, greedy=greedy, num_samples=samples)
        self.recent.extend(one.text for own in captions for one in own if not one.is_reference)
        parts = zip(batches, seen, captions, strict=True)
        window = [MicroBatch(*part, RowPlan.for_captions(part[2])) for part in parts]
        asked = [dict.fromkeys(text for signal in self.signals for text in signal.asks(micro)) for micro in window]
        if self.signals:  # not where a text is asked: ranks that share layers gather other weights together
            with self.scoring_weights():
                for micro, texts in zip(window, asked, strict=True):
                    table = self.scorer.score(micro.batch, micro.seen, list(texts), self.config.reward.iou == "soft")
                    micro.scores = dict(zip(texts, table, strict=True))
                for signal in self.signals:
                    signal.listen(window)
        for signal in self.signals:
            signal.plan(window)
        for micro in window:
            micro.rows = self.pack(micro)
        for signal in self.signals:
            signal.lessons(window, progress)
        packed = [micro.rows for micro in window]
        if audit:
            packed[0].metrics.update(self.probe.measure(seen, packed, list(self.recent)))
        return packed

    def see(self, batch: Batch) -> Seen:
        """Run both frozen image encoders, once an image; or read what they computed before."""
        return self.model.see(batch) if self.cache is None else self.cache.see(batch)

    def pack(self, micro: MicroBatch) -> PackedBatch:
        """Put the turns about each image into one row."""
        place, loop = (micro.batch, micro.seen, micro.captions, micro.plan), self.config.loop
        return pack_step(self.model, *place, self.prompter, loop, self.config.loss.num_objects)

    def scoring_weights(self) -> AbstractContextManager[None]:
        """Lend the model the weights that score captions (``reward.listener``)."""
        name = self.config.reward.listener
        if name == "own":
            return nullcontext()
        listener = {"average": self.average, "frozen": self.starting, **self.listeners}[name]
        assert listener is not None, "the weight average is to listen, and there is none"
        return weights(listener)

    # ---- steps 2 and 3: image + caption -> mask' -> losses -----------------------------------------------------------

    def forward(self, packed: PackedBatch) -> StepOutput:
        """Segment every caption and compare mask' with mask; every term is a sum and a count."""
        embeds = self.model.embed(packed)
        for signal in self.signals:
            embeds = signal.edit(self.model, embeds, packed)
        hidden = self.model.read(embeds, packed)
        masks = self.model.segment(hidden, packed)
        terms = plain_terms(self.model, hidden, masks, packed, self.config.loss)
        for signal in self.signals:
            terms.update(signal.terms(self.model, hidden, masks, packed))
        return StepOutput(terms, masks)

    def run_state(self) -> RunState:
        """Return what a resumed run needs of this rank's task, as JSON values."""
        counts = [self.captioner.num_generated, self.captioner.num_rejected]
        return {"captioner": counts, "probe": list(self.recent)}

    def load_run_state(self, state: RunState) -> None:
        """Continue from :meth:`run_state`."""
        self.captioner.num_generated, self.captioner.num_rejected = state["captioner"]
        recent = state["probe"] if "probe" in state else state["auditor"]["recent"]
        self.recent = deque(recent, REMEMBERED_CAPTIONS)


def plain_terms(
    model: Sa2VA, hidden: Tensor, masks: Segmentation, packed: PackedBatch, loss: LossConfig
) -> dict[str, LossTerm]:
    """Return the losses of the plain loop: cross-entropy and dice of mask' against mask, and language.

    Masks are compared at sampled points or (``num_points`` 0) at all pixels. Logits of the vocabulary are computed
    where a token of an answer carries loss, and nowhere else.
    """
    logits, targets, factors = masks.mask_logits, packed.batch.target_masks, packed.region_weights
    if loss.num_points > 0:
        ratios = (loss.oversample_ratio, loss.importance_sample_ratio)
        points = sample_points(logits, packed.batch.region_seeds, loss.num_points, *ratios)
        logits = point_sample(logits, points)
        full = packed.batch.full_masks
        targets = mask_sample(full, points) if full else point_sample(targets, points)
    rows, columns = packed.answer_positions
    language = model.token_loss(hidden[rows, columns], packed.answer_ids) * loss.language_weight
    return {
        "mask_loss": sum_objects(mask_cross_entropy(logits, targets), loss.mask_weight, factors),
        "dice_loss": sum_objects(dice_loss(logits, targets), loss.dice_weight, factors),
        "llm_loss": LossTerm(language, packed.counts["llm_loss"]),
    }

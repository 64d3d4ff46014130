"""The cheating probe: is the captioner still speaking a language that others understand?

A captioner and a segmenter that train together can agree on a private code: captions that only this segmenter reads.
Every figure here would show it. Those that cannot be fooled are the frozen listener, which segments the same captions
with the weights that training started from, and the independent one, with weights that were trained apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dual_loop.caption_metrics import distinct_ngrams
from dual_loop.config import LoopConfig
from dual_loop.loop.captioner import Captioner, measuring_settings
from dual_loop.loop.packing import pack_turns
from dual_loop.loop.scorer import RegionText, Scorer
from dual_loop.loop.spoken import predicting_positions, spoken_turns
from dual_loop.losses import divergence, map_chunks
from dual_loop.metrics import iou_table, own_and_margin, ratio
from dual_loop.model.adapters import adapters_disabled
from dual_loop.model.hardware import send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.model.stored_weights import StartingWeights, StoredWeights, weights
from dual_loop.types import PackedBatch, RankComm, RegionCaption, Seen, Segmentation

LEAST_PREFERENCE = 0.02
"""Mean difference in IoU from which a listener prefers one captioner's words to another's."""
TOKENS_AT_ONCE = 64
"""Tokens whose logits are held at once: 64 x 151,674 x 4 bytes are 39 MB, twice."""
_RATIOS = ("kl", "seg_probability", "seg_emitted")


class CheatingProbe:
    """Measures the panel on the micro-batches of one optimiser step; runs without graph, in eval mode."""

    def __init__(
        self,
        model: Sa2VA,
        prompter: Prompter,
        config: LoopConfig,
        starting: StartingWeights,
        comm: RankComm,
        independent: StoredWeights | None = None,
    ) -> None:
        self.model, self.prompter, self.config = model, prompter, config
        self.starting, self.comm = starting, comm
        self.listeners = {"frozen": starting} | ({"independent": independent} if independent else {})
        self.captioner = Captioner(model, prompter, measuring_settings(config), is_silent=True)
        self.scorer = Scorer(model, prompter, config)

    @torch.no_grad()
    def measure(self, seen: Sequence[Seen], packed: Sequence[PackedBatch], recent: Sequence[str]) -> dict[str, float]:
        """Return sums and counts of the panel over this rank's micro-batches; every rank must call this together.

        Keys: ``own_cycle_iou``, ``frozen_cycle_iou``, ``independent_cycle_iou`` (the same captions, heard by the live
        weights, those of the start, and those of ``train.audit_listener`` where there are any; eval mode);
        ``kl`` (divergence of the captioner from itself without the adapter, in nats a token, exact over the
        vocabulary, along the captions that were written); ``seg_probability`` (of [SEG] at its place, when it is not
        forced), ``seg_emitted`` (share of answers that greedy decoding would write up to [SEG]); ``vocabulary``,
        ``distinct_1``, ``distinct_2`` over ``recent`` captions of all ranks; ``own_preference``, ``frozen_preference``,
        ``independent_preference`` (IoU of today's captions minus that of the captions that the starting weights write
        of the same regions, by each listener); ``sampled_preference`` (the same of captions that the starting weights
        sample instead, by the starting listener: what a change of words costs without training);
        ``flag/private_code``: the live listener prefers today's captions and the starting one those of the start, both
        beyond chance, and the latter by more than it prefers these to its samples.
        """
        names = [*_RATIOS, *(f"{who}_cycle_iou" for who in ("own", *self.listeners))]
        sums = dict.fromkeys((f"{name}/{part}" for name in names for part in ("sum", "count")), 0.0)
        with evaluating(self.model):
            for rows in packed:
                hidden = self.model.read(self.model.embed(rows), rows)
                self._add_cycle(rows, self.model.segment(hidden, rows), sums, "own")
                self._add_seg(rows, hidden, sums)
            with weights(self.starting):
                first = self.captioner.write(seen, [rows.batch for rows in packed], num_samples=1)
            heard = {"own": self._hear(seen, packed, first)}
            for who, listener in self.listeners.items():
                with weights(listener):
                    for rows in packed:
                        self._add_cycle(rows, self.model.predict(rows), sums, who)
                    heard[who] = self._hear(seen, packed, first)
            for rows, features in zip(packed, seen, strict=True):
                self._add_divergence(rows, features, sums)
        texts = self.comm.gather(recent)
        spread = {f"distinct_{n}": distinct_ngrams(texts, n) for n in (1, 2)}
        spread["vocabulary"] = float(len({word for text in texts for word in text.lower().split()}))
        # The same on every rank: sums over ranks divide out again.
        for name, value in spread.items():
            sums |= {f"{name}/sum": value, f"{name}/count": 1.0}
        found = {f"{who}_preference": ious[:, 0] - ious[:, 1] for who, ious in heard.items()}
        found["sampled_preference"] = heard["frozen"][:, 2] - heard["frozen"][:, 1]
        preferences = {key: value for name, own in found.items() for key, value in ratio(name, own.tolist()).items()}
        found["beyond_sampled"] = found["frozen_preference"] - found["sampled_preference"]
        squares = {f"{name}/squares": float(own.square().sum()) for name, own in found.items()}
        beyond = ratio("beyond_sampled", found["beyond_sampled"].tolist())
        total = self.comm.reduce({**preferences, **beyond, **squares, "ranks": 1.0})
        is_private = (
            _beyond_chance(total, "own_preference", 1.0, LEAST_PREFERENCE)
            and _beyond_chance(total, "frozen_preference", -1.0, LEAST_PREFERENCE)
            and _beyond_chance(total, "beyond_sampled", -1.0)
        )
        # A counter: the ranks' parts add up to 1.
        return {**sums, **preferences, "flag/private_code": 1.0 / total["ranks"] if is_private else 0.0}

    def _add_cycle(self, rows: PackedBatch, masks: Segmentation, sums: dict[str, float], who: str) -> None:
        ious = iou_table(masks.mask_logits > 0, rows.batch.binary_targets).diagonal().tolist()
        for caption, iou in zip(rows.captions, ious, strict=False):  # later frames of clips stand behind the regions
            if not caption.is_reference:
                # A rejected caption is an empty mask, whatever step 2 reads in its place.
                sums[f"{who}_cycle_iou/sum"] += 0.0 if caption.rejected else iou
                sums[f"{who}_cycle_iou/count"] += 1.0

    def _add_seg(self, rows: PackedBatch, hidden: Tensor, sums: dict[str, float]) -> None:
        """Add for each [SEG] its probability at its place, and whether greedy decoding would get there."""
        row, column = rows.seg_positions
        probability = self.model.answer_logits(hidden[row, column - 1]).float().softmax(-1)[:, self.prompter.seg_id]
        turn = self.prompter.segment_turn("x", self.config.segment_question, self.config.segment_answer)
        lead = [token for token in turn.labels if token != -100].index(self.prompter.seg_id)
        emitted, ids = torch.ones_like(probability, dtype=torch.bool), send(rows.input_ids, probability.device)
        for back in range(lead + 1):
            predicted = self.model.answer_logits(hidden[row, column - 1 - back]).argmax(-1)
            emitted &= predicted == ids[row, column - back]
        for name, values in (("seg_probability", probability), ("seg_emitted", emitted)):
            sums[f"{name}/sum"] += float(values.sum())
            sums[f"{name}/count"] += float(len(values))

    def _add_divergence(self, rows: PackedBatch, seen: Seen, sums: dict[str, float]) -> None:
        """Add the exact divergence from the adapter-free captioner along the generated captions."""
        spoken = [(region, one.token_ids) for region, one in enumerate(rows.captions) if one.token_ids]
        if not spoken:
            return
        turns = spoken_turns(rows.batch, spoken, self.prompter, self.config.caption_question)
        packed = pack_turns(rows.batch, rows.captions, turns, self.prompter, vision=seen.vision, segments=False)
        row, column = send(predicting_positions(turns, spoken), self.model.device)
        live = self.model.read(self.model.embed(packed), packed)[row, column]
        with adapters_disabled(self.model):
            reference = self.model.read(self.model.embed(packed), packed)[row, column]

        def total(*hidden: Tensor) -> Tensor:
            return divergence(*(self.model.answer_logits(one).float().log_softmax(-1) for one in hidden)).sum()

        sums["kl/sum"] += float(torch.stack(map_chunks(total, live, reference, chunk=TOKENS_AT_ONCE)).sum())
        sums["kl/count"] += float(len(row))

    def _hear(
        self, seen: Sequence[Seen], packed: Sequence[PackedBatch], first: Sequence[Sequence[RegionCaption]]
    ) -> Tensor:
        """Return the IoU (P, 3) of every generated caption, of the start's caption of its region, and of its sample.

        Where two of them are the same text their difference is 0: comparisons are paired by region.
        """
        found = [torch.zeros(0, 3)]
        for features, rows, before in zip(seen, packed, first, strict=True):
            asked: list[RegionText] = []
            for region, caption in enumerate(rows.captions):
                if not caption.is_reference:
                    drawn = before[region].samples[0]
                    texts = (caption.text, before[region].text, drawn.text if drawn.unreadable is None else None)
                    asked += ((region, text) for text in texts)
            table = self.scorer.score(rows.batch, features, asked)
            ious, _ = own_and_margin(table, torch.tensor([region for region, _ in asked], dtype=torch.long))
            found.append(ious.view(-1, 3))
        return torch.cat(found)


def _beyond_chance(total: Mapping[str, float], name: str, sign: float, least: float = 0.0) -> bool:
    """Tell whether a mean preference has ``sign``, at least this size, and twice its standard error."""
    count = total[f"{name}/count"]
    if count < 2:
        return False
    mean = sign * total[f"{name}/sum"] / count
    variance = max(total[f"{name}/squares"] / count - mean * mean, 0.0) / (count - 1)
    return mean >= least and mean > 2 * variance**0.5

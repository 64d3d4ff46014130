"""Straight-through Gumbel captions: discrete in the forward pass, with a gradient to the logits that chose them.

Step 2 reads embeddings whose values are those of the sampled tokens and whose gradient goes to the captioner, so the
mask loss itself teaches step 1.

Sources: Gumbel-softmax and Concrete (1611.01144, 1611.00712), straight-through captions for a listener (1706.01554,
PSST 1907.11565), noise conditioned on what was sampled (REBAR 1703.07370, RELAX 1711.00123). Differs from those: the
tokens were sampled before, in a batched roll-out without graph, so the noise is drawn from its posterior given the
token instead of being remembered; and gradient reaches only the most likely tokens besides the sampled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import cast

import torch
from torch import Tensor

from dual_loop.config import Config
from dual_loop.errors import explain
from dual_loop.loop.captioner import sample_seed
from dual_loop.loop.packing import pack_turns
from dual_loop.loop.signals.base import MicroBatch, Signal, predicting_positions, spoken_turns
from dual_loop.losses import map_chunks
from dual_loop.model.hardware import send
from dual_loop.model.prompts import SEGMENT_ANSWERS, SEGMENT_QUESTIONS, Prompter, choose, clean_caption, read_expression
from dual_loop.model.sa2va import Sa2VA
from dual_loop.types import PackedBatch, RegionTurn, Turn, WrittenCaption

NOISE_DRAW = 1_000_003
"""Number of the draw whose seed gives a straight-through caption its Gumbel noise; no sample has it."""
SPACE_LETTER = "\u0120"
"""How byte-level vocabularies write a space at the start of a token."""
LOWER_CASE = str.maketrans(ascii_uppercase, ascii_lowercase)
"""Letters of byte-level vocabularies alone: other characters stand for bytes."""
_TINY = 1e-12


@dataclass
class StraightThroughCaption:
    """A caption that step 2 reads through straight-through embeddings.

    Attributes:
        region: its region.
        token_ids: generated ids, up to and with the end of the turn.
        first, last: the part of ``token_ids`` that is the caption, ``[first, last)``.
        reading_ids: the ids that step 2 reads in place of that part.
        turn, offset: the turn of step 2 that holds them, and where in it; set when the turn is built.
    """

    region: int
    token_ids: tuple[int, ...]
    first: int
    last: int
    reading_ids: tuple[int, ...]
    turn: RegionTurn | None = None
    offset: int = 0


@dataclass
class CaptioningRows:
    """The captioning turns of straight-through captions in rows of their own, and the P tokens that step 2 reads.

    Attributes:
        positions: (2, P) int64, rows and columns of the hidden states that predict the tokens.
        targets: (P,) int64, the tokens. is_first: (P,) bool, those that are read with a space before them.
        into: (2, P) int64, rows and columns of step 2 that read them.
        uniform: (P, top_k + 1) random numbers of each region's own seed.
        temperature: of the softmax.
    """

    packed: PackedBatch
    positions: Tensor
    targets: Tensor
    into: Tensor
    is_first: Tensor
    uniform: Tensor
    temperature: float


class GumbelCaptions(Signal):
    """Lets step 2 read the first sample of each region through straight-through embeddings."""

    name = "gumbel"
    num_samples = 1
    reads_samples = True

    def __init__(self, prompter: Prompter, config: Config) -> None:
        self.prompter, self.loop, self.policy = prompter, config.loop, config.policy
        self.captions: list[list[StraightThroughCaption]] = []
        self.spaced = with_space(prompter)

    def plan(self, window: Sequence[MicroBatch]) -> None:
        names, self.captions = (self.loop.segment_question, self.loop.segment_answer), []
        for micro in window:
            found, missed, seen = [], 0, set[int]()
            images, seeds = micro.batch.region_image.tolist(), micro.batch.region_seeds.tolist()
            for region, (image, caption) in enumerate(zip(images, micro.captions, strict=True)):
                continues = self.loop.segment_form == "turns" and image in seen
                seen.add(image)
                if caption.is_reference or caption.rejected or not caption.is_kept:
                    continue
                own = straight_through(self.prompter, self.spaced, region, caption.samples[0])
                if own is None:
                    missed += 1
                    continue
                ids = (own.reading_ids, *names, seeds[region], not continues)
                turn, own.offset = straight_through_turn(self.prompter, *ids)
                own.turn = micro.plan.segmentation[region] = RegionTurn(region, turn, continues=continues)
                found.append(own)
            micro.plan.metrics["gumbel/not_aligned"] = float(missed)
            self.captions.append(found)

    def lessons(self, window: Sequence[MicroBatch], progress: float) -> None:
        temperature = temperature_at(progress, self.policy.gumbel_temperature, self.policy.gumbel_temperature_end)
        for micro, own in zip(window, self.captions, strict=True):
            if not own:
                continue
            rows, batch, device = micro.rows, micro.batch, micro.batch.pixel_values.device
            spoken, seeds = [(one.region, one.token_ids) for one in own], batch.region_seeds.tolist()
            turns = spoken_turns(batch, spoken, self.prompter, self.loop.caption_question)
            vision = None if rows.vision is None else micro.seen.vision
            packed = pack_turns(batch, rows.captions, turns, self.prompter, vision=vision, segments=False)
            predicted = predicting_positions(turns, spoken).split([len(ids) for _, ids in spoken], dim=1)
            positions, into, is_first, uniform = [], [], [], []
            targets: list[int] = []
            for one, places in zip(own, predicted, strict=True):
                assert one.turn is not None
                start, count = one.turn.start + one.offset, one.last - one.first
                positions.append(places[:, one.first : one.last])
                columns = torch.arange(start, start + count)
                into.append(torch.stack([torch.full_like(columns, one.turn.row), columns]))
                is_first.append(columns == start)
                targets += one.token_ids[one.first : one.last]
                generator = torch.Generator().manual_seed(sample_seed(seeds[one.region], NOISE_DRAW))
                uniform.append(torch.rand(count, self.policy.gumbel_top_k + 1, generator=generator))
            rows.lessons[self.name] = CaptioningRows(
                packed,
                *(send(torch.cat(positions, dim=1), device), send(torch.tensor(targets, dtype=torch.long), device)),
                *(send(torch.cat(into, dim=1), device), send(torch.cat(is_first), device)),
                send(torch.cat(uniform), device),
                temperature,
            )

    def edit(self, model: Sa2VA, embeds: Tensor, packed: PackedBatch) -> Tensor:
        if self.name not in packed.lessons:
            return embeds
        captioning = cast(CaptioningRows, packed.lessons[self.name])
        rows, columns = captioning.into
        return embeds.index_put((rows, columns), self.soft_captions(model, captioning).to(embeds.dtype))

    def soft_captions(self, model: Sa2VA, captioning: CaptioningRows) -> Tensor:
        """Run captioning rows with graph and return straight-through embeddings of their P tokens: (P, D).

        The values are those of the tokens' own embeddings; the gradient goes to the logits that chose the tokens.
        """
        hidden = model.read(model.embed(captioning.packed), captioning.packed)
        rows, columns = captioning.positions

        def choose(part: Tensor, targets: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
            settings = (captioning.temperature, self.policy.gumbel_top_k)
            return straight_through_weights(model.answer_logits(part), targets, uniform, *settings)

        chosen = map_chunks(choose, hidden[rows, columns], captioning.targets, captioning.uniform)
        ids, weights = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        table = self.spaced.to(ids.device)
        known = table[captioning.is_first.long()[:, None], ids.clamp_max(table.shape[1] - 1)]
        read = torch.where(ids < table.shape[1], known, ids)
        return soft_embeddings(model.mllm.get_input_embeddings().weight.detach(), read, weights)


def with_space(prompter: Prompter) -> Tensor:
    """Return the id that step 2 reads in place of every token: (2, V) int64, inside a caption and at its start.

    Inside it is that of the same text in lower case (:func:`~dual_loop.model.prompts.read_expression`), at the start
    with a space before it as well; where the vocabulary has none, the token itself.
    """
    vocabulary = prompter.tokenizer.get_vocab()
    inside = list(range(max(vocabulary.values()) + 1))
    first = inside.copy()
    for text, token in vocabulary.items():
        lower = text.translate(LOWER_CASE)
        inside[token] = vocabulary.get(lower, token)
        first[token] = vocabulary.get(SPACE_LETTER + lower, inside[token])
    return torch.tensor([inside, first])


def straight_through_turn(
    prompter: Prompter, caption_ids: Sequence[int], question: str, answer: str, seed: int, is_first: bool = True
) -> tuple[Turn, int]:
    """Return a segmentation turn around ready caption ids, and where they start in it.

    The text before the caption ends without its space: the first caption id brings it (:func:`with_space`).
    """
    before, after = prompter.segment_parts
    start, end = choose(SEGMENT_QUESTIONS, question, seed).split("{caption}")
    opening = "\n" if is_first else prompter.template.segment_separator + before
    head = prompter.encode(opening + start.removesuffix(" "))
    ids = [*head, *caption_ids, *prompter.encode(end + after)]
    return prompter.answered(ids, choose(SEGMENT_ANSWERS, answer, seed + 1)), len(head)


def straight_through(
    prompter: Prompter, spaced: Tensor, region: int, caption: WrittenCaption
) -> StraightThroughCaption | None:
    """Find the part of generated ids that is the caption; None where step 2 cannot read it token by token.

    That is so where it holds a special token, and where cleaning changed more than its ends. ``spaced``: of
    :func:`with_space`.
    """
    ids = caption.token_ids
    if caption.unreadable is not None:
        return None

    def text_of(start: int, end: int) -> str:
        return prompter.decode_caption(list(ids[start:end]))[0]

    last = next((n for n in range(1, len(ids) + 1) if clean_caption(text_of(0, n)) == caption.text), None)
    if last is None:
        return None
    first = 0
    while clean_caption(text_of(first + 1, last)) == caption.text:
        first += 1
    read = [int(spaced[int(place == first), ids[place]]) for place in range(first, last)]
    if prompter.decode_caption(read)[0].strip() != read_expression(caption.text):
        return None
    return StraightThroughCaption(region, ids, first, last, tuple(read))


def conditioned_perturbation(logits: Tensor, chosen: Tensor, uniform: Tensor) -> Tensor:
    """Return logits plus Gumbel noise, the noise drawn from its posterior given which entry is the largest.

    With normalised logits the largest of all perturbed logits is Gumbel(0) distributed whichever entry it is, and the
    others are Gumbel variables truncated at it. The noise is a constant: gradient flows as through ``logits + noise``.

    Args:
        logits: (P, V') float.
        chosen: (P,) int64, the entry whose perturbed logit must be the largest.
        uniform: (P, V') float in 0..1, random.

    Returns:
        (P, V') float32.
    """
    log_probs = logits.float().log_softmax(-1)
    exponential = -torch.log(uniform.float().clamp(_TINY, 1.0 - 1e-7))
    largest = exponential.gather(1, chosen[:, None])
    with torch.no_grad():
        # -log(E_j / p_j + E_i) for the others, -log(E_i) for the chosen one.
        others = -torch.logaddexp(exponential.log() - log_probs, largest.log())
        perturbed = others.scatter(1, chosen[:, None], -largest.log())
    # The value itself: added up again from log-probability and noise, another entry could come out larger by rounding.
    return perturbed + (log_probs - log_probs.detach())


def straight_through_weights(
    logits: Tensor, token_ids: Tensor, uniform: Tensor, temperature: float, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens that gradient reaches at each position and their straight-through weights.

    Args:
        logits: (P, V) float, with graph. token_ids: (P,) int64, the sampled tokens.
        uniform: (P, top_k + 1) float in 0..1, random.
        temperature: of the softmax over perturbed logits, above 0.
        top_k: how many of the most likely other tokens take part.

    Returns:
        (P, k + 1) int64, the sampled token first; k is ``top_k``, or V - 1 where that is less. And (P, k + 1) float32:
        1 for the sampled token and 0 for the others, exactly; the gradient is that of the softmax.

    Raises:
        ValueError: the temperature or the number of random numbers is wrong.
    """
    num_others = min(top_k, logits.shape[1] - 1)
    if temperature <= 0 or uniform.shape[1] < num_others + 1:
        seen = f"temperature {temperature}, uniform {tuple(uniform.shape)}"
        raise ValueError(explain("straight-through weights", seen=seen, expected=f"> 0 and (P, {num_others + 1})"))
    with torch.no_grad():
        without = logits.detach().float().scatter(1, token_ids[:, None], float("-inf"))
        ids = torch.cat([token_ids[:, None], without.topk(num_others, dim=1).indices], dim=1)
    first = torch.zeros_like(token_ids)
    perturbed = conditioned_perturbation(logits.gather(1, ids), first, uniform[:, : num_others + 1])
    soft = (perturbed / temperature).softmax(-1)
    hard = torch.zeros_like(soft)
    hard[:, 0] = 1.0
    return ids, hard + (soft - soft.detach())


def soft_embeddings(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return weighted sums of embedding rows: table (V, D), ids and weights (P, k) -> (P, D) in the table's dtype.

    The table gets no gradient.
    """
    rows = table.detach()[ids]
    return torch.as_tensor((weights[..., None] * rows.float()).sum(1).to(table.dtype))


def temperature_at(progress: float, start: float, end: float) -> float:
    """Return the temperature after a share ``progress`` (0..1) of the run: geometric from ``start`` to ``end``."""
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))

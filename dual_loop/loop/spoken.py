"""Generated captions that are read again: as turns of a row, where their ids are predicted, and how likely they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dual_loop.loop.packing import pack_turns, silent
from dual_loop.losses import map_chunks
from dual_loop.model.hardware import send
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va import Sa2VA, evaluating
from dual_loop.types import Batch, RegionTurn, Seen

IOU_NATS = 0.05
"""What a caption whose mask an independent listener does not find at all loses of its mean log-likelihood."""


def spoken_turns(
    batch: Batch, spoken: Sequence[tuple[int, Sequence[int]]], prompter: Prompter, question: str
) -> list[RegionTurn]:
    """Return captioning turns whose answers are generated ids, given as (region, ids), verbatim; nothing carries loss.

    The last id is left out: every id is predicted at the place before its own, and a special token, which can only be
    the last (``Prompter.answer_length``), would be taken for an image token or a request for a mask.
    """
    cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
    turns = []
    for region, ids in spoken:
        asked = prompter.caption_question(cells[region], question, seeds[region])
        turns.append(RegionTurn(region, silent((*asked, *ids[:-1])), is_caption=True))
    return turns


def predicting_positions(turns: Sequence[RegionTurn], spoken: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return rows and columns of the hidden states that predict the generated ids of packed turns: (2, P) int64.

    A turn leaves its last id out, and the state before an id predicts it.
    """
    index = [
        (turn.row, turn.start + len(turn.turn.input_ids) - len(ids) + number)
        for turn, (_, ids) in zip(turns, spoken, strict=True)
        for number in range(len(ids))
    ]
    return torch.tensor(index, dtype=torch.long).reshape(-1, 2).T


def trust(own: Tensor, heard: Tensor, iou: Tensor | None = None) -> Tensor:
    """Return how far R captions can be trusted, (R,) in 0..1: the probability of a token, to captioner and listener.

    That is the geometric mean over tokens and over both. Where a listener that was trained apart segments a caption as
    well, the IoU that it finds (R,) decides among captions of like probability. Area under the curve for right captions
    0.84, with the captioner alone 0.74, for cycle IoU 0.62 (``scripts/experiments/caption_filter.py``).

    Args:
        own, heard: (R,) mean log-likelihoods (:func:`log_likelihoods`).
    """
    mean = (own + heard) / 2
    return (mean if iou is None else mean - IOU_NATS * (1 - iou)).exp()


@torch.no_grad()
def log_likelihoods(
    model: Sa2VA,
    prompter: Prompter,
    batch: Batch,
    seen: Seen,
    spoken: Sequence[tuple[int, Sequence[int]]],
    question: str,
) -> Tensor:
    """Return the mean log-probability of a token of R captions, (R,) float32 on the host, in nats, at temperature 1.

    It tells right captions from wrong ones better than cycle IoU does: that asks whether a segmenter finds the region
    by the caption, which an untrue one may serve as well; this asks whether a captioner would say it of the region. One
    that was trained apart has the better say (docs/experiments.md).

    Args:
        batch, seen: images with their regions, and what the image encoders made of them.
        spoken: (region, generated ids, at least one) of each caption.
        question: ``loop.caption_question``.
    """
    if not spoken:
        return torch.zeros(0)
    with evaluating(model):
        turns = spoken_turns(batch, spoken, prompter, question)
        packed = pack_turns(batch, [], turns, prompter, vision=seen.vision, segments=False)
        row, column = send(predicting_positions(turns, spoken), model.device)
        hidden = model.read(model.embed(packed), packed)[row, column]

    def of(part: Tensor, targets: Tensor) -> Tensor:
        return model.answer_logits(part).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    ids = send(torch.tensor([token for _, own in spoken for token in own]), model.device)
    values = torch.cat(map_chunks(of, hidden, ids)).cpu().split([len(own) for _, own in spoken])
    return torch.stack([own.mean() for own in values])

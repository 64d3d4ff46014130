"""The forward passes: language model, grounding, captions, and the mask of predict time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dual_loop.data.prepare import resize_targets
from dual_loop.evaluation.measure import resize_logits
from dual_loop.model.object_count import object_order
from dual_loop.model.sa2va import evaluating
from dual_loop.model.sa2va_api import VideoLLaVASAMModel
from dual_loop.types import Segmentation

from .case import Case
from .data_checks import decoded
from .report import Report

FEATURES, MASKS = 1e-4, 2e-4
HALF, HALF_PIXELS = 0.03, 0.02
"""In bfloat16 autocast: of a whole tensor, and the share of a mask's pixels that may change sides."""


@torch.no_grad()
def check_language(case: Case, model: VideoLLaVASAMModel, report: Report) -> None:
    """Compare vision features, embeddings, hidden states, logits and [SEG] embeddings."""
    report.section("vision and language")
    data = case.loss_batch()
    embeds = model.input_embeddings(data)
    hidden = model.hidden_states(data)
    real = data["attention_mask"].bool()
    at_seg = hidden[data["input_ids"] == model.seg_id]
    _close(case, report, "vit_embeds", model.project_vision(model.encode_vision(case.tiles)))
    _close(case, report, "inputs_embeds", embeds)
    # Positions of padding depend on the attention kernel and are never read.
    _close(case, report, "last_hidden_state", hidden, where=real)
    _close(case, report, "logits", model.answer_logits(hidden), where=real)
    _close(case, report, "seg_hidden", at_seg)
    _close(case, report, "seg_embeds", model.text_hidden_fcs(at_seg))


def encode_once(model: VideoLLaVASAMModel) -> None:
    """Let SAM 2's frozen image encoder see the same pixels once in training and once in evaluation.

    It takes most of the time of every loss. All calls are in the case's autocast.
    """
    encode, known = model.encode_grounding, list[tuple[bool, Tensor, list[Tensor]]]()

    def remembered(pixels: Tensor) -> list[Tensor]:
        for mode, seen, levels in known:
            if mode == model.training and torch.equal(seen, pixels):
                return [*levels]
        known.append((model.training, pixels.clone(), encode(pixels)))
        return [*known[-1][2]]

    model.encode_grounding = remembered  # type: ignore[method-assign]


@torch.no_grad()
def segment(case: Case, model: VideoLLaVASAMModel) -> Segmentation:
    """Segment every [SEG] of the loss batch once, as at predict time."""
    with evaluating(model):
        segmentation = model(case.loss_batch(), mode="predict")["segmentation"]
    if not isinstance(segmentation, Segmentation):
        raise TypeError(type(segmentation))
    return segmentation


@torch.no_grad()
def check_grounding(
    case: Case, model: VideoLLaVASAMModel, report: Report, segmentation: Segmentation, order: Tensor
) -> None:
    """Compare feature levels, prompts, candidates, chosen masks and targets of the repeated objects."""
    report.section("grounding")
    raw = model.encode_grounding(case.inputs["g_pixel_values"])
    finished = model.grounding.finish(raw)
    # The third level is recorded before the no-memory embedding is added to it.
    for level, seen in enumerate((finished[0], finished[1], raw[2])):
        _close(case, report, f"fpn_{level}", seen)
    embeds = torch.as_tensor(segmentation.seg_embeds)[order]
    _close(case, report, "language_embd", embeds[:, None])
    sparse = case.expected("sparse_prompt_embeddings")
    if sparse is not None:
        seen = model.grounding.sparse_prompts(embeds)[: len(sparse), 0]
        report.close("sparse_prompt_embeddings", seen, sparse, absolute=FEATURES, half=HALF)
    ious, chosen = segmentation.predicted_iou[order], segmentation.chosen[order]
    _close(case, report, "multimask_ious", ious)
    _same(case, report, "multimask_best", chosen)
    _close(case, report, "object_score_logits", segmentation.object_score_logits[order])
    _close(case, report, "pred_masks_low_res", _by_image(case, segmentation.mask_logits[order]), tolerance=MASKS)
    _same(case, report, "gt_masks_low_res", _by_image(case, targets(case)[order]))
    if "iou_argmax_margin_min" in case.results:
        best = ious.topk(2, dim=1).values
        margin = float((best[:, 0] - best[:, 1]).min())
        report.number(
            "iou_argmax_margin_min", margin, case.results["iou_argmax_margin_min"], absolute=FEATURES, half=2 * HALF
        )


def targets(case: Case) -> Tensor:
    """(N, Q, Q) uint8: the target masks of all samples, by the package's own resize."""
    masks = case.numbered("masks").values()
    return torch.cat([resize_targets(mask.bool().numpy(), case.geometry.mask_size, "nearest") for mask in masks])


def check_object_order(case: Case, model: VideoLLaVASAMModel, report: Report) -> Tensor:
    """Return which objects stand for each sample, (B * K,) indices.

    By the package's rule; only where a sample has more than K, the original drew them by its own random numbers, and
    its draw is read off ``language_embd``.
    """
    limit = case.config.loss.num_objects or 0
    owners = (case.inputs["input_ids"] == model.seg_id).nonzero()[:, 0]
    order = object_order(owners, case.num_samples, limit, torch.arange(len(owners)))
    embeds, prompts = case.outputs.get("seg_embeds"), case.outputs.get("language_embd")
    if embeds is None or prompts is None:
        return order
    distance = (prompts.flatten(0, -2)[:, None] - embeds[None]).abs().amax(dim=-1)
    drawn = distance.masked_fill(owners[order][:, None] != owners[None], torch.inf).argmin(dim=1)
    more = torch.bincount(owners, minlength=case.num_samples) > limit
    expected = torch.where(more[owners[order]], drawn, order)
    report.same(f"objects of each sample, brought to {limit}", expected, drawn)
    for sample in more.nonzero().flatten().tolist():
        picked = expected[owners[expected] == sample].tolist()
        report.same(f"objects drawn for sample {sample} are different ones", len(set(picked)), limit)
    return expected


@torch.no_grad()
def check_caption(case: Case, model: VideoLLaVASAMModel, report: Report) -> None:
    """Compare the first step and the whole greedy continuation of the left-padded caption prompts."""
    if not any(name.startswith("caption_") for name in case.outputs):
        return
    report.section("captions")
    data = case.caption_batch()
    mask = data["attention_mask"].long()
    with evaluating(model):
        embeds = model.input_embeddings(data)
        last = model.run_language(embeds, mask, (mask.cumsum(1) - 1).clamp_min(0))[:, -1]
        _close(case, report, "caption_first_step_last_hidden", last)
        _close(case, report, "caption_first_step_logits", model.answer_logits(last))
        ids = case.expected("caption_generated_ids")
        if ids is not None:
            check_generation(case, model, report, embeds, mask, ids)


def check_generation(
    case: Case, model: VideoLLaVASAMModel, report: Report, embeds: Tensor, mask: Tensor, ids: Tensor
) -> None:
    """Continue the prompts as ``inputs.json`` says and compare logits, ids and texts."""
    settings = dict(case.notes.get("caption_generation", {}))
    if settings.get("do_sample"):
        report.failed("caption_generated_ids", "the reference was sampled; only greedy texts can be compared")
        return
    recorder = RecordLogits()
    model.sync_new_tokens()
    seen = model.mllm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=int(settings.get("max_new_tokens", ids.shape[1])),
        do_sample=False,
        pad_token_id=case.tokenizer.pad_token_id,
        eos_token_id=settings.get("eos_token_id"),
        logits_processor=LogitsProcessorList([recorder]),
    )
    logits = torch.stack(recorder.steps, dim=1)
    if case.is_half:
        check_rounded_generation(case, report, seen, logits)
        return
    _close(case, report, "caption_step_logits", logits)
    report.same("caption_generated_ids", seen, ids)
    if "caption_generated_text" in case.results:
        report.same("caption_generated_text", decoded(case, seen), case.results["caption_generated_text"])
    if "greedy_margin_min" in case.results:
        best = logits.topk(2, dim=-1).values
        margin = float((best[..., 0] - best[..., 1]).min())
        report.number("greedy_margin_min", margin, case.results["greedy_margin_min"], absolute=2 * FEATURES)


def check_rounded_generation(case: Case, report: Report, ids: Tensor, logits: Tensor) -> None:
    """Compare texts up to the first token that differs, for which both tokens must have been about as likely."""
    expected, steps = case.outputs["caption_generated_ids"], case.expected("caption_step_logits")
    if steps is None:
        report.failed("caption_generated_ids", "a text in bfloat16 can be judged by caption_step_logits alone")
        return
    for row, (own, other) in enumerate(zip(ids, expected, strict=True)):
        differs = (own != other).nonzero().flatten().tolist()
        end = differs[0] + 1 if differs else len(own)
        half = logits[row, :end], steps[row, :end]
        report.close(f"caption_step_logits.{row}, {end} of {len(own)}", *half, absolute=FEATURES, half=HALF)
        gap = steps[row, end - 1, other[end - 1]] - steps[row, end - 1, own[end - 1]]
        size = float(steps[row, end - 1].double().square().mean().sqrt())
        report.number(f"caption_generated_ids.{row}, gap where they part", gap, 0.0, absolute=4 * HALF * size)


class RecordLogits(LogitsProcessor):
    """Keeps the logits of every step and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores.clone())
        return scores


@torch.no_grad()
def check_predict(case: Case, model: VideoLLaVASAMModel, report: Report, segmentation: Segmentation) -> None:
    """Compare the masks of predict time: one [SEG] embedding, one mask at the size of its image."""
    wanted = case.notes.get("predict")
    if not wanted or case.outputs.get("predict_mask_low_res") is None:
        return
    report.section("predict time")
    owners = (case.inputs["input_ids"] == model.seg_id).nonzero()[:, 0]
    entries = wanted if isinstance(wanted, list) else [wanted]
    samples = [int(entry["sample"]) for entry in entries]
    indices = [int((owners == entry["sample"]).nonzero()[int(entry["object"])]) for entry in entries]
    low = segmentation.mask_logits[indices]
    width, height = case.notes["image_sizes_wh"][samples[0]]
    full = resize_logits(low, (height, width), case.geometry.grounding_size)
    _close(case, report, "predict_embd", torch.as_tensor(segmentation.seg_embeds)[indices])
    _close(case, report, "predict_mask_low_res", low[:, None], tolerance=MASKS)
    _close(case, report, "predict_mask_logits_orig_size", full, tolerance=MASKS)
    _same(case, report, "predict_mask", full.sigmoid() > 0.5, HALF_PIXELS)


def _by_image(case: Case, objects: Tensor) -> Tensor:
    """(B * K, Q, Q) -> (B, K, Q, Q)."""
    return objects.reshape(case.num_samples, -1, *objects.shape[1:])


def _close(
    case: Case, report: Report, name: str, seen: Tensor, tolerance: float = FEATURES, where: Tensor | None = None
) -> None:
    expected = case.expected(name)
    if expected is None:
        return
    if where is not None and seen.shape == expected.shape:
        seen, expected = seen[where], expected[where]
    report.close(name, seen, expected, absolute=tolerance, half=HALF)


def _same(case: Case, report: Report, name: str, seen: Any, half: float = 0.0) -> None:
    expected = case.expected(name)
    if expected is not None:
        report.same(name, seen, expected, half)

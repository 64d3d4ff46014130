"""The same work without this package's ways: a step of the libraries' layers, captions of transformers' generate."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from dual_loop.data.prepare import batch_from_samples
from dual_loop.loop.captioner import Captioner
from dual_loop.model.build import geometry
from dual_loop.model.sa2va import evaluating

from acceptance.found import Asked, Found
from acceptance.step import real_setting, variant
from bench.floors import best
from bench.setup import generated_samples

TOKENS, REGIONS, IMAGES = 40, 4, 8


def run(asked: Asked, found: Found) -> None:
    # The tiny model in float32: there both write the same captions.
    changes = {"model.dtype": "float32"} if asked.is_tiny else {}
    setting, took = real_setting(asked, TOKENS, 1, **changes), {}
    for name in ("default", "plain"):
        with variant(setting, name) as one:
            one.step()
            took[name] = min(one.step()["seconds"] for _ in range(2)), one.end()["peak_mb"]
    for what, (seconds, peak) in took.items():
        found.row("step", flow=what, seconds=seconds, peak_GiB=peak / 1024, times_default=seconds / took["default"][0])
    with variant(setting) as one:
        compare_with_generate(asked, found, one)


def compare_with_generate(asked: Asked, found: Found, one: Any) -> None:
    """Write the same captions, one row a region, by the captioner and by transformers' ``generate``."""
    task, config, device = one.trainer.task, one.config, one.device
    batch = batch_from_samples(generated_samples(2 if asked.is_tiny else IMAGES, REGIONS), geometry(config)).to(device)
    prompter, model = task.prompter, task.model
    cells, seeds = batch.prompt_masks.flatten(1).sum(1).tolist(), batch.region_seeds.tolist()
    asked_for = config.loop.caption_question
    questions = [prompter.caption_question(size, asked_for, seed) for size, seed in zip(cells, seeds, strict=True)]
    rows = [[*prompter.image_prefix(1), *question] for question in questions]
    parts, pad = [torch.tensor(row) for row in rows], prompter.tokenizer.pad_token_id
    left = {"batch_first": True, "padding_side": "left"}
    tiles = [batch.caption_view[image] for image in batch.region_image.tolist()]
    data = {
        "pixel_values": batch.pixel_values[tiles],
        "input_ids": pad_sequence(parts, padding_value=pad, **left).to(device),
        "attention_mask": pad_sequence([torch.ones_like(part) for part in parts], **left).to(device),
        "prompt_masks": list(batch.prompt_masks[:, None]),
        "vp_overall_mask": torch.ones(len(rows)),
    }
    limit = config.loop.max_new_tokens
    options = {"max_new_tokens": limit, "min_new_tokens": limit, "do_sample": False}

    def ours() -> list[list[int]]:
        captioner = Captioner(model, prompter, config.loop, is_silent=True)
        return [list(caption.token_ids) for caption in captioner.write([task.see(batch)], [batch])[0]]

    def theirs() -> list[list[int]]:
        with evaluating(model):
            return model.generate(**data, **options, pad_token_id=pad).tolist()

    with one.trainer.accelerator.autocast():
        written, generated = ours(), theirs()
        own, other = best(ours, 2), best(theirs, 2)
    same = sum(a == b for a, b in zip(written, generated, strict=True))
    found.row(f"{len(rows)} captions of {limit} tokens", flow="dual_loop", seconds=own, times_dual_loop=1.0)
    found.row(f"{len(rows)} captions of {limit} tokens", flow="generate", seconds=other, times_dual_loop=other / own)
    if config.model.dtype == "float32":
        found.check("generate writes the same captions", same == len(rows), f"{same} of {len(rows)}")
    else:
        found.note(f"{same} of {len(rows)} captions are the same in bf16, where near ties fall either way.")

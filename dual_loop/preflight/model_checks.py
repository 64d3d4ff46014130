"""The model that a configuration asks for: tokens, checkpoint, what trains, one batch forward and backward."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dual_loop.checkpoint.importer import tokenizer_folder, weights_sources
from dual_loop.config import Config
from dual_loop.data.prepare import batch_from_samples, sample_rng
from dual_loop.data.reader import Reader
from dual_loop.errors import DualLoopError, SampleError
from dual_loop.loop.captioner import Captioner
from dual_loop.loop.segmentation_loss import compute_segmentation_loss
from dual_loop.model.adapters import trainable_parameters, trainable_table
from dual_loop.model.build import build_tokenizer, geometry
from dual_loop.model.hardware import autocast
from dual_loop.model.prompts import IMAGE_CONTEXT, NEW_TOKENS, Prompter
from dual_loop.model.sa2va import Sa2VA
from dual_loop.preflight.findings import NOTE, OK, PROBLEM, WARNING, Finding
from dual_loop.testing.scenes import generate_scene
from dual_loop.types import RegionSample


def check_tokens(config: Config) -> Iterator[Finding]:
    """Look whether every special token is one token, and where Sa2VA appends its five."""
    try:
        tokenizer = build_tokenizer(config.model, tokenizer_folder(config))
        Prompter(tokenizer, config.model.template, geometry(config).grid_size ** 2)
    except DualLoopError as error:
        yield Finding(PROBLEM, "tokens", str(error))
        return
    ids = [tokenizer.convert_tokens_to_ids(token) for token in NEW_TOKENS]
    context = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    text = f"{len(tokenizer):,} tokens; {IMAGE_CONTEXT} is {context}, {NEW_TOKENS[0]} is {ids[0]}"
    if ids == list(range(ids[0], ids[0] + len(ids))):
        yield Finding(OK, "tokens", f"{text}; all special tokens are single and follow each other")
    else:
        fix = "append them in the order of dual_loop.model.prompts.NEW_TOKENS"
        yield Finding(PROBLEM, "tokens", f"{text}; the new tokens are scattered: {ids}", fix)


def check_weights(config: Config) -> Iterator[Finding]:
    """Say which weights a run would start from, after a look at their headers."""
    try:
        sources = weights_sources(config)
    except DualLoopError as error:
        yield Finding(PROBLEM, "weights", str(error))
        return
    if not sources:
        fix = "give --pretrained_pth; a random model captions nothing that step 2 could use"
        yield Finding(WARNING, "weights", "no weights: a random start", fix)
    for source in sources:
        yield Finding(OK, "weights", f"{source} can be read")


def check_trains(model: torch.nn.Module) -> Iterator[Finding]:
    """Say what trains and what does not."""
    for line in trainable_table(model).splitlines():
        yield Finding(NOTE, "what trains", line.strip())


def check_batch(model: Sa2VA, prompter: Prompter, config: Config, sources: Sequence[Reader]) -> Iterator[Finding]:
    """Run one region of each source (a generated one without data) through all three steps, forward and backward."""
    sizes = geometry(config)
    captioner = Captioner(model, prompter, config.loop, is_silent=True)
    for sample in _one_of_each(sources):
        batch = batch_from_samples([sample], sizes).to(model.device)
        started = time.perf_counter()
        with autocast(model.device.type, config.model.dtype):
            [captions] = captioner.write([model.see(batch)], [batch])
            output = compute_segmentation_loss(model, batch, captions, prompter, config.loop, config.loss)
        loss = torch.stack([term.mean for term in output.terms.values()]).sum()
        loss.backward()
        value = float(loss.detach())
        gradients = [p.grad.float() for p in trainable_parameters(model).values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        model.zero_grad(set_to_none=True)
        figures = f"loss {value:.3f}, gradient norm {norm:.3g}, {time.perf_counter() - started:.1f} s"
        text = f"{sample.source}: caption {captions[0].text!r}, {figures}"
        if not (math.isfinite(value) and math.isfinite(norm)):
            yield Finding(PROBLEM, "one batch", text, "check the weights and the precision")
        elif any(caption.rejected for caption in captions):
            fix = "check that the weights are trained ones, and --max_new_tokens"
            yield Finding(WARNING, "one batch", f"{text}; {captions[0].rejected} caption", fix)
        else:
            yield Finding(OK, "one batch", text)


def _one_of_each(sources: Sequence[Reader]) -> Iterator[RegionSample]:
    """Yield the first usable sample of each source, a generated scene where there is none."""
    for source in sources:
        for index in range(min(len(source), 32)):
            with contextlib.suppress(SampleError):
                yield source.load(index, sample_rng(0, source.entry_id(index)))
                break
    if not sources:
        scene = generate_scene(0)
        names = tuple(str(k) for k in range(len(scene.objects)))
        yield RegionSample("generated", "scene", scene.image, np.asarray(scene.masks), names, ((),) * len(names))

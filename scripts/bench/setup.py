"""What one benchmarked variant is made of: configuration, model with random weights, generated batches, trainer."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dual_loop.config import Config, SpeedConfig, load_config, resolve_config_path
from dual_loop.data.dataset import SkipLedger
from dual_loop.data.prepare import Geometry, batch_from_samples
from dual_loop.model.build import build_model, build_prompter, build_tokenizer, geometry
from dual_loop.types import Batch, RegionSample

PRESETS = {"tiny": "tiny_cpu", "mid": "bench_mid", "4b": "sa2va_4b_cpu"}
IMAGE_SIZE = (480, 640)
MOST_READ = 20_000
"""Tokens of a vocabulary that are looked at for words."""

NEW_TOKEN_ROWS = "new_token_rows"
"""The lever besides those of SpeedConfig: off, whole embedding tables train."""

OFF = {
    "accelerate": False,
    "fused_lora": False,
    "trim_last_layer": False,
    "lean_sam2": False,
    "pack_weights": "off",
    "start_on_disk": False,
    "images_at_once": "all",
}
"""The value of each lever that does nothing."""

LEVERS = tuple(field.name for field in dataclasses.fields(SpeedConfig) if field.name in OFF)
PLAIN = SpeedConfig(**{name: OFF[name] for name in LEVERS})


@dataclass(frozen=True)
class Setting:
    """One benchmark call: the same for all of its variants.

    Attributes:
        config: a configuration of this package, or a ``config.json`` of the original's kind.
        batch, accumulation, new_tokens, regions: images, micro-batches, tokens of a caption, regions of an image.
        image_tokens: M; None keeps the configuration's.
        vocabulary: size of the tables; None keeps the configuration's.
        is_spread: let captions end at different lengths, evenly spread up to ``new_tokens``.
        changes: further dotted keys.
        device: as ``train.device``.
    """

    config: str
    batch: int
    accumulation: int
    new_tokens: int
    regions: int
    image_tokens: int | None = None
    vocabulary: int | None = None
    is_spread: bool = False
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "auto"


def variant_speed(name: str, base: SpeedConfig) -> SpeedConfig:
    """Return the levers of ``default``, ``plain``, ``off:LEVER`` or ``on:LEVER``."""
    if name == "plain":
        return PLAIN
    kind, _, lever = name.partition(":")
    if kind == "default" or lever == NEW_TOKEN_ROWS:
        return base
    if kind == "off":
        return dataclasses.replace(base, **{lever: getattr(PLAIN, lever)})
    return dataclasses.replace(base, **{lever: "on" if lever == "pack_weights" else True})


def build_config(setting: Setting, variant: str) -> Config:
    """Return the configuration of one variant."""
    changes: dict[str, Any] = {
        "train.device": setting.device,
        "train.batch_size": setting.batch,
        "train.gradient_accumulation_steps": setting.accumulation,
        "loop.max_new_tokens": setting.new_tokens,
        "loop.max_rejected_grace": 10**9,
        "reward.gates": (),  # random weights write nothing that could pass for a caption
        "model.initial_weights": None,
        "model.train_embeddings": "all" if variant in ("plain", f"off:{NEW_TOKEN_ROWS}") else "none",
        "data.regions_per_image": setting.regions,
        "train.max_steps": 1_000_000,
        "train.audit_interval": 1_000_000_000,
        "train.panel_interval": 1_000_000_000,
        "train.log_interval": 1_000_000_000,
        **setting.changes,
    }
    config = load_any(setting.config, changes)
    if setting.image_tokens is not None:
        patch = int(config.model.vision["patch_size"][0])
        side = round(setting.image_tokens**0.5 / config.model.downsample_ratio) * patch
        vision = {**config.model.vision, "image_size": [side, side]}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    if setting.vocabulary is not None:
        text = {**config.model.text, "vocab_size": setting.vocabulary}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    return dataclasses.replace(config, speed=variant_speed(variant, config.speed))


def load_any(name: str, changes: Mapping[str, Any]) -> Config:
    """Load a configuration of this package, or translate a ``config.json`` of the original's kind."""
    if not name.endswith(".json"):
        return load_config(resolve_config_path(PRESETS.get(name, name)), changes)
    from parity.original_config import config_from_original

    found = config_from_original(json.loads(Path(name).read_text(encoding="utf-8")))
    base = load_config(resolve_config_path("tiny_cpu"), changes)
    model = dataclasses.replace(found.model, tokenizer=found.model.tokenizer or "tiny", dtype="float32")
    return dataclasses.replace(base, model=dataclasses.replace(model, train_embeddings=base.model.train_embeddings))


def build_tokens(config: Config, folder: Path) -> Any:
    """Return a tokenizer of the size of the model's tables, so that every generated id has a text."""
    size = config.model.text.get("vocab_size")
    if size is None:
        return build_tokenizer(config.model)
    import real_size_step

    real_size_step.write_tokenizer(folder, int(size))
    return build_tokenizer(dataclasses.replace(config.model, tokenizer=str(folder)))


def generated_samples(count: int, regions: int, seed: int = 0) -> list[RegionSample]:
    """Smooth coloured noise with ``regions`` ellipses an image, no text."""
    random, samples = np.random.default_rng(seed), []
    height, width = IMAGE_SIZE
    rows, columns = np.mgrid[:height, :width]
    for index in range(count):
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        masks = []
        for _ in range(regions):
            y, x = random.uniform(0.2, 0.8) * height, random.uniform(0.2, 0.8) * width
            tall, wide = random.uniform(0.1, 0.2, 2) * height
            masks.append(((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 <= 1)
        names = tuple(str(k) for k in range(regions))
        samples.append(RegionSample("sa1b", f"made{index}", image, np.stack(masks), names, ((),) * regions))
    return samples


class GeneratedData:
    """What the trainer asks of a ``DataStream``: generated images, prepared for every micro-batch by the real code."""

    steps_per_epoch = 1_000_000
    source_names = ("sa1b",)

    def __init__(self, setting: Setting, shape: Geometry) -> None:
        self.setting, self.shape = setting, shape
        self.ledger = SkipLedger(max_bad_fraction=0.0, max_bad_grace=0)
        self.made = generated_samples(setting.batch * setting.accumulation, setting.regions)

    def batches(self, first_step: int) -> Iterator[Batch]:
        number = 0
        while True:
            first = number % self.setting.accumulation * self.setting.batch
            yield batch_from_samples(self.made[first : first + self.setting.batch], self.shape, seed=number)
            number += 1

    def samples(self, step: int, images: Sequence[int]) -> list[RegionSample]:
        return [self.made[image] for image in images]

    def state_dict(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def build_trainer(config: Config, setting: Setting) -> Any:
    """Return the real trainer around a model with random weights, or those that ``config`` names; generated data."""
    from dual_loop.checkpoint.importer import load_weights, weights_sources
    from dual_loop.loop.task import DualLoopTask
    from dual_loop.model.adapters import trainable_parameters
    from dual_loop.model.ema import ExponentialMovingAverage
    from dual_loop.training.devices import build_accelerator
    from dual_loop.training.memory import decide_by_memory, estimators
    from dual_loop.training.run_folder import RunFolder
    from dual_loop.training.trainer import Trainer

    folder = Path(tempfile.mkdtemp(prefix="bench_step_"))
    tokenizer = build_tokens(config, folder / "tokenizer")
    torch.manual_seed(0)
    accelerator = build_accelerator(config)
    model = build_model(config, tokenizer, device=str(accelerator.device)).to(accelerator.device)
    sources = weights_sources(config)
    if sources:
        load_weights(model, sources, tokenizer=tokenizer, allow_missing=config.train.allow_missing)
    else:
        draw_weights(model, tokenizer)
    memory = estimators(config, model, accelerator.device.type)
    average = ExponentialMovingAverage(trainable_parameters(model), config.train.ema_decay)
    task = DualLoopTask(model, build_prompter(config, tokenizer), config, average)
    model.finish(accelerator.device)
    data: Any = GeneratedData(setting, geometry(config))
    files = RunFolder(folder, writes=False)
    trainer = Trainer(config, task, average, data, accelerator, files, report=lambda line: None)
    trainer.images_at_once = decide_by_memory(memory, accelerator, trainer.optimizer).images
    return trainer


@torch.no_grad()
def draw_weights(model: Any, tokenizer: Any) -> None:
    """Draw LoRA B, and let nothing but words be likely, so that a caption is text of ``new_tokens`` words.

    With random weights a caption would be special tokens and signs, which are rejected, and step 2 would read something
    else, and shorter. A row of zeros in the head is never the likeliest beside dozens of random ones.
    """
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.02)
    head = model.mllm.lm_head.weight
    words = torch.zeros(len(head), 1, dtype=torch.bool)
    words[word_ids(tokenizer)] = True
    head.mul_(words.to(head.device))


def word_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that are a word with a blank before it, so that a text reads back as long as it is."""
    found = []
    for index in range(min(len(tokenizer), MOST_READ)):
        text = tokenizer.decode([index])
        if text.startswith(" ") and len(text) > 3 and text[1:].isascii() and text[1:].isalpha():
            found.append(index)
    return found

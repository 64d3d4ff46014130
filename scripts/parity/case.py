"""A folder of reference inputs and outputs, read as it is: nothing about its sizes or counts is assumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dual_loop.config import Config
from dual_loop.data.prepare import Geometry
from dual_loop.model.build import build_model, build_prompter, build_tokenizer, geometry
from dual_loop.model.prompts import Prompter
from dual_loop.model.sa2va_api import VideoLLaVASAMModel

from parity.original_config import config_from_original

FULL, TRAINABLE = "checkpoint_full.pth", "checkpoint_trainable.pth"


@dataclass
class Case:
    """One reference set.

    Attributes:
        folder: where it lies.
        original: its ``config.json``.
        config: the same for this package.
        inputs, outputs: the tensors by name.
        notes, results: ``inputs.json`` and ``outputs.json``.
        keys: ``keys.json``, empty where there is none.
        unchecked: names of outputs that no check has asked for yet.
        is_half: the model computes in bfloat16 autocast, as in training.
    """

    folder: Path
    original: Mapping[str, Any]
    config: Config
    tokenizer: Any
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    results: Mapping[str, Any]
    keys: Mapping[str, Any]
    unchecked: set[str] = field(default_factory=set)
    is_half: bool = False

    def expected(self, name: str) -> Tensor | None:
        """Return an output and note that it is checked; None where the set does not hold it."""
        self.unchecked.discard(name)
        return self.outputs.get(name)

    def begin(self) -> None:
        """Forget which outputs were checked."""
        self.unchecked = set(self.outputs)

    def autocast(self) -> torch.autocast:
        """Return the precision that the model computes in, as a context."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.is_half)

    @cached_property
    def geometry(self) -> Geometry:
        return geometry(self.config)

    @cached_property
    def prompter(self) -> Prompter:
        return build_prompter(self.config, self.tokenizer)

    @property
    def num_samples(self) -> int:
        return len(self.inputs["input_ids"])

    def numbered(self, name: str) -> dict[int, Tensor]:
        """Return the tensors ``name.0``, ``name.1``, ... by sample; samples without one are left out."""
        found = {key.rpartition("."): value for key, value in self.inputs.items()}
        return {int(index): value for (stem, _, index), value in sorted(found.items(), key=_by_index) if stem == name}

    @cached_property
    def tiles(self) -> Tensor:
        """(T, 3, I, I): image tiles of all samples."""
        whole = self.inputs.get("pixel_values")
        if whole is None:
            return torch.cat(list(self.numbered("pixel_values").values()))
        return whole.flatten(0, 1) if whole.dim() == 5 else whole

    def tiles_per_sample(self) -> list[int]:
        """Return the number of tiles of each sample."""
        listed = self.notes.get("tiles_per_sample")
        return [int(count) for count in listed] if listed else [len(self.tiles) // self.num_samples] * self.num_samples

    def loss_batch(self) -> dict[str, Any]:
        """Return the loss batch under the names of the model's ``forward``."""
        names = ("input_ids", "labels", "position_ids", "attention_mask", "g_pixel_values", "vp_overall_mask")
        data: dict[str, Any] = {name: self.inputs[name] for name in names if name in self.inputs}
        data["pixel_values"] = self.tiles
        data["masks"] = list(self.numbered("masks").values())
        data["prompt_masks"] = list(self.numbered("prompt_masks").values())
        return data

    def caption_batch(self) -> dict[str, Any]:
        """Return the caption prompts in the same way."""
        return {
            "input_ids": self.inputs["caption_input_ids"],
            "attention_mask": self.inputs["caption_attention_mask"],
            "pixel_values": self.tiles,
            "prompt_masks": list(self.numbered("caption_prompt_masks").values()),
            "vp_overall_mask": self.inputs.get("caption_vp_overall_mask"),
        }

    def new_model(self) -> VideoLLaVASAMModel:
        """Build the model of ``config.json`` with random weights (the seed is fixed)."""
        torch.manual_seed(0)
        model = build_model(self.config, self.tokenizer)
        if not isinstance(model, VideoLLaVASAMModel):
            raise TypeError(type(model))
        return model


def load_case(folder: Path, mixed_precision: str = "auto") -> Case:
    """Read a folder of reference inputs and outputs; ``mixed_precision`` as the trainer's flag (auto, no, bf16)."""
    original = _json(folder / "config.json")
    config = config_from_original(original)
    is_half = mixed_precision == "bf16" or (mixed_precision == "auto" and config.model.dtype == "bfloat16")
    # Eager attention, which the original takes in float32, would round its scores to bfloat16.
    attention = "sdpa" if is_half else config.model.attn_implementation
    model = dataclasses.replace(config.model, tokenizer=str(folder), attn_implementation=attention)
    config = dataclasses.replace(config, model=model)
    keys = folder / "keys.json"
    case = Case(
        folder=folder,
        original=original,
        config=config,
        tokenizer=build_tokenizer(config.model),
        inputs=load_file(folder / "inputs.safetensors"),
        outputs=load_file(folder / "outputs.safetensors"),
        notes=_json(folder / "inputs.json"),
        results=_json(folder / "outputs.json"),
        keys=_json(keys) if keys.is_file() else {},
        is_half=is_half,
    )
    case.begin()
    return case


def _by_index(item: tuple[tuple[str, str, str], Tensor]) -> tuple[str, int]:
    stem, _, index = item[0]
    return stem, int(index) if index.isdigit() else -1


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))

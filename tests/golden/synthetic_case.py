"""A reference set of other sizes and counts than any recorded one, made with the package's own model.

It proves nothing about the original. It shows that ``scripts/check_parity.py`` reads every size and count from the
files: three samples, one of three tiles, regions on some, more and fewer objects than the loss takes, another rank,
other widths, stages and windows.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from dual_loop.checkpoint.key_rules import ORIGINAL, file_name, iterate_export, sources_of
from dual_loop.config import ModelConfig
from dual_loop.data.masks import pool_mask_to_grid
from dual_loop.data.prepare import grounding_image, image_to_tiles, resize_targets
from dual_loop.model.adapters import group_of
from dual_loop.model.build import build_model, build_prompter, build_tokenizer, geometry
from dual_loop.model.decode import left_pad
from dual_loop.model.prompts import CAPTION_QUESTIONS, NEW_TOKENS, SEG, list_regions

from parity.original_config import config_from_original

ORDER = [0, 1, 0, 5, 2, 4, 6, 6, 6]
"""Three objects a sample: two repeated, a draw of three from four, one repeated."""
SIZES_WH, TILES, OBJECTS, REGIONS = [(60, 30), (31, 40), (25, 25)], [3, 1, 1], [2, 4, 1], [1, 2, 1]
NUM_STEPS, NUM_POINTS = 4, 20


def original_config() -> dict[str, Any]:
    """A ``config.json`` of the recorded kind, with other numbers throughout."""
    trunk: dict[str, Any] = {"embed_dim": 8, "num_heads": 1, "stages": [1, 1, 2, 1], "window_spec": [8, 4, 4, 2]}
    trunk.update(global_att_blocks=[3], window_pos_embed_bkg_spatial_size=[5, 5], mlp_ratio=3.0)
    transformer = {"depth": 1, "mlp_dim": 24, "num_heads": 4, "attention_downsample_rate": 2, "activation": "relu"}
    vision = {"image_size": 56, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    text = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
    return {
        "mllm": {"downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "max_dynamic_patch": 6},
        "vision_config": {**vision, "intermediate_size": 32, "qkv_bias": True, "norm_type": "layer_norm"},
        "llm_config": {**text, "intermediate_size": 64, "rope_theta": 5000.0, "architectures": ["Qwen2ForCausalLM"]},
        "lora": {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0},
        "text_hidden_fcs": {"in_dim": 48, "hidden_dim": 40, "out_dim": 32},
        "sam2": {
            "image_size": 256,
            "image_encoder": {"trunk": trunk, "neck": {"d_model": 32, "fpn_top_down_levels": [3]}},
            "prompt_encoder": {"mask_in_chans": 8},
            "mask_decoder": {"transformer": transformer, "iou_head_hidden_dim": 20},
        },
        "losses": {
            "loss_mask": {"loss_weight": 1.5},
            "loss_dice": {"loss_weight": 0.25},
            **{"num_points": NUM_POINTS, "oversample_ratio": 3.0, "importance_sample_ratio": 0.75, "fix_number": 3},
        },
        "special_tokens": list(NEW_TOKENS),
        "dtype": "float32",
    }


class Maker:
    """Builds the model and writes the set into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(0)
        self.original = original_config()
        self.tokenizer = tokenizer = build_tokenizer(ModelConfig(tokenizer="tiny"))
        tokenizer.save_pretrained(folder)
        self.original = with_vocabulary(self.original, len(tokenizer))
        self.config = config_from_original(self.original)
        self.prompter = build_prompter(self.config, tokenizer)
        self.sizes = geometry(self.config)
        torch.manual_seed(3)
        self.model: Any = build_model(self.config, tokenizer)
        with torch.no_grad():
            for parameter in self.model.parameters():
                std = 0.7 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
                parameter.add_(std * torch.randn_like(parameter))
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.notes: dict[str, Any] = {"tiles_per_sample": TILES, "image_sizes_wh": SIZES_WH}
        self.notes["predict"] = {"sample": 1, "object": 2}
        self.results: dict[str, Any] = {}

    def write(self) -> Path:
        """Make and write everything."""
        self.make_images()
        self.make_prompts()
        self.make_outputs()
        self.make_losses()
        self.make_captions()
        self.write_checkpoints()
        for name, content in (("config", self.original), ("inputs", self.notes), ("outputs", self.results)):
            (self.folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        for name, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            whole = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
            save_file(whole, self.folder / f"{name}.safetensors")
        return self.folder

    def make_images(self) -> None:
        tiles, grounding = [], []
        self.notes["image_files"] = [f"photo{k}.png" for k in range(3)]
        for sample, (width, height) in enumerate(SIZES_WH):
            image = self.rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(image).save(self.folder / f"photo{sample}.png")
            limit = 6 if TILES[sample] > 1 else 1
            tiles.append(image_to_tiles(image, dataclasses.replace(self.sizes, max_tiles=limit)))
            grounding.append(grounding_image(image, self.sizes.grounding_size))
            self.inputs[f"masks.{sample}"] = self.boxes(OBJECTS[sample], height, width)
            for prefix, count in (("", REGIONS[sample]), ("caption_", sample % 2 + 1)):
                if count:
                    masks = self.boxes(count, height, width)
                    self.inputs[f"{prefix}region_masks.{sample}"] = masks
                    grid, _ = pool_mask_to_grid(masks, self.sizes.grid_size, mode="nearest")
                    self.inputs[f"{prefix}prompt_masks.{sample}"] = grid.to(torch.uint8)
        assert [len(part) for part in tiles] == TILES
        self.inputs["pixel_values"] = torch.cat(tiles)
        self.inputs["g_pixel_values"] = torch.stack(grounding)
        self.inputs["vp_overall_mask"] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
        self.inputs["caption_vp_overall_mask"] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])

    def boxes(self, count: int, height: int, width: int) -> Tensor:
        """(count, height, width) uint8: rectangles that reach over several cells of the grid."""
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask in masks:
            top, left = self.rng.integers(0, height // 2), self.rng.integers(0, width // 2)
            mask[top : top + height // 2, left : left + width // 2] = 1
        return masks

    def cells(self, name: str) -> list[int]:
        grid = self.inputs.get(name)
        return [] if grid is None else [int(mask.sum()) for mask in grid]

    def make_prompts(self) -> None:
        template, before = self.prompter.template, "<|user|>\n"
        self.notes.update(loss_texts=[], caption_texts=[])
        whole, captions = [], []
        for sample, count in enumerate(OBJECTS):
            cells, num_image = self.cells(f"prompt_masks.{sample}"), self.prompter.image_tokens_per_tile * TILES[sample]
            turns = [(f"Please segment thing {k} in this image.", f"Sure, {SEG}.") for k in range(count)]
            whole.append(self.prompter.conversation(turns, TILES[sample], cells))
            head = f"{before}<img>{{{num_image} x <IMG_CONTEXT>}}</img>\n"
            body = "".join(f"{template.segment_turn.format(question=q)}{a}<|end|>" for q, a in turns)
            body = body.removeprefix(before)
            self.notes["loss_texts"].append(head + (list_regions(cells) + "\n" if cells else "") + body)
            cells = self.cells(f"caption_prompt_masks.{sample}")
            tail = f"{list_regions(cells)}\n\n{CAPTION_QUESTIONS['short']}<|end|>\n<|assistant|>\n"
            self.notes["caption_texts"].append(head + tail)
            captions.append(self.prompter.image_prefix(TILES[sample]) + self.prompter.encode("\n" + tail))
        length = max(len(turn.input_ids) for turn in whole)
        for name, fill in (("input_ids", 0), ("labels", -100)):
            rows = [list(getattr(turn, name)) for turn in whole]
            self.inputs[name] = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
        sizes = torch.tensor([len(turn.input_ids) for turn in whole])
        self.inputs["attention_mask"] = torch.arange(length)[None] < sizes[:, None]
        self.inputs["position_ids"] = torch.arange(length).expand(3, -1)
        ids, mask = left_pad(captions, self.tokenizer.pad_token_id)
        self.inputs.update(caption_input_ids=ids, caption_attention_mask=mask)

    def batch(self) -> dict[str, Any]:
        data: dict[str, Any] = dict(self.inputs)
        for name in ("masks", "prompt_masks"):
            data[name] = [self.inputs[f"{name}.{k}"] for k in range(3) if f"{name}.{k}" in self.inputs]
        return data

    @torch.no_grad()
    def make_outputs(self) -> None:
        model, data, out = self.model.eval(), self.batch(), self.outputs
        out["vit_embeds"] = model.project_vision(model.encode_vision(data["pixel_values"]))
        out["inputs_embeds"] = model.input_embeddings(data)
        out["last_hidden_state"] = model.hidden_states(data)
        out["logits"] = model.answer_logits(out["last_hidden_state"])
        out["seg_hidden"] = out["last_hidden_state"][data["input_ids"] == model.seg_id]
        out["seg_embeds"] = model.text_hidden_fcs(out["seg_hidden"])
        out["language_embd"] = out["seg_embeds"][ORDER][:, None]
        out["sparse_prompt_embeddings"] = model.grounding.sparse_prompts(out["seg_embeds"])[:1, 0]
        levels = model.encode_grounding(data["g_pixel_values"])
        out["fpn_0"], out["fpn_1"], _ = model.grounding.finish(levels)
        out["fpn_2"] = levels[2]
        found = model(data, mode="predict")["segmentation"]
        out["multimask_ious"], out["multimask_best"] = found.predicted_iou[ORDER], found.chosen[ORDER]
        out["object_score_logits"] = found.object_score_logits[ORDER]
        out["pred_masks_low_res"] = found.mask_logits[ORDER].unflatten(0, (3, 3))
        targets = [resize_targets(mask.bool().numpy(), self.sizes.mask_size, "nearest") for mask in data["masks"]]
        out["gt_masks_low_res"] = torch.cat(targets)[ORDER].unflatten(0, (3, 3))
        out["point_coords"] = torch.rand(9, NUM_POINTS, 2)
        out["predict_embd"] = out["seg_embeds"][4:5]
        out["predict_mask_low_res"] = found.mask_logits[4:5, None]
        width, height = SIZES_WH[1]
        full = torch.nn.functional.interpolate(out["predict_mask_low_res"], size=(256, 256), mode="bilinear")
        full = torch.nn.functional.interpolate(full, size=(height, width), mode="bilinear")[:, 0]
        out.update(predict_mask_logits_orig_size=full, predict_mask=full > 0, clip_anything=torch.zeros(1))

    def make_losses(self) -> None:
        self.results["losses"] = {}
        self.model.loss_config = dataclasses.replace(self.config.loss, num_points=0)
        for variant in ("no_points", "points"):
            data = {**self.batch(), "object_order": torch.tensor(ORDER)}
            if variant == "points":
                data["point_coords"] = self.outputs["point_coords"]
            self.model.zero_grad(set_to_none=True)
            losses = self.model(data, mode="loss")
            sum(losses.values()).backward()
            values = {name: value.item() for name, value in losses.items()}
            self.results["losses"][variant] = {**values, "total": sum(values.values())}
            gradients = {self.key(n): p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            norms = {key: gradient.double().norm().item() for key, gradient in gradients.items()}
            self.results[f"grad_norm_per_parameter_{variant}"] = norms
            lora = sum(norm**2 for key, norm in norms.items() if "lora_A." in key) ** 0.5
            self.results[f"grad_norm_groups_{variant}"] = {"lora_A": lora}
            if variant == "no_points":
                self.outputs["grad.text_hidden_fcs.0.bias"] = gradients["text_hidden_fcs.0.bias"].clone()
        names = ("iou_prediction_head.", "pred_obj_score_head.")
        self.results["parameters_without_grad"] = [
            self.key(n) for n, _ in self.model.named_parameters() if any(f"mask_decoder.{part}" in n for part in names)
        ]

    def key(self, name: str) -> str:
        return file_name(sources_of(name, ORIGINAL)[0][0], ORIGINAL)

    @torch.no_grad()
    def make_captions(self) -> None:
        """Greedy steps without a cache: every step runs the whole text."""
        masks = [self.inputs[f"caption_prompt_masks.{k}"] for k in range(3)]
        data = {"pixel_values": self.inputs["pixel_values"], "prompt_masks": masks}
        data["vp_overall_mask"] = self.inputs["caption_vp_overall_mask"]
        ids, mask, steps = self.inputs["caption_input_ids"], self.inputs["caption_attention_mask"].long(), []
        for _ in range(NUM_STEPS):
            embeds = self.model.input_embeddings({**data, "input_ids": ids})
            last = self.model.run_language(embeds, mask, (mask.cumsum(1) - 1).clamp_min(0))[:, -1]
            steps.append(self.model.answer_logits(last))
            self.outputs.setdefault("caption_first_step_last_hidden", last)
            ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], dim=1)
            mask = torch.cat([mask, mask[:, -1:]], dim=1)
        self.outputs["caption_first_step_logits"] = steps[0]
        self.outputs["caption_step_logits"] = torch.stack(steps, dim=1)
        self.outputs["caption_generated_ids"] = ids[:, -NUM_STEPS:]

    def write_checkpoints(self) -> None:
        whole = dict(iterate_export(self.model.state_dict().items(), ORIGINAL))
        whole["grounding_encoder.sam2_model.maskmem_tpos_enc"] = torch.zeros(7, 1, 1, 4)
        trained = {"lora", "mlp1", "mask_decoder", "text_hidden_fcs", "embeddings"}
        part = {self.key(n) for n, _ in self.model.named_parameters() if group_of(n) in trained}
        for name, state in (("full", whole), ("trainable", {k: v for k, v in whole.items() if k in part})):
            torch.save({"state_dict": state, "meta": {}}, self.folder / f"checkpoint_{name}.pth")
        listing = {"full": list(whole), "trainable": sorted(part), "trimmed": sorted(part)}
        (self.folder / "keys.json").write_text(json.dumps(listing), encoding="utf-8")


def with_vocabulary(original: dict[str, Any], size: int) -> dict[str, Any]:
    """Put the size of the vocabulary into a ``config.json``."""
    return {**original, "llm_config": {**original["llm_config"], "vocab_size": size}}


def write_case(folder: Path) -> Path:
    """Write a whole reference set into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Maker(folder).write()

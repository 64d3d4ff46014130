"""Names of weights in other programs' files and in this model: the mapping as data, and the few operations it needs.

Two steps lead from a key in a file to parameters of ``VideoLLaVASAMModel``. A :class:`Layout` first rewrites the key's
prefix, so that the same part has the same name whatever file it came from (*canonical* names: those of the original
without ``mllm.model.`` and peft's wrapper). Then a :class:`Rule` says where its rows go. A rule's operation is the set
of its :class:`Placement` s: one for a copy, three for a fused ``qkv``, two for a value that the native classes hold
twice, a target part for rows of a table that is stored in pieces. Everything is reversible.

Format: the key table of the original (Sa2VA, InternVL, SAM 2) against transformers' native classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Part = tuple[int, int]
"""(index, count): the ``index``-th of ``count`` equal chunks of rows (dimension 0)."""

PLACEHOLDERS = {
    "{i}": r"(?P<i>\d+)",
    "{j}": r"(?P<j>\d+)",
    "{w}": r"(?P<w>weight|bias)",
    "{linear}": r"(?P<linear>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)",
    "{norm}": r"(?P<norm>input_layernorm|post_attention_layernorm)",
    "{ab}": r"(?P<ab>[AB])",
    "{qkv}": r"(?P<qkv>[qkv]_proj)",
    "{attn}": r"(?P<attn>self_attn|cross_attn_token_to_image|cross_attn_image_to_token)",
    "{head}": r"(?P<head>iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+)",
    "{token}": r"(?P<token>iou_token|mask_tokens|obj_score_token|conv_s0|conv_s1)",
    "{rest}": r"(?P<rest>.+)",
}


@dataclass(frozen=True)
class Placement:
    """Where (a part of) a tensor goes: ``source_part`` of its rows into ``target_part`` of the rows of ``target``."""

    target: str
    source_part: Part | None = None
    target_part: Part | None = None


@dataclass(frozen=True)
class Rule:
    """A canonical name and its placements, or the reason why such tensors are dropped.

    Attributes:
        source: name with placeholders of :data:`PLACEHOLDERS`.
        placements: targets with the same placeholders; empty when dropped.
        dropped: why, for rules that drop.
        alias: an older or merged spelling; read, never written.
    """

    source: str
    placements: tuple[Placement, ...] = ()
    dropped: str = ""
    alias: bool = False


@dataclass(frozen=True)
class Layout:
    """A family of files.

    Attributes:
        name: as printed.
        prefixes: (beginning in the file, beginning of the canonical name); the first that fits is taken.
        rules: from canonical names.
        renames: (part in the file, part of the canonical name), anywhere in the name.
        is_base: holds no weights of Sa2VA's own (projected [SEG], new tokens), so those may start fresh.
    """

    name: str
    prefixes: tuple[tuple[str, str], ...]
    rules: tuple[Rule, ...]
    renames: tuple[tuple[str, str], ...] = ()
    is_base: bool = False


def copy(source: str, target: str, alias: bool = False) -> Rule:
    return Rule(source, (Placement(target),), alias=alias)


def copies(pairs: Iterable[tuple[str, str]], source: str, target: str) -> list[Rule]:
    """Copy rules for each (source, target) pair put behind the two prefixes, for weights and biases alike."""
    return [copy(f"{source}{before}.{{w}}", f"{target}{after}.{{w}}") for before, after in pairs]


def _vision_rules() -> list[Rule]:
    source, target = "vision_model.embeddings.", "mllm.model.vision_tower.embeddings."
    rules = [
        copy(source + "class_embedding", target + "cls_token"),
        copy(source + "position_embedding", target + "position_embeddings"),
        copy(source + "patch_embedding.{w}", target + "patch_embeddings.projection.{w}"),
    ]
    source, target = "vision_model.encoder.layers.{i}.", "mllm.model.vision_tower.encoder.layer.{i}."
    rules += [copy(source + f"ls{n}", target + f"lambda_{n}") for n in (1, 2)]
    parts = [Placement(f"{target}attention.{name}_proj.{{w}}", (k, 3)) for k, name in enumerate("qkv")]
    rules.append(Rule(source + "attn.qkv.{w}", tuple(parts)))
    pairs = [("attn.proj", "attention.projection_layer"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after")]
    return rules + copies([*pairs, ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")], source, target)


def _language_rules() -> list[Rule]:
    layer, target = "language_model.model.layers.{i}.", "mllm.model.language_model.layers.{i}."
    return [
        copy("language_model.model.embed_tokens.weight", "mllm.model.language_model.embed_tokens.weight"),
        copy("language_model.model.norm.weight", "mllm.model.language_model.norm.weight"),
        copy("language_model.lm_head.weight", "mllm.lm_head.weight"),
        copy(layer + "{norm}.weight", target + "{norm}.weight"),
        copy(layer + "{linear}.base_layer.{w}", target + "{linear}.base_layer.{w}"),
        copy(layer + "{linear}.lora_{ab}.default.weight", target + "{linear}.lora_{ab}.default.weight"),
        # Merged or never adapted, and adapters as older peft versions and its adapter files write them.
        copy(layer + "{linear}.{w}", target + "{linear}.base_layer.{w}", alias=True),
        copy(layer + "{linear}.lora_{ab}.weight", target + "{linear}.lora_{ab}.default.weight", alias=True),
        Rule("language_model.model.{rest}rotary_emb.inv_freq", dropped="rotary frequencies: computed, not stored"),
    ]


def _projector_rules() -> list[Rule]:
    pairs = [("0", "layer_norm"), ("1", "linear_1"), ("3", "linear_2")]
    return [
        *copies(pairs, "mlp1.", "mllm.model.multi_modal_projector."),
        copy("text_hidden_fcs.{i}.{w}", "text_hidden_fcs.{i}.{w}"),
    ]


def _trunk_rules() -> list[Rule]:
    source, target = SAM + "image_encoder.trunk.", "grounding_encoder.vision_encoder.backbone."
    block = "blocks.{i}."
    pairs = [
        ("patch_embed.proj", "patch_embed.projection"),
        (block + "norm1", block + "layer_norm1"),
        (block + "norm2", block + "layer_norm2"),
        (block + "attn.qkv", block + "attn.qkv"),
        (block + "attn.proj", block + "attn.proj"),
        (block + "proj", block + "proj"),
        (block + "mlp.layers.0", block + "mlp.proj_in"),
        (block + "mlp.layers.1", block + "mlp.proj_out"),
    ]
    neck = copy(SAM + "image_encoder.neck.convs.{i}.conv.{w}", "grounding_encoder.vision_encoder.neck.convs.{i}.{w}")
    tables = [copy(source + name, target + name) for name in ("pos_embed", "pos_embed_window")]
    return [*tables, *copies(pairs, source, target), neck]


def _prompt_encoder_rules() -> list[Rule]:
    source, target = SAM + "sam_prompt_encoder.", "grounding_encoder.prompt_encoder."
    matrix = "positional_encoding_gaussian_matrix"
    shared = (
        Placement("grounding_encoder.shared_image_embedding.positional_embedding"),
        Placement(target + "shared_embedding.positional_embedding"),
    )
    points = [
        Rule(f"{source}point_embeddings.{k}.weight", (Placement(target + "point_embed.weight", None, (k, 4)),))
        for k in range(4)
    ]
    names = [("0", "conv1"), ("1", "layer_norm1"), ("3", "conv2"), ("4", "layer_norm2"), ("6", "conv3")]
    return [
        copy(SAM + "no_mem_embed", "grounding_encoder.no_memory_embedding"),
        Rule(f"{source}pe_layer.{matrix}", shared),
        *points,
        *(copy(f"{source}{name}.weight", f"{target}{name}.weight") for name in ("not_a_point_embed", "no_mask_embed")),
        *copies(names, source + "mask_downscaling.", target + "mask_embed."),
    ]


def _mask_decoder_rules() -> list[Rule]:
    source, target = SAM + "sam_mask_decoder.", "grounding_encoder.mask_decoder."
    layer, final = "transformer.layers.{i}.", "transformer.final_attn_token_to_image."
    pairs = [
        ("{token}", "{token}"),
        ("output_upscaling.0", "upscale_conv1"),
        ("output_upscaling.1", "upscale_layer_norm"),
        ("output_upscaling.3", "upscale_conv2"),
        ("{head}.layers.0", "{head}.proj_in"),
        # In an MLP of three layers the middle one is layers.0; in one of two, layers.1 is the last.
        ("{head}.layers.1", "{head}.layers.0"),
        ("{head}.layers.2", "{head}.proj_out"),
        (layer + "mlp.layers.0", layer + "mlp.proj_in"),
        (layer + "mlp.layers.1", layer + "mlp.proj_out"),
        (layer + "{attn}.{qkv}", layer + "{attn}.{qkv}"),
        (layer + "{attn}.out_proj", layer + "{attn}.o_proj"),
        (final + "{qkv}", final + "{qkv}"),
        (final + "out_proj", final + "o_proj"),
        ("transformer.norm_final_attn", "transformer.layer_norm_final_attn"),
    ]
    pairs += [(f"{layer}norm{n}", f"{layer}layer_norm{n}") for n in (1, 2, 3, 4)]
    return copies(pairs, source, target)


SAM = "grounding_encoder.sam2_model."
VIDEO = "video memory: single images do not use it"
VIDEO_PARTS = (
    "memory_attention.{rest}",
    "memory_encoder.{rest}",
    "obj_ptr_proj.{rest}",
    "obj_ptr_tpos_proj.{rest}",
    "mask_downsample.{w}",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
)
NATIVE_VIDEO_PARTS = (
    "memory_attention.{rest}",
    "memory_encoder.{rest}",
    "object_pointer_proj.{rest}",
    "temporal_positional_encoding_projection_layer.{rest}",
    "mask_downsample.{w}",
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)

CANONICAL_RULES = (
    *_vision_rules(),
    *_language_rules(),
    *_projector_rules(),
    *_trunk_rules(),
    *_prompt_encoder_rules(),
    *_mask_decoder_rules(),
    *(Rule(SAM + part, dropped=VIDEO) for part in VIDEO_PARTS),
)

NATIVE_RULES = (
    *(Rule("grounding_encoder." + part, dropped=VIDEO) for part in NATIVE_VIDEO_PARTS),
    copy("mllm.model.language_model.layers.{i}.{linear}.{w}",
         "mllm.model.language_model.layers.{i}.{linear}.base_layer.{w}", alias=True),
    copy("{rest}", "{rest}"),
)  # fmt: skip

ORIGINAL = Layout(
    "original",
    (
        ("mllm.model.language_model.base_model.model.", "language_model."),
        # An adapter file of peft: its model is the language model.
        ("base_model.model.", "language_model."),
        ("mllm.model.", ""),
    ),
    CANONICAL_RULES,
)
HF_SA2VA = Layout("hf-sa2va", (), CANONICAL_RULES, renames=((".g_weight", ".gamma"),))
"""The released folder: transformers of that time renamed ``gamma`` on loading, so its writer says ``g_weight``."""
INTERNVL = Layout("internvl", (), CANONICAL_RULES, is_base=True)
INTERNVL_NATIVE = Layout(
    "internvl-native",
    (
        ("model.", "mllm.model."),
        ("lm_head.", "mllm.lm_head."),
        ("language_model.lm_head.", "mllm.lm_head."),
        ("language_model.model.", "mllm.model.language_model."),
        ("vision_tower.", "mllm.model.vision_tower."),
        ("multi_modal_projector.", "mllm.model.multi_modal_projector."),
    ),
    NATIVE_RULES,
    is_base=True,
)
SAM2 = Layout("sam2", (("", SAM),), CANONICAL_RULES, is_base=True)
SAM2_NATIVE = Layout("sam2-native", (("", "grounding_encoder."),), NATIVE_RULES, is_base=True)
NATIVE = Layout("native", (), NATIVE_RULES)
"""The package's own layout: names of ``model.state_dict()``."""

# Which beginnings of names, after DDP's and DeepSpeed's ``module.``, tell a layout; asked in this order.
MARKS: tuple[tuple[Layout, tuple[str, ...]], ...] = (
    (NATIVE, ("mllm.model.vision_tower.", "mllm.model.multi_modal_projector.", "grounding_encoder.vision_encoder.",
              "grounding_encoder.mask_decoder.", "mllm.lm_head.", "mllm.model.language_model.layers.")),
    (ORIGINAL, ("mllm.model.", "base_model.model.")),
    (HF_SA2VA, (SAM, "text_hidden_fcs.")),
    (INTERNVL, ("vision_model.", "mlp1.")),
    (INTERNVL_NATIVE, ("model.vision_tower.", "vision_tower.", "model.multi_modal_projector.")),
    (SAM2, ("image_encoder.trunk.", "sam_mask_decoder.")),
    (SAM2_NATIVE, ("vision_encoder.backbone.", "mask_decoder.")),
)  # fmt: skip

REFUSED = {
    "an InternLM2 language model (Sa2VA-8B, -26B; InternVL2 and 2.5 of 2B, 8B and 26B)": (
        r"language_model\.(base_model\.model\.)?model\.(tok_embeddings|layers\.\d+\.attention\.wqkv)"
    ),
    "a Qwen-VL model (Sa2VA-Qwen2.5-VL, Sa2VA-Qwen3-VL)": r"(^|\.)visual\.(blocks|patch_embed|merger)",
}
"""Architectures that share prefixes with ours and would load in part, by a pattern of their keys."""


def detect_layout(names: Iterable[str]) -> Layout | None:
    """Return the layout that the names of a file tell, None when they tell none."""
    names = list(names)
    for layout, marks in MARKS:
        if any(name.startswith(marks) for name in names):
            return layout
    return None


def find_refused(names: Iterable[str]) -> tuple[str, str] | None:
    """Return (what it is, first key that says so) of an architecture that is not supported, else None."""
    for what, pattern in REFUSED.items():
        for name in names:
            if re.search(pattern, name):
                return what, name
    return None


def canonical_name(name: str, layout: Layout) -> str:
    """Rewrite a file's key to the canonical name."""
    for before, after in layout.renames:
        name = name.replace(before, after)
    for before, after in layout.prefixes:
        if name.startswith(before):
            return after + name[len(before) :]
    return name


def file_name(canonical: str, layout: Layout) -> str:
    """Rewrite a canonical name to the key that files of ``layout`` hold; the inverse of :func:`canonical_name`."""
    for before, after in layout.renames:
        canonical = canonical.replace(after, before)
    for before, after in layout.prefixes:
        # Adapter files have a layout of their own; the original writes its full wrapper.
        if canonical.startswith(after) and (after or not canonical.startswith(("grounding_encoder.", "text_hidden"))):
            return before + canonical[len(after) :]
    return canonical


def find_rule(canonical: str, layout: Layout) -> tuple[Rule, dict[str, str]] | None:
    """Return the rule for a canonical name with the values of its placeholders, None for an unknown name."""
    for rule in layout.rules:
        match = _pattern(rule.source).fullmatch(canonical)
        if match:
            return rule, match.groupdict()
    return None


def place(name: str, layout: Layout) -> tuple[list[Placement], str] | None:
    """Return where a file's key goes, and why if nowhere; None when no rule knows the key."""
    found = find_rule(canonical_name(name, layout), layout)
    if found is None:
        return None
    rule, values = found
    targets = [Placement(_fill(p.target, values), p.source_part, p.target_part) for p in rule.placements]
    return targets, rule.dropped


def rows(tensor: Tensor, part: Part | None) -> Tensor:
    """Return one of ``count`` equal chunks of rows, the whole tensor for None."""
    if part is None:
        return tensor
    size = tensor.shape[0] // part[1]
    return tensor[part[0] * size : (part[0] + 1) * size]


def sources_of(target: str, layout: Layout) -> list[tuple[str, Part | None, Part | None]]:
    """Return (canonical name, source part, target part) of all keys that fill a native tensor, in order."""
    found = []
    for rule in layout.rules:
        if rule.alias:
            continue
        for placement in rule.placements:
            match = _pattern(placement.target).fullmatch(target)
            if match:
                name = _fill(rule.source, match.groupdict())
                found.append((name, placement.source_part, placement.target_part))
    return found


def export_tensors(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Turn native tensors into a file's tensors: every rule backwards; see :func:`iterate_export`."""
    return dict(iterate_export(state.items(), layout))


def iterate_export(state: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's (key, tensor) as soon as all native tensors that it is made of have come.

    Args:
        state: by the names of ``model.state_dict()``; ``new_token_rows`` must have been written into the tables.
        layout: of the file.

    Raises:
        KeyError: a native name that no rule of the layout produces, or a key of which parts are missing.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    done: set[str] = set()
    for target, tensor in state:
        sources = sources_of(target, layout)
        if not sources:
            raise KeyError(target)
        for name, source_part, target_part in sources:
            key = file_name(name, layout)
            if key in done:
                # The native classes hold one value twice.
                continue
            index, count = source_part if source_part else (0, 1)
            found = pieces.setdefault(key, {})
            found[index] = rows(tensor, target_part)
            if len(found) == count:
                yield key, found[0] if count == 1 else torch.cat([found[part] for part in range(count)])
                done.add(key)
                del pieces[key]
    if pieces:
        raise KeyError(f"parts are missing of {', '.join(pieces)}")


@cache
def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for placeholder, pattern in PLACEHOLDERS.items():
        text = text.replace(re.escape(placeholder), pattern)
    return re.compile(text)


def _fill(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template

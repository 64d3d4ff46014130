"""Names of weights in other programs' files and in this model: the mapping as data, and the few operations it needs.

A :class:`Layout` first rewrites the prefix of a key, so that the same part has the same *canonical* name whatever file
it came from: that of the original without ``mllm.model.`` and peft's wrapper. Then a :class:`Rule` says where its rows
go: one :class:`Placement` for a copy, three for a fused ``qkv``, two for a value that the native classes hold twice, a
target part for rows of a table that is stored in pieces. Everything is reversible.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

Part = tuple[int, int]
"""(index, count): the ``index``-th of ``count`` equal chunks of rows (dimension 0)."""

PLACEHOLDERS = {
    "i": r"\d+",
    "j": r"\d+",
    "w": "weight|bias",
    "linear": r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj",
    "norm": "input_layernorm|post_attention_layernorm",
    "ab": "[AB]",
    "qkv": "[qkv]_proj",
    "attn": "self_attn|cross_attn_token_to_image|cross_attn_image_to_token",
    "memory": "self_attn|cross_attn_image",
    "head": r"iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps\.\d+",
    "token": "iou_token|mask_tokens|obj_score_token|conv_s0|conv_s1",
    "rest": ".+",
}


@dataclass(frozen=True)
class Placement:
    """Where (a part of) a tensor goes: ``source_part`` of its rows into ``target_part`` of the rows of ``target``."""

    target: str
    source_part: Part | None = None
    target_part: Part | None = None


@dataclass(frozen=True)
class Rule:
    """A canonical name and its placements, all with :data:`PLACEHOLDERS`, or why such tensors are dropped."""

    source: str
    placements: tuple[Placement, ...] = ()
    dropped: str = ""
    alias: bool = False  # an older or merged spelling; read, never written


@dataclass(frozen=True)
class Layout:
    """A family of files."""

    name: str
    prefixes: tuple[tuple[str, str], ...]  # in the file, in the canonical name; the first that fits is taken
    rules: tuple[Rule, ...]
    renames: tuple[tuple[str, str], ...] = ()  # the same, anywhere in the name
    is_base: bool = False  # holds no weights of Sa2VA's own (projected [SEG], new tokens), so those may start fresh


SAM = "grounding_encoder.sam2_model."
VIDEO = "video memory: single images do not use it"
KEPT_ASIDE = "kept aside by peft: modules_to_save stands in for it"
COUNTS = "positions and counts: computed, not stored"

COPIES = {
    ("vision_model.embeddings.", "mllm.model.vision_tower.embeddings."): """
        class_embedding      cls_token
        position_embedding   position_embeddings
        patch_embedding.{w}  patch_embeddings.projection.{w}
    """,
    ("vision_model.encoder.layers.{i}.", "mllm.model.vision_tower.encoder.layer.{i}."): """
        ls{j}          lambda_{j}
        attn.proj.{w}  attention.projection_layer.{w}
        norm1.{w}      layernorm_before.{w}
        norm2.{w}      layernorm_after.{w}
        mlp.fc{j}.{w}
    """,
    ("mlp1.", "mllm.model.multi_modal_projector."): """
        0.{w}  layer_norm.{w}
        1.{w}  linear_1.{w}
        3.{w}  linear_2.{w}
    """,
    ("text_hidden_fcs.", "text_hidden_fcs."): "{i}.{w}",
    ("language_model.", "mllm."): "lm_head.weight",
    ("language_model.model.", "mllm.model.language_model."): """
        embed_tokens.weight
        norm.weight
        layers.{i}.{norm}.weight
        layers.{i}.{linear}.base_layer.{w}
        layers.{i}.{linear}.lora_{ab}.default.weight
        layers.{i}.{linear}.lora_magnitude_vector.default.weight
    """,
    (SAM, "grounding_encoder."): """
        no_mem_embed                           no_memory_embedding
        image_encoder.neck.convs.{i}.conv.{w}  vision_encoder.neck.convs.{i}.{w}
    """,
    (SAM + "image_encoder.trunk.", "grounding_encoder.vision_encoder.backbone."): """
        pos_embed
        pos_embed_window
        patch_embed.proj.{w}         patch_embed.projection.{w}
        blocks.{i}.norm{j}.{w}       blocks.{i}.layer_norm{j}.{w}
        blocks.{i}.attn.qkv.{w}
        blocks.{i}.attn.proj.{w}
        blocks.{i}.proj.{w}
        blocks.{i}.mlp.layers.0.{w}  blocks.{i}.mlp.proj_in.{w}
        blocks.{i}.mlp.layers.1.{w}  blocks.{i}.mlp.proj_out.{w}
    """,
    (SAM + "sam_prompt_encoder.", "grounding_encoder.prompt_encoder."): """
        not_a_point_embed.weight
        no_mask_embed.weight
        mask_downscaling.0.{w}  mask_embed.conv1.{w}
        mask_downscaling.1.{w}  mask_embed.layer_norm1.{w}
        mask_downscaling.3.{w}  mask_embed.conv2.{w}
        mask_downscaling.4.{w}  mask_embed.layer_norm2.{w}
        mask_downscaling.6.{w}  mask_embed.conv3.{w}
    """,
    # In an MLP of three layers (heads) the middle one is layers.0 here; in one of two, layers.1 is the last.
    (SAM + "sam_mask_decoder.", "grounding_encoder.mask_decoder."): """
        {token}.{w}
        output_upscaling.0.{w}      upscale_conv1.{w}
        output_upscaling.1.{w}      upscale_layer_norm.{w}
        output_upscaling.3.{w}      upscale_conv2.{w}
        {head}.layers.0.{w}         {head}.proj_in.{w}
        {head}.layers.1.{w}         {head}.layers.0.{w}
        {head}.layers.2.{w}         {head}.proj_out.{w}
    """,
    (SAM + "sam_mask_decoder.transformer.", "grounding_encoder.mask_decoder.transformer."): """
        layers.{i}.mlp.layers.0.{w}     layers.{i}.mlp.proj_in.{w}
        layers.{i}.mlp.layers.1.{w}     layers.{i}.mlp.proj_out.{w}
        layers.{i}.{attn}.{qkv}.{w}
        layers.{i}.{attn}.out_proj.{w}  layers.{i}.{attn}.o_proj.{w}
        layers.{i}.norm{j}.{w}          layers.{i}.layer_norm{j}.{w}
        final_attn_token_to_image.{qkv}.{w}
        final_attn_token_to_image.out_proj.{w}  final_attn_token_to_image.o_proj.{w}
        norm_final_attn.{w}             layer_norm_final_attn.{w}
    """,
}
"""Tensors that are copied: (beginning in the original, beginning here), then how the names go on, here too where only
one is given."""

VIDEO_PARTS = (
    "memory_attention.{rest}", "memory_encoder.{rest}", "obj_ptr_proj.{rest}", "obj_ptr_tpos_proj.{rest}",
    "mask_downsample.{w}", "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial",
)  # fmt: skip
MEMORY_COPIES = {
    (SAM, ""): """
        maskmem_tpos_enc                    memory_temporal_positional_encoding
        no_mem_pos_enc                      no_memory_positional_encoding
        no_obj_ptr                          no_object_pointer
        no_obj_embed_spatial                occlusion_spatial_embedding_parameter
        mask_downsample.{w}
        obj_ptr_proj.layers.0.{w}           object_pointer_proj.proj_in.{w}
        obj_ptr_proj.layers.1.{w}           object_pointer_proj.layers.0.{w}
        obj_ptr_proj.layers.2.{w}           object_pointer_proj.proj_out.{w}
        obj_ptr_tpos_proj.{w}               temporal_positional_encoding_projection_layer.{w}
    """,
    (SAM + "memory_attention.", "memory_attention."): """
        norm.{w}                            layer_norm.{w}
        layers.{i}.linear{j}.{w}
        layers.{i}.norm{j}.{w}              layers.{i}.layer_norm{j}.{w}
        layers.{i}.{memory}.{qkv}.{w}
        layers.{i}.{memory}.out_proj.{w}    layers.{i}.{memory}.o_proj.{w}
    """,
    (SAM + "memory_encoder.", "memory_encoder."): """
        pix_feat_proj.{w}                   feature_projection.{w}
        out_proj.{w}                        projection.{w}
        mask_downsampler.encoder.0.{w}      mask_downsampler.layers.0.conv.{w}
        mask_downsampler.encoder.1.{w}      mask_downsampler.layers.0.layer_norm.{w}
        mask_downsampler.encoder.3.{w}      mask_downsampler.layers.1.conv.{w}
        mask_downsampler.encoder.4.{w}      mask_downsampler.layers.1.layer_norm.{w}
        mask_downsampler.encoder.6.{w}      mask_downsampler.layers.2.conv.{w}
        mask_downsampler.encoder.7.{w}      mask_downsampler.layers.2.layer_norm.{w}
        mask_downsampler.encoder.9.{w}      mask_downsampler.layers.3.conv.{w}
        mask_downsampler.encoder.10.{w}     mask_downsampler.layers.3.layer_norm.{w}
        mask_downsampler.encoder.12.{w}     mask_downsampler.final_conv.{w}
        fuser.layers.{i}.gamma              memory_fuser.layers.{i}.scale
        fuser.layers.{i}.dwconv.{w}         memory_fuser.layers.{i}.depthwise_conv.{w}
        fuser.layers.{i}.norm.{w}           memory_fuser.layers.{i}.layer_norm.{w}
        fuser.layers.{i}.pwconv{j}.{w}      memory_fuser.layers.{i}.pointwise_conv{j}.{w}
    """,
}
"""Of the dropped ones, what :func:`memory_name` calls as transformers' Sam2VideoModel does; written as COPIES."""
NATIVE_VIDEO_PARTS = (
    "memory_attention.{rest}", "memory_encoder.{rest}", "object_pointer_proj.{rest}",
    "temporal_positional_encoding_projection_layer.{rest}", "mask_downsample.{w}",
    "memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
)  # fmt: skip


def _copies(table: Mapping[tuple[str, str], str]) -> Iterator[Rule]:
    for (source, target), names in table.items():
        for line in names.strip().splitlines():
            before, *after = line.split()
            yield Rule(source + before, (Placement(target + (after[0] if after else before)),))


def _canonical_rules() -> Iterator[Rule]:
    yield from _copies(COPIES)
    # Merged or never adapted, and adapters as older peft versions and its adapter files write them.
    layers, native = "language_model.model.layers.{i}.{linear}.", "mllm.model.language_model.layers.{i}.{linear}."
    magnitude = "lora_magnitude_vector"
    for before, name in (
        ("{w}", "base_layer.{w}"),
        ("lora_{ab}.weight", "lora_{ab}.default.weight"),
        (magnitude, f"{magnitude}.default.weight"),
    ):
        yield Rule(layers + before, (Placement(native + name),), alias=True)
    attention = "mllm.model.vision_tower.encoder.layer.{i}.attention."
    parts = tuple(Placement(f"{attention}{name}_proj.{{w}}", (k, 3)) for k, name in enumerate("qkv"))
    yield Rule("vision_model.encoder.layers.{i}.attn.qkv.{w}", parts)
    prompts, encoder = SAM + "sam_prompt_encoder.", "grounding_encoder.prompt_encoder."
    for k in range(4):
        yield Rule(f"{prompts}point_embeddings.{k}.weight", (Placement(f"{encoder}point_embed.weight", None, (k, 4)),))
    shared = ("grounding_encoder.shared_image_embedding.", f"{encoder}shared_embedding.")
    places = tuple(Placement(f"{owner}positional_embedding") for owner in shared)
    yield Rule(f"{prompts}pe_layer.positional_encoding_gaussian_matrix", places)
    rotary = "rotary frequencies: computed, not stored"
    yield Rule("language_model.model.{rest}rotary_emb.inv_freq", dropped=rotary)
    yield Rule("{rest}.original_module.{w}", dropped=KEPT_ASIDE)
    yield from (Rule("{rest}." + name, dropped=COUNTS) for name in ("position_ids", "num_batches_tracked"))
    yield from (Rule(SAM + part, dropped=VIDEO) for part in VIDEO_PARTS)


CANONICAL_RULES = tuple(_canonical_rules())
MEMORY_RULES = (
    *_copies(MEMORY_COPIES),
    *(Rule("grounding_encoder." + part, (Placement(part),)) for part in NATIVE_VIDEO_PARTS),
)
NATIVE_RULES = (
    *(Rule("grounding_encoder." + part, dropped=VIDEO) for part in NATIVE_VIDEO_PARTS),
    Rule("mllm.model.language_model.layers.{i}.{linear}.{w}",
         (Placement("mllm.model.language_model.layers.{i}.{linear}.base_layer.{w}"),), alias=True),
    Rule("{rest}", (Placement("{rest}"),)),
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
    return next((layout for layout, marks in MARKS if any(name.startswith(marks) for name in names)), None)


def find_refused(names: Iterable[str]) -> tuple[str, str] | None:
    """Return (what it is, first key that says so) of an architecture that is not supported, else None."""
    found = ((what, name) for what, pattern in REFUSED.items() for name in names if re.search(pattern, name))
    return next(found, None)


def canonical_name(name: str, layout: Layout) -> str:
    """Rewrite a file's key to the canonical name; an adapter, or a part that peft trains whole, may have any name."""
    name = re.sub(r"\.modules_to_save\.\w+(\.weight)$", r"\1", name)
    name = re.sub(r"(\.lora_(?:[AB]|magnitude_vector)\.)\w+(\.weight)$", r"\1default\2", name)
    for before, after in layout.renames:
        name = name.replace(before, after)
    for before, after in layout.prefixes:
        if name.startswith(before):
            return after + name.removeprefix(before)
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


def place(name: str, layout: Layout) -> tuple[list[Placement], str] | None:
    """Return where a file's key goes, and why if nowhere; None when no rule knows the key."""
    canonical = canonical_name(name, layout)
    for rule in layout.rules:
        if match := _pattern(rule.source).fullmatch(canonical):
            places = [replace(p, target=p.target.format(**match.groupdict())) for p in rule.placements]
            return places, rule.dropped
    return None


def memory_name(name: str, layout: Layout) -> str | None:
    """Return what Sam2VideoModel calls a file's key of video memory; None for every other key."""
    found = place(name, replace(layout, rules=MEMORY_RULES))
    return found[0][0].target if found else None


def rows(tensor: Tensor, part: Part | None) -> Tensor:
    """Return one of ``count`` equal chunks of rows, the whole tensor for None."""
    return tensor if part is None else tensor.chunk(part[1])[part[0]]


def sources_of(target: str, layout: Layout) -> list[tuple[str, Part | None, Part | None]]:
    """Return (canonical name, source part, target part) of all keys that fill a native tensor, in order."""
    return [
        (rule.source.format(**match.groupdict()), placement.source_part, placement.target_part)
        for rule in layout.rules
        for placement in (() if rule.alias else rule.placements)
        if (match := _pattern(placement.target).fullmatch(target))
    ]


def iterate_export(state: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield a file's (key, tensor), every rule backwards, as soon as all native tensors that it is made of have come.

    ``state`` has the names of ``model.state_dict()``; ``new_token_rows`` must have been written into the tables.

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
    groups = {name: f"(?P<{name}>{pattern})" for name, pattern in PLACEHOLDERS.items()}
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda match: groups[match[1]], re.escape(template)))

"""Weights from the model into files that other programs read, under their names, bit for bit.

========================  ==============================================================================================
``original``              Sa2VA's training layout, whole: one ``.pth`` file, or a folder of safetensors shards
``original-trimmed``      the same, only what Sa2VA's own trimmed state dict holds
``hf-sa2va``              the released chat folder: LoRA merged, shards, ``config.json``, tokenizer
``hf-native``             ``mllm/`` and ``sam2/`` for transformers' native classes, LoRA merged, and the projection
``adapter``               a peft adapter of the language model, and ``trained.safetensors`` with the rest that trains
========================  ==============================================================================================
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from dual_loop.checkpoint import FORMATS
from dual_loop.checkpoint.key_rules import (
    HF_SA2VA,
    ORIGINAL,
    SAM,
    VIDEO,
    canonical_name,
    detect_layout,
    file_name,
    iterate_export,
    memory_name,
    place,
)
from dual_loop.checkpoint.manifest import writing_tensors
from dual_loop.checkpoint.sources import ADAPTER_EXTRA, open_parts
from dual_loop.config import Config, hub_name
from dual_loop.errors import CheckpointError, explain
from dual_loop.iteration import progress_bar
from dual_loop.model.adapters import lora_config, lora_scale
from dual_loop.model.sa2va import Sa2VA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED = ("hf-native", "hf-sa2va")
"""Formats without adapters: LoRA is always merged."""
FILE_SUFFIXES = (".pth", ".pt", ".bin")
FILE_MARK = "dual_loop_export"
"""Under ``meta`` of a file that was exported: its format."""
TABLES = ("mllm.lm_head.", "mllm.model.language_model.embed_tokens.")
TRIMMED_ORDER = (".lora_", "mllm.model.multi_modal_projector.", "grounding_encoder.mask_decoder.", "text_hidden_fcs.",
                 *TABLES)  # fmt: skip
"""What Sa2VA's trimmed state dict holds, in its order."""
BASE, LORA_A, LORA_B = ".base_layer.", ".lora_A.default.", ".lora_B.default."
LANGUAGE, PEFT_WRAPPER = "mllm.model.language_model.", "base_model.model."


def export_weights(
    model: Sa2VA,
    out: Path,
    file_format: str,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    video: Mapping[str, Tensor] | None = None,
    merge_lora: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write ``model`` to ``out`` and return the number of tensors written.

    Args:
        model: rows of new tokens are written into its tables first.
        out: a file (``.pth``, ``.pt``, ``.bin``; the two original formats only) or a folder that does not exist.
        video: video-memory tensors by canonical name, added to ``original`` and ``hf-sa2va``.
        merge_lora: fold LoRA into its base for ``original`` (always so for ``hf-*``), computed in float32.
        dtype: cast floating tensors; None keeps each as the model holds it.
        max_shard_bytes: size at which a new shard begins.

    Raises:
        CheckpointError: the format and the path or the options do not fit.
    """
    check_target(out, file_format, merge_lora)
    model.sync_new_tokens()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("new_token_rows.")}
    if file_format in ("original-trimmed", "adapter"):
        state = {name: state[name] for part in TRIMMED_ORDER for name in state if part in name}
    is_merged = merge_lora or file_format in MERGED
    tensors = _cast(merged(state, lora_scale(config.model)) if is_merged else state.items(), dtype)
    if file_format == "adapter":
        return _write_adapter(model, dict(tensors), out, config)
    if file_format == "hf-native":
        return _write_native(model, tensors, out, tokenizer, max_shard_bytes)
    layout = HF_SA2VA if file_format == "hf-sa2va" else ORIGINAL
    exported = iterate_export(tensors, layout)
    if is_merged:  # the names of a model that never had adapters
        exported = ((name.replace(PEFT_WRAPPER, "").replace(BASE, "."), tensor) for name, tensor in exported)
    if video and file_format != "original-trimmed":
        extra = ((file_name(name, layout), tensor) for name, tensor in video.items())
        exported = itertools.chain(exported, _cast(extra, dtype))
    if out.suffix in FILE_SUFFIXES:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in exported}
        size = sum(tensor.nbytes for tensor in content.values())
        with (
            writing_tensors("the export", out, size),
            out.open("wb") as stream,
        ):
            torch.save({"state_dict": content, "meta": {FILE_MARK: file_format}}, stream)
        return len(content)
    out.mkdir(parents=True)
    if file_format == "hf-sa2va":
        text = json.dumps(chat_config(config, len(tokenizer)), indent=2)
        (out / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(out)
    return write_shards(exported, out, max_shard_bytes)


def check_target(out: Path, file_format: str, merge_lora: bool) -> None:
    """Raise CheckpointError for an unknown format and for combinations that cannot be."""
    if file_format not in FORMATS:
        raise CheckpointError(explain("unknown export format", seen=file_format, expected=", ".join(FORMATS)))
    if out.suffix in FILE_SUFFIXES and not file_format.startswith("original"):
        raise CheckpointError(explain(f"{file_format} is a folder, not a file", str(out), fix="give a folder's name"))
    if merge_lora and file_format in ("original-trimmed", "adapter"):
        what, fix = "LoRA cannot be merged there", "use --format original"
        raise CheckpointError(explain(what, file_format, expected="adapters kept", fix=fix))


def merged(state: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the native tensors with ``W + scale * B A`` in place of base and adapters, one at a time, in W's dtype.

    DoRA's magnitudes are the norms of its rows.
    """
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        down = state.get(name.replace(BASE, LORA_A)) if BASE in name else None
        if down is not None:
            up = state[name.replace(BASE, LORA_B)]
            whole = tensor.float() + scale * (up.float() @ down.float())
            magnitude = state.get(name.replace(BASE, ".lora_magnitude_vector.default."))
            if magnitude is not None:
                whole *= (magnitude.float() / whole.norm(dim=1))[:, None]
            tensor = whole.to(tensor.dtype)
        yield name, tensor


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> int:
    """Write ``model.safetensors``, or numbered shards with ``model.safetensors.index.json``; return the count.

    One shard is in memory at a time.
    """
    parts: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in progress_bar("exporting", "tensor", items=tensors):
        value = _own(tensor)
        if shard and size + value.nbytes > max_bytes:
            parts.append(_save(shard, folder / f"part-{len(parts)}"))
            shard, size = {}, 0
        shard[name] = value
        size, total = size + value.nbytes, total + value.nbytes
    parts.append(_save(shard, folder / f"part-{len(parts)}"))
    if len(parts) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return len(parts[0])
    weight_map = {}
    for number, keys in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(keys, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(weight_map)


def collect_video(paths: Sequence[str | Path], native: bool = False) -> dict[str, Tensor]:
    """Return the video-memory tensors of the sources by canonical name; the last source that has one wins.

    With ``native`` by the names of transformers' Sam2VideoModel, also those of its own files.

    Raises:
        CheckpointError: a source cannot be read.
    """
    found: dict[str, Tensor] = {}
    for part in (part for path in paths for _, part in open_parts(path)):
        layout = detect_layout(part.tensors)
        if layout is None:
            continue
        if native:
            wanted = {name: target for name in part.tensors if (target := memory_name(name, layout))}
        else:
            dropped = [name for name in part.tensors if (place(name, layout) or ([], ""))[1] == VIDEO]
            # Native video classes have other names, and no rule leads back from them.
            wanted = {name: full for name in dropped if (full := canonical_name(name, layout)).startswith(SAM)}
        for name, tensor in part.read() if wanted else ():
            if name in wanted:
                found[wanted[name]] = tensor.clone()
    return found


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _own(tensor: Tensor) -> Tensor:
    """Return a copy in memory of its own: views of one storage would be refused, or write all of it."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _save(tensors: dict[str, Tensor], path: Path) -> list[str]:
    with writing_tensors("the export", path, sum(tensor.nbytes for tensor in tensors.values())):
        save_file(tensors, path, {"format": "pt"})
    return list(tensors)


def _write_native(
    model: Sa2VA,
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_bytes: int,
) -> int:
    """Write two transformers folders; built from ``state_dict()`` because ``save_pretrained`` would drop the base."""
    state = {name.replace(BASE, "."): tensor for name, tensor in tensors}
    count = 0
    parts = (("mllm", "mllm.", model.mllm), ("sam2", "grounding_encoder.", model.grounding_encoder))
    for folder, prefix, part in parts:
        (out / folder).mkdir(parents=True)
        part.config.save_pretrained(out / folder)
        own = ((name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix))
        count += write_shards(own, out / folder, max_shard_bytes)
    for target in (out, out / "mllm"):
        tokenizer.save_pretrained(target)
    rest = {name: _own(tensor) for name, tensor in state.items() if not name.startswith(tuple(p[1] for p in parts))}
    return count + len(_save(rest, out / "text_hidden_fcs.safetensors"))


def _write_adapter(model: Sa2VA, state: Mapping[str, Tensor], out: Path, config: Config) -> int:
    settings = config.model
    base = config.train.pretrained_pth or config.train.model_path or settings.name
    name, _, commit = (hub_name(base) or "").partition("@")
    lora = lora_config(
        settings,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name or base,
        revision=commit or None,
    )
    lora.save_pretrained(str(out))
    adapters = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            key = name.removeprefix(LANGUAGE).replace(".default.", ".").replace("_vector.weight", "_vector")
            adapters[f"{PEFT_WRAPPER}model.{key}"] = _own(tensor)
    # Rows of the vocabulary tables are needed only where they trained.
    tables_train = model.new_token_rows is not None or model.mllm.lm_head.weight.requires_grad
    left_out = (".lora_",) if tables_train else (".lora_", *TABLES)
    kept = ((name, tensor) for name, tensor in state.items() if not any(part in name for part in left_out))
    rest = {name: _own(tensor) for name, tensor in iterate_export(kept, ORIGINAL)}
    return len(_save(adapters, out / "adapter_model.safetensors")) + len(_save(rest, out / ADAPTER_EXTRA))


def chat_config(config: Config, vocab_size: int) -> dict[str, object]:
    """Return the released chat folder's ``config.json``: what its ``configuration_sa2va_chat.py`` reads.

    The classes named in ``auto_map`` are files of the release's own folder and are not written here.
    """
    model, text, vision = config.model, dict(config.model.text), config.model.vision
    # Sizes of an image and a patch are a number or one for each side.
    sizes = (vision[key] for key in ("image_size", "patch_size"))
    side, patch = (size[0] if isinstance(size, (list, tuple)) else size for size in sizes)
    rope = text.pop("rope_parameters", {"rope_theta": text.pop("rope_theta", 10000.0)})
    is_tied = bool(text.pop("tie_word_embeddings", False))
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        "model_type": "sa2va_chat",
        "architectures": ["Sa2VAChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_sa2va_chat.Sa2VAChatConfig",
            "AutoModel": "modeling_sa2va_chat.Sa2VAChatModel",
            "AutoModelForCausalLM": "modeling_sa2va_chat.Sa2VAChatModel",
        },
        "template": model.template,
        "downsample_ratio": model.downsample_ratio,
        "force_image_size": side,
        "ps_version": "v2",
        "select_layer": -1,
        "dynamic_image_size": config.data.max_tiles > 1,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": max(config.data.max_tiles, 1),
        "use_thumbnail": True,
        "tie_word_embeddings": is_tied,
        "torch_dtype": model.dtype,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **{key: vision[key] for key in kept},
            "image_size": side,
            "patch_size": patch,
            "qkv_bias": True,
            "qk_normalization": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
            "hidden_act": vision.get("hidden_act", "gelu"),
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "tie_word_embeddings": is_tied,
            **text,
            "rope_theta": rope["rope_theta"],
            "vocab_size": vocab_size,
        },
    }

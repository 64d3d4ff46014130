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

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from dual_loop.checkpoint.hf_config import chat_config
from dual_loop.checkpoint.key_rules import (
    HF_SA2VA,
    ORIGINAL,
    SAM,
    VIDEO,
    Layout,
    canonical_name,
    detect_layout,
    file_name,
    iterate_export,
    place,
)
from dual_loop.checkpoint.sources import ADAPTER_EXTRA, is_zero_folder, open_checkpoint, split_parts
from dual_loop.config import Config
from dual_loop.errors import CheckpointError, explain
from dual_loop.model.adapters import LORA_TARGETS

FORMATS = ("original", "original-trimmed", "hf-native", "hf-sa2va", "adapter")
MERGED = ("hf-native", "hf-sa2va")
"""Formats without adapters: LoRA is always merged."""
FILE_SUFFIXES = (".pth", ".pt", ".bin")
TRIMMED_ORDER = (".lora_", "mllm.model.multi_modal_projector.", "grounding_encoder.mask_decoder.", "text_hidden_fcs.",
                 "mllm.lm_head.", "mllm.model.language_model.embed_tokens.")  # fmt: skip
"""What Sa2VA's trimmed state dict holds, in its order."""
BASE, LORA_A, LORA_B = ".base_layer.", ".lora_A.default.", ".lora_B.default."
PEFT_WRAPPER = "base_model.model."


def export_weights(
    model: nn.Module,
    out: Path,
    file_format: str,
    config: Config,
    tokenizer: Any,
    *,
    video: Mapping[str, Tensor] | None = None,
    merge_lora: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> int:
    """Write ``model`` to ``out`` and return the number of tensors written.

    Args:
        model: ``VideoLLaVASAMModel``; rows of new tokens are written into its tables first.
        out: a file (``.pth``, ``.pt``, ``.bin``; the two original formats only) or a folder that does not exist.
        file_format: one of :data:`FORMATS`.
        config, tokenizer: of the model.
        video: video-memory tensors by canonical name, added to ``original`` and ``hf-sa2va``.
        merge_lora: fold LoRA into its base for ``original`` (always so for ``hf-*``), computed in float32.
        dtype: cast floating tensors; None keeps each as the model holds it.
        max_shard_bytes: size at which a new shard begins.

    Raises:
        CheckpointError: the format and the path or the options do not fit.
    """
    check_target(out, file_format, merge_lora)
    cast(Any, model).sync_new_tokens()
    merging = merge_lora or file_format in MERGED
    scale = config.model.lora_alpha / config.model.lora_r
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("new_token_rows.")}
    if file_format == "adapter":
        return _write_adapter(model, state, out, config, dtype)
    if file_format == "hf-native":
        return _write_native(model, merged(state, scale), out, tokenizer, dtype, max_shard_bytes)
    if file_format == "original-trimmed":
        state = trimmed(state)
    layout = HF_SA2VA if file_format == "hf-sa2va" else ORIGINAL
    tensors = _without_adapters(merged(state, scale), layout) if merging else iterate_export(state.items(), layout)
    extra = {} if file_format == "original-trimmed" else (video or {})
    tensors = _cast(_chain(tensors, ((file_name(name, layout), value) for name, value in extra.items())), dtype)
    if out.suffix in FILE_SUFFIXES:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        torch.save({"state_dict": content, "meta": {}}, out)
        return len(content)
    out.mkdir(parents=True)
    if file_format == "hf-sa2va":
        text = json.dumps(chat_config(config, len(tokenizer)), indent=2)
        (out / "config.json").write_text(text, encoding="utf-8")
        tokenizer.save_pretrained(out)
    return write_shards(tensors, out, max_shard_bytes)


def check_target(out: Path, file_format: str, merge_lora: bool) -> None:
    """Refuse an unknown format and combinations that cannot be.

    Raises:
        CheckpointError: as said.
    """
    if file_format not in FORMATS:
        raise CheckpointError(explain("unknown export format", seen=file_format, expected=", ".join(FORMATS)))
    if out.suffix in FILE_SUFFIXES and not file_format.startswith("original"):
        raise CheckpointError(explain(f"{file_format} is a folder, not a file", str(out), fix="give a folder's name"))
    if merge_lora and file_format in ("original-trimmed", "adapter"):
        raise CheckpointError(
            explain("LoRA cannot be merged there", file_format, expected="adapters kept", fix="use --format original")
        )


def trimmed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the native tensors of Sa2VA's trimmed state dict, in its order."""
    return {name: state[name] for part in TRIMMED_ORDER for name in state if part in name}


def merged(state: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield the native tensors with ``W + scale * B A`` in place of base and adapters, one at a time, in W's dtype."""
    for name, tensor in state.items():
        if LORA_A in name or LORA_B in name:
            continue
        down = state.get(name.replace(BASE, LORA_A)) if BASE in name else None
        if down is None or not name.endswith(".weight"):
            yield name, tensor
            continue
        up = state[name.replace(BASE, LORA_B)]
        yield name, (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> int:
    """Write ``model.safetensors``, or numbered shards with ``model.safetensors.index.json``; return the count."""
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = total = 0
    for name, tensor in tensors:
        # Views of one storage would be refused, and a shard must not hold more than its own part of it.
        value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        if shard and size + value.nbytes > max_bytes:
            names.append(_write_shard(shard, folder, len(names)))
            shard, size = {}, 0
        shard[name] = value
        size, total = size + value.nbytes, total + value.nbytes
    names.append(_write_shard(shard, folder, len(names)))
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return len(names[0])
    weight_map = {}
    for number, keys in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(keys, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return len(weight_map)


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, folder / f"part-{number}", {"format": "pt"})
    return list(shard)


def collect_video(paths: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the video-memory tensors of the sources by canonical name; the last source that has one wins.

    Raises:
        CheckpointError: a source cannot be read.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        for _, part in split_parts(path):
            if is_zero_folder(part):
                continue
            checkpoint = open_checkpoint(part)
            layout = detect_layout(checkpoint.tensors)
            if layout is None:
                continue
            wanted = {name for name in checkpoint.tensors if (place(name, layout) or ([], ""))[1] == VIDEO}
            for file in checkpoint.files if wanted else ():
                for name, tensor in checkpoint.read(file):
                    canonical = canonical_name(name, layout)
                    # Native video classes have other names, and no rule leads back from them.
                    if name in wanted and canonical.startswith(SAM):
                        found[canonical] = tensor.clone()
    return found


def _without_adapters(state: Iterable[tuple[str, Tensor]], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Name merged tensors as a model that never had adapters does."""
    for name, tensor in iterate_export(state, layout):
        yield name.replace(PEFT_WRAPPER, "").replace(BASE, "."), tensor


def _cast(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _chain(*parts: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        yield from part


def _write_native(
    model: nn.Module,
    state: Iterable[tuple[str, Tensor]],
    out: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> int:
    """Write two transformers folders; built from ``state_dict()`` because ``save_pretrained`` would drop the base."""
    whole = cast(Any, model)
    groups: dict[str, list[tuple[str, Tensor]]] = {"mllm.": [], "grounding_encoder.": [], "text_hidden_fcs.": []}
    for name, tensor in _cast(state, dtype):
        prefix = next(prefix for prefix in groups if name.startswith(prefix))
        groups[prefix].append((name.removeprefix(prefix).replace(BASE, "."), tensor))
    count = 0
    for folder, prefix, part in (
        ("mllm", "mllm.", whole.mllm),
        ("sam2", "grounding_encoder.", whole.grounding_encoder),
    ):
        (out / folder).mkdir(parents=True)
        part.config.save_pretrained(out / folder)
        count += write_shards(groups[prefix], out / folder, max_shard_bytes)
    fcs = {f"text_hidden_fcs.{name}": tensor.detach().cpu().clone() for name, tensor in groups["text_hidden_fcs."]}
    save_file(fcs, out / "text_hidden_fcs.safetensors", {"format": "pt"})
    for target in (out, out / "mllm"):
        tokenizer.save_pretrained(target)
    return count + len(fcs)


def _write_adapter(
    model: nn.Module, state: Mapping[str, Tensor], out: Path, config: Config, dtype: torch.dtype | None
) -> int:
    out.mkdir(parents=True)
    settings = config.model
    options: dict[str, Any] = {"r": settings.lora_r, "lora_alpha": settings.lora_alpha}
    lora = LoraConfig(
        **options, lora_dropout=settings.lora_dropout, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )
    lora.save_pretrained(str(out))
    tensors = dict(_cast(trimmed(state).items(), dtype))
    adapters = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    beginning = "mllm.model.language_model."
    files: dict[str, Tensor] = {}
    for name, tensor in adapters.items():
        key = f"{PEFT_WRAPPER}model.{name.removeprefix(beginning).replace('.default.', '.')}"
        files[key] = tensor.detach().cpu().clone()
    save_file(files, out / "adapter_model.safetensors", {"format": "pt"})
    tables = _tables_train(model)
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in adapters and (tables or not name.startswith(TRIMMED_ORDER[-2:]))
    }
    other = {name: tensor.detach().cpu().clone() for name, tensor in iterate_export(rest.items(), ORIGINAL)}
    save_file(other, out / ADAPTER_EXTRA, {"format": "pt"})
    return len(files) + len(other)


def _tables_train(model: nn.Module) -> bool:
    """Tell whether rows of the vocabulary tables trained, so that an adapter needs them."""
    whole = cast(Any, model)
    return whole.new_token_rows is not None or bool(whole.mllm.lm_head.weight.requires_grad)

"""The model card of an export: ``README.md`` with the head that a hub reads, from the run folder alone.

What the run does not say is said to be unknown; no path of this machine gets into it, since cards are published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from dual_loop.config import SETTINGS, Config, hub_name
from dual_loop.config.load import PATHS
from dual_loop.errors import shorten
from dual_loop.evaluation.figures import markdown_table
from dual_loop.evaluation.report import FIGURE_NAMES, RunRecord, changed_settings, held_out_rows, interval
from dual_loop.model.build import TINY_WEIGHTS

QWEN_3B = (2048, 36)
"""Width and layers of Qwen2.5-3B, whose licence is its own; it is the language model of InternVL2.5-4B and Sa2VA-4B."""
LICENCE_3B = "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE"
WRITERS = {
    "sav": "none",
    "sa1b": "none",
    "openimages": "none (`class_captions` takes names of classes)",
    "refcoco": "by people",
    "masks": "by whoever made the folder; those of pseudo-labels by a model",
}
"""Who wrote the captions of a source."""


def model_card(
    run: RunRecord, config: Config, sources: Sequence[Path], trains: str, file_format: str, checkpoint: str
) -> str:
    """Return the card of what is exported from ``run``.

    Args:
        sources: what the weights started from, base first.
        trains: the table of ``trainable_table``.
        file_format: of the export; adapters and trimmed files lack what the run started from.
        checkpoint: which weights of which step are exported.
    """
    is_tiny, is_ours = config.model.tokenizer == "tiny", list(sources) == [TINY_WEIGHTS]
    names = [hub_name(path) for path in sources]
    is_3b = tuple(config.model.text.get(key) for key in ("hidden_size", "num_hidden_layers")) == QWEN_3B
    head = ModelCardData(
        license="apache-2.0" if is_ours else "other" if is_3b else "unknown",
        license_name="qwen-research" if is_3b else None,
        license_link=LICENCE_3B if is_3b else None,
        base_model=[name.partition("@")[0] for name in names if name] or None,
        base_model_relation=("adapter" if file_format == "adapter" else "finetune") if any(names) else None,
        pipeline_tag="image-text-to-text",
        library_name="transformers" if file_format == "hf-native" else "dual_loop",
        tags=["dual-loop", "sa2va", "sam2", "region-captioning", "referring-segmentation"],
    )
    base = [f"- {name}" if name else f"- `{path.name}`" for name, path in zip(names, sources, strict=True)]
    known = run.versions.get("weights") or [""] * len(base)
    base = [f"{line} ({about})" if about else line for line, about in zip(base, known, strict=False)]
    licence = "See the base's card for its licence, which holds for these weights as well."
    if is_ours:
        licence = "The tiny weights are those of the package, under its licence, Apache-2.0."
    elif is_3b:
        licence += (
            " The language model of this size,\nQwen2.5-3B-Instruct, is under Qwen's research licence, which allows no "
            f"commercial use: {LICENCE_3B}.\nThe cards of Sa2VA-4B and SAM 2 say Apache-2.0 of the rest."
        )
    ask = "--checkpoint THIS_FOLDER" + ("" if is_tiny else " --config PRESET")
    for name, path in zip(names, sources, strict=True):
        if file_format in ("adapter", "original-trimmed"):
            ask += f" --{'model_path' if path.is_dir() else 'sam2_path'} {name or path.name}"
    lines = [
        f"---\n{head.to_yaml()}\n---\n\n# {config.model.name}, trained with the dual loop\n",
        "A model that captions the region under a mask, and segments the region that a text describes (Sa2VA: InternVL",
        "and SAM 2), trained by dual_loop: mask to caption, caption to mask, and the loss between the two masks.",
        f"This is {checkpoint}, as `{file_format}`.",
        *_training(run, config, trains),
        *_data(run),
        *_figures(run),
        "\n## What it started from, and licences\n",
        *(base or ["Random weights."]),
        f"\n{licence} The licences of the data sets hold too.",
        "\n## How to load it\n",
        f"```bash\npip install dual-loop\ndual-loop caption IMAGE --box 10,10,50,50 {ask}",
        f"dual-loop segment IMAGE --text 'the left one' {ask}\n```",
        *([] if is_tiny else ["\n`PRESET` is one of the base's size: `sa2va_4b_24gb` for Sa2VA-4B."]),
        *_limits(run, config),
    ]
    return "\n".join(lines) + "\n"


def _training(run: RunRecord, config: Config, trains: str) -> Iterator[str]:
    summary, versions = run.summary, run.versions
    yield "\n## What was trained\n"
    if "lora" in config.model.trainable:
        yield f"LoRA of rank {config.model.lora_r}, alpha {config.model.lora_alpha}, on the language model.\n"
    yield f"```\n{trains}\n```\n"
    if summary:
        yield f"{summary['steps']:,} optimiser steps of {summary['effective_batch']} images,"
        device = versions.get("device", "an unknown device")
        yield f"{summary['seconds']:,.0f} s on {device} x {summary['world_size']}.\n"
    else:
        yield "The run has no summary: it did not end, or its files are gone.\n"
    changed = [
        (key, value, usual)
        for key, value, usual in changed_settings(run.config)
        if key in SETTINGS and key != "model.initial_weights" and not {*PATHS, "URL"} & {*SETTINGS[key].unit.split("|")}
    ]
    yield "| setting that is not the default | here | default |\n| --- | --- | --- |"
    yield from (f"| `{key}` | {_cell(value)} | {_cell(usual)} |" for key, value, usual in changed)
    packages = ", ".join(f"{name} {version}" for name, version in versions.get("packages", {}).items())
    yield f"\nCommit {versions.get('git_commit') or 'unknown'}; Python {versions.get('python', 'unknown')};"
    yield f"{packages or 'packages unknown'}."


def _cell(value: object) -> str:
    return shorten(value).replace("|", "\\|")


def _data(run: RunRecord) -> Iterator[str]:
    yield "\n## On what\n"
    yield "| data set | samples drawn | captions that the original has |\n| --- | --- | --- |"
    sources = run.summary.get("sources", {})
    yield from (f"| {name} | {count:,} | {WRITERS.get(name, 'unknown')} |" for name, count in sources.items())
    yield "\nIn the loop the model captions regions itself while it trains, and learns to segment what it wrote;"
    yield "captions of a data set, where it has some, are what it learns to write, and to segment too."


def _figures(run: RunRecord) -> Iterator[str]:
    yield "\n## Figures\n"
    rows, gains = list(held_out_rows([run])), run.summary.get("gain", {})
    if rows:
        yield "The run's own held-out set, per cent but for words; gains in points with 95 % intervals over images.\n"
        yield "| figure | before | after | gain |\n| --- | --- | --- | --- |"
    for key, *values in rows:
        yield f"| {FIGURE_NAMES[key]} | {' | '.join(values)} | {interval(gains[key]) if key in gains else '-'} |"
    yield from (f"\nFlag: {flag}" for flag in run.summary.get("flags", []))
    if not (rows or run.evaluation):
        yield "Nothing was measured on held-out data."
    if run.evaluation:
        figures = {Path(data).name: own for data, own in run.evaluation.get("figures", {}).items()}
        yield f"\nBy `dual-loop evaluate`:\n\n{markdown_table(figures)}"


def _limits(run: RunRecord, config: Config) -> Iterator[str]:
    yield "\n## Limits\n"
    if config.model.tokenizer == "tiny":
        yield "- The tiny model knows generated symbols only: what it says of a photograph means nothing."
    yield "- Captions are generated: they can be wrong, and a mask that comes back from one does not prove it right."
    yield "- It repeats what its data shows and leaves out, and the bias of its base; neither was measured."
    if str(run.versions.get("device")).startswith("cpu"):
        yield "- No figure here is from a GPU."
    if run.summary.get("after"):
        which = f"{config.train.eval_weights} weights at step {run.summary['steps']}"
        yield f"- The run measured its {which} on its own held-out set, which says nothing of other data."

"""Make the tiny checkpoint that ships in the package. Run it through ``scripts/pretrain_tiny.sh``.

Every stage draws its scenes from a pool of its own (``tiny/...``); the demo data that the loop trains and is measured
on comes from other pools, so none of its scenes was ever seen here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dual_loop.config import Config, load_config
from dual_loop.data.prepare import Geometry
from dual_loop.model.build import TINY_ASSETS, build_model, build_prompter, build_tokenizer, geometry
from dual_loop.testing.scenes import generate_scene, pool_seed

from tiny import stages
from tiny.scenes import ScenePool, scene_sample
from tiny.tokenizer import build as build_tokenizer_file

TABLES = ("_token", "mask_tokens", "no_memory", "no_mask_embed", "point_embed", "not_a_point_embed")


def initialise(model: nn.Module) -> None:
    """Fan-in initialisation everywhere: transformers' defaults are too small for models this narrow.

    Position embeddings start at zero there, which a model without pretraining hardly recovers from.
    """
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "position_embeddings" in name or "cls_token" in name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() < 2 or ".lora_" in name or "embed_tokens" in name:
            continue
        elif any(part in name for part in TABLES):
            nn.init.normal_(parameter, std=0.5)
        else:
            # Image features much larger than position encodings would hide from the decoder where a point is.
            gain = 0.2 if "neck.convs" in name else 0.7
            nn.init.normal_(parameter, std=gain / math.sqrt(parameter[0].numel()))

    for name, module in model.named_modules():
        if "_image" in name and hasattr(module, "q_proj"):
            match_positions(module)


def match_positions(attention: nn.Module) -> None:
    """Start an attention between prompts and image with equal query and key projections.

    Then a point attends to its own place from the first step, because position encodings of near places are alike.
    From independent projections a decoder as small as this one did not find that out in a thousand steps.
    """
    weight = attention.q_proj.weight
    nn.init.normal_(weight, std=1.5 / math.sqrt(weight.shape[1]))
    with torch.no_grad():
        attention.k_proj.weight.copy_(weight)


def base_config(config: Config) -> Config:
    """Everything trains in the recipe: the package's freeze policy is for what follows it."""
    groups = ("language_model", "mlp1", "mask_decoder", "text_hidden_fcs", "vision_tower", "sam2_encoder")
    model = dataclasses.replace(config.model, trainable=groups, train_embeddings="all")
    return dataclasses.replace(config, model=model)


def evaluate(model: Any, prompter: Any, config: Config, pool: str, count: int, seed: int) -> dict[str, float]:
    from dual_loop.evaluation.figures import summarise
    from dual_loop.evaluation.measure import RegionMeter

    samples = [scene_sample(generate_scene(pool_seed(seed, pool, i)), f"{pool}/{i}") for i in range(count)]
    return summarise(RegionMeter(model, prompter, config).measure(samples, pool))


PARTS = {"sam": "grounding_encoder.", "vision": "mllm.model.vision_tower."}


def stage(args: argparse.Namespace, name: str, model: Any, train: Any) -> None:
    """Run one stage, or read its result where an earlier run left it."""
    path = args.work_dir / f"{name}.safetensors"
    if not path.exists():
        started = time.time()
        model.train()
        train()
        part = PARTS.get(name, "")
        state = {k: v.clone().contiguous() for k, v in model.state_dict().items() if k.startswith(part)}
        save_file(state, path)
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    if unexpected or (name not in PARTS and missing):
        raise SystemExit(f"{path} does not fit (missing {missing[:3]}, unexpected {unexpected[:3]}): delete {path}")


def run_side_by_side(names: list[str]) -> None:
    """Stages 1 and 2 share nothing: one process and one thread each is faster than two threads in turn."""
    command = [sys.executable, *sys.argv, "--threads", "1", "--stage"]
    processes = [subprocess.Popen([*command, name]) for name in names]
    if any(process.wait() for process in processes):
        raise SystemExit("a stage failed; see above")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/tiny_cpu.py")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/pretrain_tiny"), help="stages are kept here")
    parser.add_argument("--out", type=Path, default=TINY_ASSETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=sorted(PARTS), help="run this stage alone and stop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encoder_scenes", type=int, default=6000, help="scenes for stages 1 and 2")
    parser.add_argument("--captioned_scenes", type=int, default=300, help="scenes with captions, stage 3")
    text = "stage 3 sees no object of one colour of each shape (UNNAMED_PAIRS of tiny/scenes.py)"
    parser.add_argument("--without_pairs", action="store_true", help=text)
    parser.add_argument("--sam_steps", type=int, default=1000)
    parser.add_argument("--vision_steps", type=int, default=4000)
    parser.add_argument("--caption_steps", type=int, default=400)
    parser.add_argument("--together_steps", type=int, default=600)
    parser.add_argument("--align_weight", type=float, default=4.0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        build_tokenizer_file(args.out / "tokenizer.json", args.seed)
    config = base_config(load_config(args.config))
    tokenizer = build_tokenizer(config.model)
    model: Any = build_model(config, tokenizer)
    initialise(model)
    for parameter in model.grounding_encoder.parameters():
        parameter.requires_grad_(True)
    prompter, sizes = build_prompter(config, tokenizer), geometry(config)
    if args.stage is None:
        run_side_by_side([name for name in PARTS if not (args.work_dir / f"{name}.safetensors").exists()])
    train_parts(args, model, sizes)
    if args.stage is not None:
        return
    pairs = not args.without_pairs
    captioned = ScenePool.generate("tiny/captioned", args.captioned_scenes, args.seed, sizes, unnamed_pairs=pairs)
    print(f"captioned pool: {len(captioned)} scenes, {captioned.num_objects} objects", flush=True)
    build_frozen(model)
    common = (model, prompter, config.loop, config.loss, captioned)
    stage(
        *(args, "captions", model),
        lambda: stages.train_together(*common, args.caption_steps, 8, 1e-3, args.seed, align_weight=0, segment=False),
    )
    print("captions:", evaluate(model, prompter, config, "tiny/check", 60, args.seed), flush=True)
    stage(
        *(args, "together", model),
        lambda: stages.train_together(
            *(*common, args.together_steps, 8, 1e-3, args.seed), align_weight=args.align_weight, segment=True
        ),
    )
    figures = evaluate(model, prompter, config, "tiny/check", 240, args.seed)
    print("together:", figures, flush=True)
    # Half precision halves the package; LoRA starts fresh in every run, so it is left out.
    state = {k: v.half().clone().contiguous() for k, v in model.state_dict().items() if ".lora_" not in k}
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt", "source": "scripts/pretrain_tiny.sh"})
    arguments = {k: str(v) for k, v in vars(args).items() if k not in ("work_dir", "out")}
    record = {"arguments": arguments, "held_out": figures}
    (args.out / "recipe.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def train_parts(args: argparse.Namespace, model: Any, sizes: Geometry) -> None:
    """Stages 1 and 2: train the one that ``--stage`` names, or read both."""
    names = list(PARTS) if args.stage is None else [args.stage]
    pool = ScenePool.generate("tiny/encoders", args.encoder_scenes if args.stage else 0, args.seed, sizes)
    print(f"encoder pool: {len(pool)} scenes, {pool.num_objects} objects", flush=True)
    trainers = {
        "sam": lambda: stages.train_sam(model, pool, args.sam_steps, 8, 5e-4, args.seed),
        "vision": lambda: stages.train_vision(model, pool, args.vision_steps, 16, 1e-3, args.seed),
    }
    for name in names:
        stage(args, name, model, trainers[name])


def build_frozen(model: Any) -> None:
    """Freeze the vision tower, and what the mask losses of stage 3 never reach.

    A tower that goes on training forgets on a few hundred scenes what it learned from thousands.
    """
    from dual_loop.model.adapters import without_mask_gradient

    skip = without_mask_gradient(single_mask=False)
    for name, parameter in model.named_parameters():
        frozen = (*skip, ".lora_", "prompt_encoder", "shared_image", "vision_tower")
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)


if __name__ == "__main__":
    main()

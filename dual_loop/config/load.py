"""Files, ``--cfg-options`` and flags in, frozen dataclasses out; all of it made from ``config.schema``.

mmengine's ``Config`` keeps misspelt keys without a word, so everything it reads passes through the dataclasses. All
problems are reported at once, each with the nearest valid word. Values of flags stay text until then, so that a wrong
flag and a wrong key in a file are reported in one message.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import logging
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from dual_loop.config.derived import has_held_out, precision
from dual_loop.config.hub import in_cache
from dual_loop.config.retired import REMOVED, RENAMED
from dual_loop.config.schema import MOST, SETTINGS, Config
from dual_loop.config.setting import Setting
from dual_loop.config.words import HUB
from dual_loop.errors import ConfigError, did_you_mean, explain, shorten

DEFAULT_CONFIG = "tiny_cpu"
PACKAGE = Path(__file__).resolve().parent.parent
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""The presets: inside an installed package, beside the package in a checkout."""

BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
"""How a switch may be written."""

ORDERED = (
    *(("data", "sav_min_seconds", "sav_max_seconds"), ("data", "sa1b_min_area", "sa1b_max_area")),
    *(("data", "masks_min_area", "masks_max_area"), ("reward", "min_words", "max_words")),
)
"""Group, least and most of what a setting bounds on either side."""
PATHS = ("DIR", "FILE", "PATH")
"""Units of the settings that name a file or a folder."""
TRUST_VARIABLE = "DUAL_LOOP_TRUST_DEEPSPEED_PICKLES"
"""Set by ``--trust_deepspeed_pickles``, for this process and those that it starts. It is no setting, so that no file
can ask for it."""

Tree = dict[str, Any]
logger = logging.getLogger(__name__)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a config file, apply ``overrides`` (``{"train.seed": 1}``) and return the typed configuration.

    Args:
        path: an mmengine Python config, which is run, or the ``config.json`` of a run, which is only read; None takes
            the defaults.
        overrides: dotted keys to values; they win over the file.

    Raises:
        ConfigError: the file cannot be read, or any key or value is wrong; the message lists every problem.
    """
    origin = str(path or "(defaults and flags)")
    tree = _read_tree(Path(path)) if path is not None else {}
    if path is not None and Path(path).suffix == ".json":
        _follow_paths(tree, Path(path).with_name("versions.json"))
    notes: list[str] = []
    for key, value in [*_take_old(tree), *(overrides or {}).items()]:
        old = next((old for old in (*RENAMED, *REMOVED) if f"{key}.".startswith(f"{old}.")), "")
        if old in REMOVED:
            notes.append(f"{old} is gone and ignored ({REMOVED[old]})")
            continue
        if old:
            notes.append(f"{old} is now {f'--{SETTINGS[RENAMED[old]].flag}' if old.startswith('--') else RENAMED[old]}")
        _set_dotted(tree, RENAMED.get(old, "") + key[len(old) :], value)
    if notes:
        logger.warning("old settings in %s: %s", origin, "; ".join(dict.fromkeys(notes)))
    for key in (key for key, about in SETTINGS.items() if about.unit.endswith(HUB)):
        group, _, name = key.partition(".")
        holder = tree.get(group)
        if isinstance(holder, Mapping) and isinstance(holder.get(name), (str, Path)):
            tree[group] = {**holder, name: in_cache(str(holder[name]))}
    problems: list[str] = []
    config: Config = _build(Config, tree, "", problems)
    # What is of a wrong type has its default here, which keeps every limit.
    problems = [*problems, *_broken_limits(config)] or list(_contradictions(config))
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the configuration {origin}:\n{listing}")
    return config


def resolve_config_path(name: str) -> Path:
    """Return the config file called ``name``: a path as given, or the name of a preset."""
    for candidate in (Path(name), CONFIG_DIR / name, CONFIG_DIR / f"{name}.py", CONFIG_DIR.parent / name):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in CONFIG_DIR.glob("*.py") if path.stem != "__init__")
    fix = did_you_mean(Path(name).stem, known).removeprefix("; ") or "check the path given to --config"
    raise ConfigError(explain("config file not found", name, expected=f"one of {', '.join(known)} or a path", fix=fix))


def _read_tree(path: Path) -> Tree:
    """Read a JSON file as data, and everything else by mmengine, which runs Python files."""
    try:
        if path.suffix == ".json":
            tree = json.loads(path.read_text(encoding="utf-8"))
        else:
            from mmengine.config import Config as PythonConfig

            tree = PythonConfig.fromfile(str(path), import_custom_modules=False).to_dict()
    except Exception as error:  # mmengine raises many types, from SyntaxError to its own
        raise ConfigError(explain("config file cannot be read", str(path), error, fix="mend the file")) from error
    if not isinstance(tree, dict):
        expected = "an object of groups, as in the config.json of a run"
        raise ConfigError(explain("not a configuration", str(path), type(tree).__name__, expected))
    return tree


def _follow_paths(tree: Tree, versions: Path) -> None:
    """Look where the run was started for the relative paths of its settings that lead to nothing from here."""
    try:
        started_in = Path(json.loads(versions.read_text(encoding="utf-8"))["started_in"])
    except (OSError, ValueError, KeyError, TypeError):  # no run, or one of before this was written
        return
    for key, about in SETTINGS.items():
        group, _, name = key.partition(".")
        holder = tree.get(group)
        if about.unit.partition("|")[0] not in PATHS or not isinstance(holder, dict):
            continue
        path = holder.get(name)
        if isinstance(path, str) and not os.path.exists(path) and os.path.exists(started_in / path):
            holder[name] = str(started_in / path)


def _take_old(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Take the old keys out of a file's tree, with their values."""
    for old in (*RENAMED, *REMOVED):
        group, _, name = old.partition(".")
        holder = tree.get(group)
        if isinstance(holder, dict) and name in holder:
            yield old, holder.pop(name)
            if not holder:
                del tree[group]


def _set_dotted(tree: Tree, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(explain("override goes below a value", dotted, tree, expected="a group of settings"))
    tree[leaf] = value


def _build(cls: Any, tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make dataclass ``cls`` from ``tree``; collect every problem instead of stopping at the first."""
    hints = typing.get_type_hints(cls)
    values: Tree = {}
    for key, raw in tree.items():
        hint = hints.get(key)
        if hint is None:
            near = did_you_mean(str(key), [*(prefix + name for name in hints), *SETTINGS])
            problems.append(f"unknown key {prefix + str(key)!r}{near}")
        elif is_dataclass(hint) and isinstance(raw, Mapping):
            values[key] = _build(hint, raw, f"{prefix}{key}.", problems)
        elif is_dataclass(hint):
            problems.append(f"{prefix}{key}: seen {shorten(raw)}, expected a group of settings")
        else:
            try:
                values[key] = _convert(raw, hint)
            except (TypeError, ValueError, OverflowError):
                expected = hint.__name__ if isinstance(hint, type) else str(hint)
                problems.append(f"{prefix}{key}: seen {shorten(raw)}, expected {expected}")
    return cls(**values)


def _convert(raw: Any, hint: Any) -> Any:
    """Convert ``raw`` to type ``hint`` where nothing is lost; raise TypeError or ValueError otherwise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        is_none = raw is None or (isinstance(raw, str) and raw.lower() == "none")
        return None if is_none else _convert(raw, next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        if isinstance(raw, (bytes, Mapping)):
            raise TypeError(raw)
        items = [item.strip() for item in raw.split(",")] if isinstance(raw, str) else list(raw)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(raw)
        return tuple(_convert(item, args[0]) for item in items)
    if origin is not None and isinstance(raw, Mapping):
        return dict(raw)
    if hint is bool and isinstance(raw, str):
        raw = BOOLEANS.get(raw.lower())
    if isinstance(raw, bool):
        if hint is bool:
            return raw
    elif hint in (int, float) and isinstance(raw, (str, int, float)):
        value = hint(raw)
        if value == float(raw) or hint is float:
            return value
    elif hint is str and isinstance(raw, (str, Path, int)):
        if b"\0" in os.fsencode(str(raw)):  # which also refuses what no file name can hold
            raise ValueError(raw)
        return str(raw)
    raise TypeError(raw)


def _value(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _broken_limits(config: Config) -> Iterator[str]:
    for key, about in SETTINGS.items():
        value, low, high = _value(config, key), about.at_least, about.at_most
        if about.choices:
            words = value if isinstance(value, tuple) else () if value is None else (value,)
            for word in words:
                is_number = low is not None and word.isdecimal() and len(word) < 10 and int(word) >= low
                if word in about.choices or is_number:
                    continue
                expected = f"{'some' if isinstance(value, tuple) else 'one'} of {', '.join(about.choices)}"
                number = "" if low is None else f" or a number from {low:g} on"
                yield f"{key}: seen {shorten(value)}, expected {expected}{number}{did_you_mean(word, about.choices)}"
        elif isinstance(value, Mapping):
            for path in _not_finite(value, key):
                yield f"{path}: expected a finite number"
        elif low is not None and high is not None and value is not None:
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(low <= number <= high for number in numbers):
                expected = (
                    f"at least {low:g}"
                    if high == MOST and min(numbers) < low
                    else f"a number between {low:g} and {high:g}"
                )
                yield f"{key}: seen {shorten(value)}, expected {expected}"


def _not_finite(value: Any, key: str) -> Iterator[str]:
    """Yield the dotted key of each number in ``value`` that is infinite or no number."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield key


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what does not hold between settings."""
    loop, policy, reward = config.loop, config.policy, config.reward
    if loop.cycle_keep is not None and loop.cycle_keep <= loop.cycle_drop:
        seen = f"{loop.cycle_keep} and {loop.cycle_drop}"
        yield f"loop.cycle_keep and loop.cycle_drop: seen {seen}, expected keep above drop"
    for group, low, high in ORDERED:
        least, most = (getattr(getattr(config, group), name) for name in (low, high))
        if least > most:
            yield f"{group}.{low} and {group}.{high}: seen {least} and {most}, expected the second no smaller"
    rewards = [f"reward.{n}_weight" for n in ("contrast", "caption", "length") if getattr(reward, f"{n}_weight") > 0]
    if rewards and policy.caption_gradient in ("none", "gumbel"):
        nobody = f"nobody learns from it with {policy.caption_gradient}"
        yield f"{', '.join(rewards)}: {nobody}; expected policy.caption_gradient auto, scst, grpo or gumbel+.."
    only_contrast = rewards == ["reward.contrast_weight"] and not reward.cycle_weight
    if only_contrast and config.data.regions_per_image < 2:
        yield "reward.contrast_weight: the only reward, and data.regions_per_image is 1; expected 2 or more to compare"
    train = config.train
    if train.parallel == "fsdp" and precision(config) == "fp16":
        yield "train.parallel: seen fsdp with fp16, whose loss scale knows no shards; expected ddp, or bf16"
    packed = [f"model.quantize {config.model.quantize}"] if config.model.quantize != "none" else []
    packed += [f"train.optimizer {train.optimizer}"] if train.optimizer != "adamw" else []
    if packed and train.parallel == "fsdp":
        yield f"train.parallel: seen fsdp with {' and '.join(packed)}, which cannot be sharded; expected ddp"
    if config.model.quantize != "none" and "language_model" in config.model.trainable:
        yield "model.trainable: seen language_model, whose matrices model.quantize packs and freezes; expected one"
    if (train.eval_strategy != "ends" or train.eval_interval or train.keep_best) and not has_held_out(config):
        needed = "data.eval_dir, data.eval_masks_dir or data.val_fraction"
        yield f"train.eval_strategy, eval_interval, keep_best: nothing to evaluate; expected {needed}"
    if config.data.val_fraction and (config.data.masks_dir is None or config.data.eval_masks_dir is not None):
        yield "data.val_fraction: holds out images of data.masks_dir; expected that, and no data.eval_masks_dir"
    if train.keep_best and train.eval_strategy == "ends" and train.eval_interval is None:
        yield "train.keep_best: one evaluation is no choice; expected train.eval_interval, or train.eval_strategy epoch"
    if train.patience and not train.keep_best:
        yield "train.patience: counts evaluations that are no better; expected train.keep_best, by which figure"
    if policy.caption_gradient.endswith("grpo") and policy.captions_per_region < 2:
        yield "policy.captions_per_region: seen 1, expected at least 2 with grpo: a group of one has no rest"


def add_training_flags(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """Add ``--config``, ``--cfg-options``, ``--dry_run`` and a flag for every setting that has one, in groups.

    Where ``argv``, which will be parsed, asks for ``--help``, the values shown are those of the ``--config`` in it.
    """
    text = "the name of a preset, the config.json of a run, which is only read, or a Python config, which is RUN: give "
    text += "none that you do not trust; --help shows its values as defaults (default: %(default)s)"
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE|NAME", help=text)
    text = "build without memory, print what trains, the memory estimate and the effective batch, and stop"
    parser.add_argument("--dry_run", action="store_true", help=text)
    add_trust_flag(parser)
    config = Config()
    if {"-h", "--help"} & set(argv):
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--config", default=DEFAULT_CONFIG)
        try:
            config = load_config(resolve_config_path(chosen.parse_known_args(argv)[0].config))
        except ConfigError as error:
            parser.error(str(error))
    _add_flags(parser, SETTINGS, config)


class _Trust(argparse.Action):
    def __call__(self, *_: object) -> None:
        os.environ[TRUST_VARIABLE] = "1"


def add_trust_flag(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust_deepspeed_pickles``."""
    text = "read DeepSpeed folders, whose pickles can run any code (default: refuse, and say how to convert them)"
    parser.add_argument("--trust_deepspeed_pickles", nargs=0, action=_Trust, default=argparse.SUPPRESS, help=text)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add training's flags of data and ``--cfg-options``, for commands that read the same data."""
    _add_flags(parser, {key: about for key, about in SETTINGS.items() if key.startswith("data.")})


def _add_flags(parser: argparse.ArgumentParser, settings: Mapping[str, Setting], config: Config | None = None) -> None:
    """Add the flags of ``settings``, with the values of ``config`` as defaults in ``--help``."""
    text = "any setting by its dotted key, e.g. model.gradient_checkpointing=True (flags win over these)"
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help=text)
    groups = {about.title: parser.add_argument_group(about.title) for about in settings.values() if about.flag}
    for key, about in settings.items():
        if about.flag:
            text, unit = about.doc, about.unit or "|".join(about.choices)
            if config is not None:
                value = _value(config, key)
                if isinstance(value, bool):
                    value = "on" if value else "off"
                shown = ",".join(value) if isinstance(value, tuple) else "none" if value is None else value
                text += f" (default: {shown})"
            groups[about.title].add_argument(f"--{about.flag}", metavar=unit, help=text.replace("%", "%%"))
    for old in (*RENAMED, *REMOVED):
        if old.startswith("--"):
            parser.add_argument(old, dest=old, help=argparse.SUPPRESS)


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return dotted keys to values from parsed flags; a flag wins over ``--cfg-options``.

    Of ``--cfg-options``, what the dataclasses convert stays text; where they hold free mappings, or a literal is given,
    it is read.

    Raises:
        ConfigError: options without ``=`` or without a group, all of them named.
    """
    options = getattr(args, "cfg_options", ())  # not every command has them
    wrong = [option for option in options if "." not in option.partition("=")[0] or "=" not in option]
    if wrong:
        raise ConfigError(explain("malformed option", "--cfg-options", ", ".join(wrong), "group.key=value"))
    values: Tree = {}
    for option in options:
        key, _, text = (part.strip() for part in option.partition("="))
        values[key] = text
        if key.count(".") > 1 or text.startswith(("{", "[", "(")):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                values[key] = ast.literal_eval(text)
    names = {key: about.flag for key, about in SETTINGS.items()} | {old: old for old in (*RENAMED, *REMOVED)}
    # Commands offer a part of the flags.
    given = {key: getattr(args, name, None) for key, name in names.items()}
    return values | {key: value for key, value in given.items() if value is not None}

"""Files, ``--cfg-options`` and flags in, frozen dataclasses out; all of it made from ``config.schema``.

mmengine's ``Config`` keeps misspelt keys without a word, so everything it reads passes through the dataclasses. All
problems are reported at once, each with the nearest valid word. Values of flags stay text until then, so that a wrong
flag and a wrong key in a file are reported in one message.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import logging
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from dual_loop.config.schema import REMOVED, RENAMED, SETTINGS, Config, Setting
from dual_loop.errors import ConfigError, explain

DEFAULT_CONFIG = "tiny_cpu"
PACKAGE = Path(__file__).resolve().parent.parent
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
"""The presets: inside an installed package, beside the package in a checkout."""

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
    notes = list(_move_old_keys(tree))
    for key, value in (overrides or {}).items():
        old = next((old for old in (*RENAMED, *REMOVED) if key == old or key.startswith(f"{old}.")), None)
        if old is not None:
            notes.append(_note(old))
        if old not in REMOVED:
            _set_dotted(tree, key if old is None else RENAMED[old] + key[len(old) :], value)
    if notes:
        logger.warning("old settings in %s: %s", origin, "; ".join(dict.fromkeys(notes)))
    problems: list[str] = []
    config = typing.cast(Config, _build(Config, tree, "", problems))
    if not problems:
        problems += _check(config)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problem(s) in the configuration {origin}:\n{listing}")
    return config


def resolve_config_path(name: str) -> Path:
    """Return the config file called ``name``: a path as given, or the name of a preset."""
    candidates = [Path(name), CONFIG_DIR / name, CONFIG_DIR / f"{name}.py", CONFIG_DIR.parent / name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in CONFIG_DIR.glob("*.py") if path.stem != "__init__")
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    fix = f"did you mean {close[0]}?" if close else "check the path given to --config"
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
        seen = f"{type(error).__name__}: {error}"
        raise ConfigError(explain("config file cannot be read", str(path), seen, fix="mend the file")) from error
    if not isinstance(tree, dict):
        expected = "an object of groups, as in the config.json of a run"
        raise ConfigError(explain("not a configuration", str(path), type(tree).__name__, expected))
    return tree


def _note(old: str) -> str:
    if old in REMOVED:
        return f"{old} is gone and ignored ({REMOVED[old]})"
    return f"{old} is now {f'--{SETTINGS[RENAMED[old]].flag}' if old.startswith('--') else RENAMED[old]}"


def _move_old_keys(tree: Tree) -> Iterator[str]:
    """Take the old keys out of a file's tree, put renamed ones where they belong, and yield a note about each."""
    for old in (*RENAMED, *REMOVED):
        group, _, name = old.partition(".")
        holder = tree.get(group)
        if not isinstance(holder, dict) or name not in holder:
            continue
        value = holder.pop(name)
        if not holder:
            tree.pop(group)
        if old in RENAMED:
            new_group, _, new_name = RENAMED[old].partition(".")
            target = tree.setdefault(new_group, {})
            if isinstance(target, dict):
                target.setdefault(new_name, value)
        yield _note(old)


def _set_dotted(tree: Tree, dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(explain("override goes below a value", dotted, child, expected="a group of settings"))
        node = child
    node[leaf] = value


def _build(cls: type[Any], tree: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """Make dataclass ``cls`` from ``tree``; collect every problem instead of stopping at the first."""
    hints = typing.get_type_hints(cls)
    values: Tree = {}
    for key, raw in tree.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(key, list(hints), n=1)
            problems.append(f"unknown key {dotted!r}" + (f"; did you mean {prefix}{close[0]}?" if close else ""))
        elif is_dataclass(hints[key]):
            if isinstance(raw, Mapping):
                values[key] = _build(typing.cast(type[Any], hints[key]), raw, f"{dotted}.", problems)
            else:
                problems.append(f"{dotted}: seen {raw!r}, expected a group of settings")
        else:
            try:
                values[key] = _convert(raw, hints[key])
            except (TypeError, ValueError, OverflowError):
                expected = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key])
                problems.append(f"{dotted}: seen {raw!r}, expected {expected}")
    return cls(**values)


def _convert(raw: Any, hint: Any) -> Any:
    """Convert ``raw`` to type ``hint`` where nothing is lost; raise TypeError or ValueError otherwise."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if raw is None or (isinstance(raw, str) and raw.lower() == "none"):
            return None
        return _convert(raw, next(a for a in typing.get_args(hint) if a is not type(None)))
    if origin is tuple:
        items = raw.split(",") if isinstance(raw, str) else list(raw)
        args = typing.get_args(hint)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(raw)
        return tuple(_convert(item.strip() if isinstance(item, str) else item, args[0]) for item in items)
    if origin is not None and isinstance(raw, Mapping):
        return dict(raw)
    if hint is bool and isinstance(raw, str):
        raw = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(raw.lower())
    if isinstance(raw, bool):
        if hint is bool:
            return raw
    elif hint in (int, float):
        value = hint(raw)
        if value == float(raw) or hint is float:
            return value
    elif hint is str and isinstance(raw, (str, Path, int)):
        return str(raw)
    raise TypeError(raw)


def _check(config: Config) -> Iterator[str]:
    for key, about in SETTINGS.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        expected = None if value is None else _broken_limit(value, about)
        if expected is not None:
            yield f"{key}: seen {value!r}, expected {expected}"
    for rule in RULES:
        problem = rule(config)
        if problem is not None:
            yield problem


def _broken_limit(value: Any, about: Setting) -> str | None:
    """Return what was expected where ``value`` breaks the limits of its setting, else None."""
    low, high, choices = about.at_least, about.at_most, about.choices
    if choices:
        for word in value if isinstance(value, tuple) else (value,):
            if word in choices or (low is not None and word.isdigit() and int(word) >= low):
                continue
            close = difflib.get_close_matches(word, choices, n=1)
            expected = f"{'some' if isinstance(value, tuple) else 'one'} of {', '.join(choices)}"
            number = "" if low is None else f" or a number from {low:g} on"
            return expected + number + (f"; did you mean {close[0]}?" if close else "")
    elif low is not None and not value >= low:
        return f"at least {low:g}" if high is None else f"a number between {low:g} and {high:g}"
    elif high is not None and not value <= high:
        return f"at most {high:g}" if low is None else f"a number between {low:g} and {high:g}"
    return None


def _cycle_limits(config: Config) -> str | None:
    keep, drop = config.loop.cycle_keep, config.loop.cycle_drop
    if keep is None or keep > drop:
        return None
    return f"loop.cycle_keep and loop.cycle_drop: seen {keep} and {drop}, expected keep above drop"


def _rewards_have_a_learner(config: Config) -> str | None:
    rewards = [n for n in ("contrast", "caption", "length") if getattr(config.reward, f"{n}_weight") > 0]
    estimator = config.policy.caption_gradient
    if not rewards or estimator not in ("none", "gumbel"):
        return None
    where = ", ".join(f"reward.{name}_weight" for name in rewards)
    expected = "policy.caption_gradient auto, scst, grpo or gumbel+.."
    return f"{where}: nobody learns from it with {estimator}; expected {expected}"


def _groups_have_a_rest(config: Config) -> str | None:
    if not config.policy.caption_gradient.endswith("grpo") or config.policy.captions_per_region > 1:
        return None
    return "policy.captions_per_region: seen 1, expected at least 2 with grpo: a group of one has no rest"


RULES: tuple[Callable[[Config], str | None], ...] = (_cycle_limits, _rewards_have_a_learner, _groups_have_a_rest)
"""What must hold between settings; each returns the problem, or None."""


def add_training_flags(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> None:
    """Add ``--config``, ``--cfg-options``, ``--dry_run`` and a flag for every setting that has one, in groups.

    Args:
        parser: gets the flags.
        argv: what will be parsed. Where it asks for ``--help``, the values shown are those of the ``--config`` in it.
    """
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        metavar="FILE|NAME",
        help="a Python config, the name of a preset, or the config.json of a run; --help shows its values as defaults "
        "(default: %(default)s)",
    )
    _add_cfg_options(parser, ", e.g. model.gradient_checkpointing=True")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="build without memory, print what trains, the memory estimate and the effective batch, and stop",
    )
    config = Config()
    if {"-h", "--help"} & set(argv):
        chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        chosen.add_argument("--config", default=DEFAULT_CONFIG)
        try:
            config = load_config(resolve_config_path(chosen.parse_known_args(argv)[0].config))
        except ConfigError as error:
            parser.error(str(error))
    groups = {about.title: parser.add_argument_group(about.title) for about in SETTINGS.values() if about.flag}
    for key, about in SETTINGS.items():
        if about.flag:
            group, name = key.split(".")
            value = getattr(getattr(config, group), name)
            shown = ",".join(value) if isinstance(value, tuple) else "none" if value is None else str(value)
            _add_flag(groups[about.title], about, f"{about.doc} (default: {shown})")
    _add_old_flags(parser)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add training's flags of data and ``--cfg-options``, for commands that read the same data."""
    group = parser.add_argument_group("data (the flags of training)")
    for key, about in SETTINGS.items():
        if about.flag and key.startswith("data."):
            _add_flag(group, about, about.doc)
    _add_cfg_options(group)
    _add_old_flags(parser)


def _add_cfg_options(parser: argparse._ActionsContainer, example: str = "") -> None:
    text = f"any setting by its dotted key{example} (flags win over these)"
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def _add_flag(group: argparse._ActionsContainer, about: Setting, text: str) -> None:
    unit = about.unit or "|".join(about.choices)
    group.add_argument(f"--{about.flag}", metavar=unit, help=text.replace("%", "%%"))


def _add_old_flags(parser: argparse.ArgumentParser) -> None:
    for old in (*RENAMED, *REMOVED):
        if old.startswith("--"):
            parser.add_argument(old, dest=old, help=argparse.SUPPRESS)


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return dotted keys to values from parsed flags; a flag wins over ``--cfg-options``.

    Raises:
        ConfigError: an entry of ``--cfg-options`` is not of the form key=value.
    """
    names = {key: about.flag for key, about in SETTINGS.items()} | {old: old for old in (*RENAMED, *REMOVED)}
    # Commands offer a part of the flags.
    given = {key: getattr(args, name, None) for key, name in names.items()}
    return parse_options(args.cfg_options) | {key: value for key, value in given.items() if value is not None}


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Turn ``["model.text.num_hidden_layers=2", ...]`` into dotted keys and values.

    What the dataclasses convert stays text; where they hold free mappings, or a literal is given, it is read.

    Raises:
        ConfigError: entries without ``=`` or without a group, all of them named.
    """
    wrong = [option for option in options if "=" not in option or "." not in option.split("=", 1)[0]]
    if wrong:
        raise ConfigError(explain("malformed option", "--cfg-options", ", ".join(wrong), "group.key=value"))
    values: Tree = {}
    for option in options:
        key, text = (part.strip() for part in option.split("=", 1))
        values[key] = text
        if key.count(".") > 1 or text.startswith(("{", "[", "(")):
            with contextlib.suppress(ValueError, SyntaxError):
                values[key] = ast.literal_eval(text)
    return values

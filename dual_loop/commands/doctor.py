"""``dual-loop doctor [flags of train]``: what would stop this run, before it starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dual_loop.commands.common import Command
from dual_loop.config import (
    Config,
    add_training_flags,
    listener_paths,
    load_config,
    overrides_from,
    resolve_config_path,
)
from dual_loop.errors import ConfigError, DualLoopError
from dual_loop.preflight.findings import OK, PROBLEM, WARNING, Finding, as_dict, as_text, has_problem

if TYPE_CHECKING:
    from dual_loop.data.reader import Reader


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quick", action="store_true", help="leave out weights, the test batch and the two processes")
    add_training_flags(parser, argv)


def _doctor(args: argparse.Namespace) -> int:
    """Return 1 where something would stop the run."""
    try:
        config = load_config(resolve_config_path(args.config), overrides_from(args))
    except ConfigError as error:
        findings = [Finding(PROBLEM, "config", str(error))]
    else:
        findings = [Finding(OK, "config", f"{args.config}: {config.model.name}"), *examine(config, quick=args.quick)]
    result = as_dict(findings)
    if args.json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 1 if has_problem(findings) else 0
    print(as_text(findings))
    problems, warned = result["counts"]["problem"], f"{result['counts']['warning']} warning(s)"
    print(f"{problems} problem(s) would stop this run, {warned}" if problems else f"this run can start; {warned}")
    return 1 if problems else 0


def examine(config: Config, *, quick: bool = False) -> list[Finding]:
    """Return everything that is worth saying about a run with ``config``."""
    from dual_loop.checkpoint.importer import weights_sources
    from dual_loop.model.build import build_model
    from dual_loop.preflight import data_checks, machine, model_checks
    from dual_loop.preflight.dry_run import meta_tokenizer
    from dual_loop.serve.loading import rebuild
    from dual_loop.training.devices import build_accelerator
    from dual_loop.training.listeners import read_listener

    findings = [*machine.check_versions(), *machine.check_device(config), *machine.check_precision(config)]
    findings += machine.check_kernels(config)
    sources, problems = data_checks.open_sources(config.data)
    findings += [*problems, *_data(config, sources), *data_checks.check_captions(config, sources)]
    findings += [*model_checks.check_tokens(config), *model_checks.check_weights(config)]
    if has_problem(findings):
        return [*findings, *machine.check_output(config)]  # what follows would only repeat it
    try:
        meta = build_model(config, meta_tokenizer(config), device="meta", weights_imported=True)
    except DualLoopError as error:
        return [*findings, Finding(PROBLEM, "model", str(error))]
    findings += [*machine.check_memory(config, meta), *machine.check_output(config, meta)]
    findings += model_checks.check_trains(meta)
    if not quick:
        findings += machine.check_all_reduce(config)
        try:
            device = build_accelerator(config).device
            model, prompter = rebuild(config, weights_sources(config))
            text = "all parts of the model are filled; nothing is missing or left over"
            findings.append(Finding(OK, "weights", text))
            for path in listener_paths(config):
                read_listener(path, model, prompter, config)
                findings.append(Finding(OK, "weights", f"{path} can listen"))
            model.to(device).train()
            findings += model_checks.check_batch(model, prompter, config, sources)
        except (DualLoopError, RuntimeError, MemoryError) as error:  # a doctor that dies tells nothing
            findings.append(Finding(PROBLEM, "one batch", f"{type(error).__name__}: {error}"))
    return findings


def _data(config: Config, sources: Sequence[Reader]) -> list[Finding]:
    from dual_loop.preflight import data_checks

    findings = list(data_checks.check_sources(sources, data_checks.DECODED, config))
    if sources:
        found, _ = data_checks.check_leakage(sources, config.data, by_sight=False)
        # What the guard handles does not stop the run; `dual-loop data check` is stricter.
        stops = config.data.leakage_guard == "error"
        findings += [f if f.level != PROBLEM or stops else replace(f, level=WARNING) for f in found]
    return findings


main = Command(
    "doctor",
    "Look at machine, data, weights and settings the way a run would; print what to mend.",
    _add_arguments,
    _doctor,
    usage="[--quick] [--json] [flags of train]",
    example="dual-loop doctor --config tiny_demo --sa1b_dir data/sa1b",
)

"""``dual-loop doctor [flags of train]``: what would stop this run, before it starts."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dual_loop.config import Config, add_training_flags, load_config, overrides_from, resolve_config_path
from dual_loop.errors import ConfigError, DualLoopError
from dual_loop.preflight.findings import OK, PROBLEM, WARNING, Finding, as_dict, as_text, has_problem

if TYPE_CHECKING:
    from dual_loop.data.reader import Reader


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 where something would stop the run, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="dual-loop doctor",
        usage="dual-loop doctor [--quick] [--json] [flags of train]",
        description="Look at machine, data, weights and settings the way a run would; print what to mend.",
        epilog="example: dual-loop doctor --config tiny_demo --sa1b_dir data/sa1b",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quick", action="store_true", help="leave out weights, the test batch and the two processes")
    arguments = list(sys.argv[1:] if argv is None else argv)
    add_training_flags(parser, arguments)
    args = parser.parse_args(arguments)
    try:
        config = load_config(resolve_config_path(args.config), overrides_from(args))
    except ConfigError as error:
        findings = [Finding(PROBLEM, "config", str(error))]
    else:
        findings = [Finding(OK, "config", f"{args.config}: {config.model.name}"), *examine(config, quick=args.quick)]
    if args.json:
        print(json.dumps(as_dict(findings), indent=2, ensure_ascii=False))
    else:
        print(as_text(findings))
        print(_verdict(findings))
    return 1 if has_problem(findings) else 0


def examine(config: Config, *, quick: bool = False) -> list[Finding]:
    """Return everything that is worth saying about a run with ``config``."""
    from dual_loop.model.build import build_model
    from dual_loop.preflight import data_checks, machine, model_checks
    from dual_loop.training.dry_run import meta_tokenizer

    findings = [*machine.check_versions(), *machine.check_device(config), *machine.check_precision(config)]
    findings += machine.check_kernels(config)
    sources, problems = data_checks.open_sources(config.data)
    findings += problems
    findings += _data(config, sources)
    findings += [*data_checks.check_captions(config), *model_checks.check_tokens(config)]
    findings += model_checks.check_weights(config)
    if has_problem(findings):
        findings += machine.check_output(config)
        return findings  # what follows would only repeat it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            meta = build_model(config, meta_tokenizer(config), device="meta", weights_imported=True)
    except DualLoopError as error:
        return [*findings, Finding(PROBLEM, "model", str(error))]
    findings += [*machine.check_memory(config, meta), *machine.check_output(config, meta)]
    findings += model_checks.check_trains(meta)
    if not quick:
        findings += machine.check_all_reduce()
        findings += _guarded("one batch", lambda: _batch(config, sources))
    return findings


def _data(config: Config, sources: Sequence[Reader]) -> list[Finding]:
    from dual_loop.model.build import geometry
    from dual_loop.preflight import data_checks

    findings: list[Finding] = []
    for source in sources:
        report = data_checks.read_source(source, data_checks.DECODED, geometry(config), config.train.seed)
        findings += data_checks.findings_of(report, config.data.max_bad_fraction)
        findings += data_checks.expected_counts(source)
    if sources:
        found, _ = data_checks.check_leakage(sources, config.data, by_sight=False)
        # What the guard handles does not stop the run; `dual-loop data check` is stricter.
        stops = config.data.leakage_guard == "error"
        findings += [f if f.level != PROBLEM or stops else replace(f, level=WARNING) for f in found]
    return findings


def _batch(config: Config, sources: Sequence[Reader]) -> Iterable[Finding]:
    from dual_loop.checkpoint.importer import weights_sources
    from dual_loop.preflight import model_checks
    from dual_loop.serve.loading import rebuild
    from dual_loop.training.devices import build_accelerator

    accelerator = build_accelerator(config)
    model, prompter = rebuild(config, weights_sources(config))
    yield Finding(OK, "weights", "all parts of the model are filled; nothing is missing or left over")
    model.to(accelerator.device).train()
    yield from model_checks.check_batch(model, prompter, config, sources)


def _guarded(area: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Turn what the check raises into a finding: a doctor that dies tells nothing."""
    findings: list[Finding] = []
    try:
        findings += check()
    except (DualLoopError, RuntimeError, MemoryError) as error:
        findings.append(Finding(PROBLEM, area, f"{type(error).__name__}: {error}"))
    return findings


def _verdict(findings: Sequence[Finding]) -> str:
    counts = as_dict(findings)["counts"]
    if counts["problem"]:
        return f"{counts['problem']} problem(s) would stop this run, {counts['warning']} warning(s)"
    return f"this run can start; {counts['warning']} warning(s)"


if __name__ == "__main__":
    sys.exit(main())

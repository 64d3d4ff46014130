"""``dual-loop data check|stats|preview``: is the data sound, what is in it, what does the model see of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dual_loop.commands.common import Command, add_quiet, write_page
from dual_loop.config import Config, add_data_flags, load_config, overrides_from, resolve_config_path
from dual_loop.errors import ConfigError
from dual_loop.preflight.findings import Finding, as_dict, as_text, has_problem

if TYPE_CHECKING:
    from dual_loop.data.reader import Reader
    from dual_loop.preflight.data_checks import SourceReport

DESCRIPTIONS = {
    "check": "Read the data the way training does; count what is skipped and why; look for held-out images.",
    "stats": "Measure what is in the data: sizes, regions, areas, captions.",
    "preview": "Write a page of what the model really sees.",
}


def _add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    commands = parser.add_subparsers(dest="what", required=True, metavar="check|stats|preview")
    for name, text in DESCRIPTIONS.items():
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False, usage=f"dual-loop data {name} [flags of data]"
        )
        command.add_argument("--config", default="tiny_cpu", metavar="FILE|NAME", help="whose image sizes count")
        if name == "preview":
            command.add_argument("--samples", type=int, default=6, metavar="NUMBER", help="entries of a source (6)")
            command.add_argument("--out", type=Path, default=Path("outputs/preview.html"), metavar="FILE")
        else:
            text = "entries of a source to read, evenly spread; 0: all (default: 200)"
            command.add_argument("--samples", type=int, default=200, metavar="NUMBER", help=text)
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "check":
            text = "compare images with held-out ones by id alone, not by sight"
            command.add_argument("--ids_only", action="store_true", help=text)
        add_quiet(command)
        add_data_flags(command)


def _data(args: argparse.Namespace) -> int:
    from dual_loop.model.build import geometry
    from dual_loop.preflight import data_checks
    from dual_loop.preflight.preview import preview_page

    config = load_config(resolve_config_path(args.config), overrides_from(args))
    sources, findings = data_checks.open_sources(config.data)
    if args.what == "check":
        return _check(args, config, sources, findings)
    if findings:
        raise ConfigError(as_text(findings))
    if args.what == "preview":
        write_page(preview_page(sources, args.samples, geometry(config), config.train.seed), args.out)
        return 0
    sizes, seed = geometry(config), config.train.seed
    stats = {}
    for source in sources:
        report = data_checks.read_source(source, args.samples or None, sizes, seed, data_checks.ALL)
        stats[source.name] = {**({"in the files": source.contents} if source.contents else {}), **stats_of(report)}
    if args.json:
        print(json.dumps(stats, indent=2))
        return 0
    for name, values in stats.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:<28}{value}")
    return 0


def _check(args: argparse.Namespace, config: Config, sources: Sequence[Reader], findings: list[Finding]) -> int:
    from dual_loop.preflight import data_checks

    findings += data_checks.check_sources(sources, args.samples or None, config)
    found, leaks = data_checks.check_leakage(sources, config.data, by_sight=not args.ids_only) if sources else ([], [])
    findings += found
    if args.json:
        listed = [{"source": leak.source, "entry": leak.entry_id, "message": str(leak)} for leak in leaks]
        print(json.dumps({**as_dict(findings), "leaks": listed}, indent=2, ensure_ascii=False))
    else:
        print(as_text(findings))
        for leak in leaks:
            print(f"leak: {leak}")
        print("problems were found" if has_problem(findings) else "no problem was found")
    return 1 if has_problem(findings) else 0


def stats_of(report: SourceReport) -> dict[str, object]:
    """Return plain values: counts, and quantiles (5, 50, 95 %) of what varies."""
    values: dict[str, object] = {"entries": report.entries, "read": report.read, "good": report.good}
    values["skipped"] = dict(report.reasons) or "none"
    values["regions that cannot be used"] = dict(report.passed_over) or "none"
    if not report.good:
        return values
    heights, widths = zip(*report.sizes, strict=True)
    total = sum(report.regions)
    values["regions an image"] = _quantiles(report.regions)
    values["mask, % of the image"] = _quantiles([100 * area for area in report.areas])
    values["width"], values["height"] = _quantiles(widths), _quantiles(heights)
    values["captioned regions"] = f"{sum(count > 0 for count in report.captions)} of {total}"
    if report.words:
        values["words a caption"] = _quantiles(report.words)
    values["grid cell rescued"] = f"{report.rescued} of {total}"
    return values


def _quantiles(values: Sequence[float]) -> str:
    import numpy as np

    low, middle, high = np.percentile(np.asarray(values, float), [5, 50, 95])
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


main = Command("data", "Look at data before training on it.", _add_arguments, _data)

"""Names of the data sets, apart from their readers, so that a wrong name is answered before torch is imported."""

from dual_loop.errors import ConfigError, did_you_mean, explain

SETTING_PREFIX = {"sav": "sav", "sa1b": "sa1b", "openimages": "openimage", "refcoco": "refcoco", "masks": "masks"}
"""Of each source, the prefix of its settings in DataConfig."""
DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "grefcoco": "unc"}

EVAL_SETS: dict[str, tuple[str, ...]] = {
    "reasonseg": ("val", "test", "train"),
    **dict.fromkeys(("refcoco-m", "gseval", "dlc-bench", "paradlc-bench"), ()),
    "mevis": ("valid_u", "valid", "test", "train"),
    "refdavis17": ("valid", "train"),
}
"""Of each evaluation set of the field (below ``eval_dir``), its splits, the default first."""
VIDEO_SETS = ("mevis", "refdavis17")


def is_video(name: str) -> bool:
    """Tell whether a data set, with or without its split, is one of videos."""
    return name.partition(":")[0] in VIDEO_SETS


def check_name(name: str) -> str:
    """Return ``name`` if it is a data set that can be measured: a known one, a folder's, a parquet file.

    Raises:
        ConfigError: it is not.
    """
    dataset, _, split = name.partition(":")
    folders = [source for source in SETTING_PREFIX if source not in DEFAULT_SPLIT_BY]
    splits = ("", *EVAL_SETS.get(dataset, ())) if dataset in (*folders, *EVAL_SETS) else ()
    if name.endswith(".parquet") or dataset in DEFAULT_SPLIT_BY or split in splits:
        return name
    near = did_you_mean(dataset, [*DEFAULT_SPLIT_BY, *folders, *EVAL_SETS])
    with_splits = [*(f"{known}:SPLIT" for known in DEFAULT_SPLIT_BY), *folders]
    with_splits += [f"{known}{':' * bool(own)}{'|'.join(own)}" for known, own in EVAL_SETS.items()]
    expected = ", ".join((*with_splits, "FILE.parquet"))
    raise ConfigError(explain(f"unknown data set{near}", "--data", name, expected))

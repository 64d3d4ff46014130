"""Names of the data sets, apart from their readers, so that a wrong name is answered before torch is imported."""

from dual_loop.errors import ConfigError, did_you_mean, explain

SETTING_PREFIX = {"sav": "sav", "sa1b": "sa1b", "openimages": "openimage", "refcoco": "refcoco", "masks": "masks"}
"""Of each source, the prefix of its settings in DataConfig."""
DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "grefcoco": "unc"}


def check_name(name: str) -> str:
    """Return ``name`` if it is a data set that can be measured: of the RefCOCO family, a folder's, a parquet file.

    Raises:
        ConfigError: it is not.
    """
    dataset, _, split = name.partition(":")
    folders = [source for source in SETTING_PREFIX if source not in DEFAULT_SPLIT_BY]
    if name.endswith(".parquet") or dataset in DEFAULT_SPLIT_BY or (dataset in folders and not split):
        return name
    near = did_you_mean(dataset, [*DEFAULT_SPLIT_BY, *folders])
    expected = ", ".join((*(f"{known}:SPLIT" for known in DEFAULT_SPLIT_BY), *folders, "FILE.parquet"))
    raise ConfigError(explain(f"unknown data set{near}", "--data", name, expected))

"""The table of data sets. Knows their names and options, not their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from wsiseg.config import find_config, from_mapping, load_yaml, to_mapping
from wsiseg.datasets.base import LabelledDataset
from wsiseg.datasets.bcss import BCSS, BCSSConfig
from wsiseg.datasets.folder import FolderConfig, FolderDataset
from wsiseg.datasets.glas import GlaS, GlaSConfig
from wsiseg.datasets.pannuke import PARTS as PANNUKE_PARTS
from wsiseg.datasets.pannuke import PanNuke, PanNukeConfig
from wsiseg.datasets.qupath import QuPathDataset
from wsiseg.datasets.qupath_config import QuPathConfig
from wsiseg.datasets.qupath_files import PARTS as QUPATH_PARTS
from wsiseg.errors import ConfigError, UsageError


class DatasetEntry(NamedTuple):
    """A line of DATASETS.

    Attributes:
        config: the dataclass of its options.
        open: a part of it: called with its folder, the part and the options.
        parts: its parts, for help pages; empty where the options name them.
        part: the part that training takes where none is named.
        training: name of the shipped training configuration that is the default.
    """

    config: type[Any]
    open: Callable[[Path, str, Any], LabelledDataset]
    parts: tuple[str, ...]
    training: str
    part: str = "train"


DATASETS: dict[str, DatasetEntry] = {
    "glas": DatasetEntry(GlaSConfig, GlaS, ("train", "testA", "testB"), "glas/pathsegdiff"),
    "bcss": DatasetEntry(BCSSConfig, BCSS, ("train", "test"), "bcss/pathsegdiff"),
    "pannuke": DatasetEntry(
        PanNukeConfig, PanNuke, PANNUKE_PARTS, "pannuke/ddpm-mlp", "lowdata-train"
    ),
    "folder": DatasetEntry(FolderConfig, FolderDataset, (), "annotations"),
    "qupath": DatasetEntry(QuPathConfig, QuPathDataset, QUPATH_PARTS, "annotations"),
}


def dataset_mapping(name: str | Path) -> dict[str, Any]:
    """The resolved {name, ...options} of a data set.

    Args:
        name: a name of the table, a YAML file with such a mapping, or the name of a shipped one.

    Raises:
        UsageError: none of these; unknown options.
    """
    text, known = str(name), ", ".join(DATASETS)
    if text == "folder":
        raise UsageError(
            "data set folder: its images and classes are told in a YAML file, --dataset MINE.yaml;"
            " configs/datasets holds examples"
        )
    if text in DATASETS:
        data: dict[str, Any] = {"name": text}
    else:
        try:
            data = load_yaml(find_config(text, "datasets"))
        except ConfigError as e:
            if Path(text).is_file():
                raise UsageError(f"data set {e}") from e
            raise UsageError(f"no data set {text!r}: not one of {known}, and as a YAML: {e}") from e
    key = data.get("name")
    if not isinstance(key, str) or key not in DATASETS:
        raise ConfigError(f"{text}: name must be one of {known}, not {key!r}")
    options = {k: v for k, v in data.items() if k != "name"}
    try:
        return {"name": key, **to_mapping(from_mapping(DATASETS[key].config, options))}
    except ConfigError as e:
        raise ConfigError(f"{text}: {e}") from e


def open_dataset(dataset: Mapping[str, Any] | str, root: str | Path, part: str) -> LabelledDataset:
    """A part of a data set.

    Args:
        dataset: a name of the table, a YAML file, or the mapping of `dataset_mapping`.
        root: folder of the data set.
        part: name of the part.

    Raises:
        UsageError: unknown data set, options or part.
        DatasetError: the folder does not hold it.
    """
    mapping = dataset_mapping(dataset) if isinstance(dataset, str) else dataset
    entry = DATASETS[mapping["name"]]
    options = {k: v for k, v in mapping.items() if k != "name"}
    opened = entry.open(Path(root), part, from_mapping(entry.config, options, mapping["name"]))
    opened.folder = Path(root)
    return opened

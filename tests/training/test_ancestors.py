"""What cards keep of what a model was trained from, round after round."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from discs import config

from wsiseg.classes import IGNORE, Classes, TissueClass
from wsiseg.datasets.base import LabelledDataset, LabelledImage
from wsiseg.errors import OutputError
from wsiseg.models.checkpoint import read_card, save_checkpoint
from wsiseg.models.registry import ModelConfig, build_segmenter
from wsiseg.training import ancestors, finish
from wsiseg.training.ancestors import chain, kept_of
from wsiseg.training.inputs import Inputs
from wsiseg.training.learnt import warn_of_learnt_validation, warn_of_training_images
from wsiseg.training.start import licence_of, starting_point
from wsiseg.training.train_config import TrainConfig

DATA = {"name": "folder", "images": "*.png"}
CLASSES = Classes((TissueClass("rest", (0, 0, 200), True), TissueClass("nuclei", (200, 0, 0))))
MODEL = build_segmenter(
    ModelConfig(
        extractor={"name": "stain", "tile_px": 32},
        head={"name": "threshold"},
        classes=CLASSES,
        window_px=96,
    )
)


class Painted(LabelledDataset):
    """Images of one grey each, named by it; two neighbours are of one patient."""

    classes, mpp = CLASSES, 1.0

    def __init__(self, greys: Sequence[int], *, folder: str = "") -> None:
        self.greys = greys
        self.names = tuple(f"{folder}{grey}" for grey in greys)
        self.groups = tuple(f"{folder}patient {grey // 2}" for grey in greys)

    def __getitem__(self, index: int) -> LabelledImage:
        image = np.full((4, 6, 3), self.greys[index], np.uint8)
        mask = np.full((4, 6), IGNORE, np.uint8)
        return LabelledImage(self.names[index], image, mask, self.groups[index])


def inputs_of(training: Sequence[int], validation: Sequence[int] = (), folder: str = "") -> Inputs:
    data = Painted([*training, *validation], folder=folder)
    first, second = range(len(training)), range(len(training), len(data))
    return Inputs(data, first, second, np.zeros((0, 2), np.int64)).read()


def trained(
    path: Path,
    inputs: Inputs,
    start: Path | None = None,
    *,
    run: TrainConfig | None = None,
    with_head: bool = False,
    **data: Any,
) -> Path:
    """Write what a training of these images would, and no weight is learnt."""
    run = run or config(extractor={}, mpp=None)
    provenance: dict[str, Any] = {"dataset": {**DATA, "part": "train", "left out": None, **data}}
    if start is not None:
        begun = starting_point(run, str(start), with_head=with_head, device="cpu")
        provenance |= begun.origin
    card, licence = finish.card_of(path, run, inputs, None, provenance)
    save_checkpoint(path, MODEL, card={**card, "validation": None}, licence=licence)
    return path


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_model_of_many_rounds_can_be_read_and_knows_the_first(tmp_path: Path) -> None:
    path, sizes = None, []
    for n in range(15):
        images = range(4 * n, 4 * n + 40)  # four others each time
        path = trained(tmp_path / f"{n}.safetensors", inputs_of(images), path)
        sizes.append(len(json.dumps(read_card(path)["card"])))
    assert path is not None
    card = read_card(path)["card"]
    assert [c.get("name") for c in chain(card)] == [None, *map(str, range(13, -1, -1))]
    assert len({c["sha256"] for c in chain(card)[1:]}) == 14
    listed = [c for about in chain(card) for c in about.get("training_contents", [])]
    assert len(listed) == len(set(listed)) == 96
    assert abs(sizes[-1] - sizes[-2] - (sizes[5] - sizes[4])) < 20  # digits of names
    for images, count in ((range(3), 3), (range(94, 99), 2), (range(50, 53), 3)):
        with pytest.warns(UserWarning, match=f"{count} of the {len(images)} images were in"):
            warn_of_training_images(card, DATA, Painted(images), part="x")
    card["ancestors"][-1]["training_groups"].append("patient 60")
    with pytest.warns(UserWarning, match="1 of the 1 images are of patients"):
        warn_of_training_images(card, DATA, Painted([121]), part="train")
    with silence():
        warn_of_training_images(card, DATA, Painted([96, 97]), part="x")


def test_cards_that_lie_in_one_another_become_a_list() -> None:
    card: dict[str, Any] = {}
    for n in range(5):
        lists = {"training_images": [str(n)], "training_groups": [str(n)]}
        about = {"dataset": {"name": "glas"}, **lists, "training": {"trainable": "all"}}
        card = {**about, "limits": ["toy"], **({"extractor": card} if card else {})}
    kept = kept_of(card, with_head=False)
    assert [c["training_images"] for c in kept] == [["4"], ["3"], ["2"], ["1"], ["0"]]
    assert all(not {"extractor", "training", "limits"} & set(c) for c in kept)
    origin = starting_point(config(extractor={}, mpp=None), "glas-small", device="cpu").origin
    lists = [c["training_images"] for c in (origin["extractor"], *origin["ancestors"])]
    assert [len(found) for found in lists] == [85, 85, 85, 56]
    assert (origin["extractor"]["name"], "WSSS4LUAD" in origin["extractor"]["terms"]) == (
        "glas-small",
        True,
    )


def test_long_names_leave_room_for_the_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ancestors, "MOST_BYTES", 3000)
    monkeypatch.setattr(finish, "MOST_CHARACTERS", 700)
    path = None
    for n in range(4):
        images = inputs_of(range(20 * n, 20 * n + 20), folder="long " * 10)
        path = trained(tmp_path / f"{n}.safetensors", images, path)
    assert path is not None
    card = read_card(path)["card"]
    assert len(card["training_contents"]) == 20
    assert len(card["training_images"]) < 20
    assert "training_images" not in card["ancestors"][-1]
    with pytest.warns(UserWarning, match="20 of the 20 images were in"):
        warn_of_training_images(card, DATA, Painted(range(20)), part="x")
    monkeypatch.setattr(ancestors, "MOST_BYTES", 1000)
    with pytest.warns(UserWarning, match=r"no room for the images of \d earlier trainings"):
        trained(tmp_path / "last.safetensors", inputs_of([250]), path)


def test_what_could_not_be_read_back_ends_before_the_first_step(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(18):
        deep = {"a": deep}
    for data, message in ((deep, "nested deeper than 20"), ("a" * 4_000_000, "over 4000000")):
        with pytest.raises(OutputError, match=message):
            trained(tmp_path / "m.safetensors", inputs_of([1]), note=data)


def test_validation_images_that_the_start_has_learnt_are_told(tmp_path: Path) -> None:
    first = trained(tmp_path / "1.safetensors", inputs_of(range(8), range(8, 12)))
    second = trained(tmp_path / "2.safetensors", inputs_of(range(4, 8), range(8, 12)), first)

    def check(held: Sequence[int], *, with_head: bool = False, start: Path = second) -> None:
        run = config(extractor={}, mpp=None)
        origin = starting_point(run, str(start), with_head=with_head, device="cpu").origin
        about = {"dataset": {**DATA, "part": "train", "left out": None}, **origin}
        warn_of_learnt_validation(about, inputs_of([200], held), [])

    with pytest.warns(UserWarning, match="1 of the 2 validation images were in the training of"):
        check([0, 90])
    with pytest.warns(UserWarning, match="2 of the 2 validation images .* keep the images and the"):
        check([4, 5])
    with silence():
        check(range(8, 12))  # the same as before
        check(range(90, 94))
    run = config(extractor={}, mpp=None, trainable="none")
    head = trained(tmp_path / "3.safetensors", inputs_of(range(60, 64)), second, run=run)
    with pytest.warns(UserWarning, match="2 of the 2 validation images were in"):
        check([60, 61], with_head=True, start=head)
    with silence():
        check([60, 61], start=head)  # its extractor was frozen
    with pytest.warns(UserWarning, match="1 of the 1 validation images were in"):
        check([0], start=head)


def test_validation_of_patients_that_the_start_has_learnt_is_told() -> None:
    start = {"dataset": {**DATA, "part": "train"}, "training_contents": ["00000000"]}
    start |= {"training_images": ["another"], "training_groups": ["patient 5", "patient 6"]}
    about = {"dataset": {**DATA, "part": "train"}, "extractor": start}
    with pytest.warns(UserWarning, match="2 of the 2 validation images are of patients or slides"):
        warn_of_learnt_validation(about, inputs_of([200], [10, 12]), [])
    start["validation_groups"] = ["patient 6"]
    with pytest.warns(UserWarning, match="1 of the 2 validation images are of patients"):
        warn_of_learnt_validation(about, inputs_of([200], [10, 12]), [])
    start |= {"validation_groups": [], "images": {"training": 1, "validation": 1}}
    with silence():
        warn_of_learnt_validation({}, inputs_of([200], [10, 12]), [])
        warn_of_learnt_validation(about, inputs_of([200], [10, 12]), [])


def test_terms_stand_once_in_a_licence() -> None:
    origin = {"extractor": {"licence": "A; B"}}
    assert licence_of(config(), ["A"], origin) == "A; B"
    assert licence_of(config(), ["", "C", "B"], origin) == "C; B; A"
    assert licence_of(config(licence="mine"), ["A"], origin) == "mine"
    assert licence_of(config(), ["", "unknown"], {}) == "unknown"

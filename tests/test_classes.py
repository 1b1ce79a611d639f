from __future__ import annotations

import numpy as np
import pytest

from wsiseg.classes import Classes, TissueClass, to_disk, to_network
from wsiseg.errors import ConfigError

TWO = Classes((TissueClass("Other", (1, 2, 3), background=True), TissueClass("Gland", (4, 5, 6))))


def test_numberings_are_inverse() -> None:
    network = np.array([[0, 1, 255]], np.uint8)
    assert to_disk(network).tolist() == [[1, 2, 0]]
    assert to_network(to_disk(network)).tolist() == network.tolist()


def test_classes_survive_json() -> None:
    assert Classes.from_list(TWO.to_list()) == TWO
    assert TWO.lookup()[2].tolist() == [4, 5, 6]
    assert TWO.lookup()[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"name": "a:b", "color": [0, 0, 0]}],
        [{"name": "a*", "color": [0, 0, 0]}],
        [{"name": "a", "color": [0, 0]}],
        [{"name": "a", "color": [0, 0, 256]}],
        [{"name": "a", "color": "red"}],
        [{"color": [0, 0, 0]}],
        [{"name": "a", "color": [0, 0, 0]}, {"name": "a", "color": [0, 0, 0]}],
        [{"name": "a", "color": [0, 0, 0], "value": 2}],
    ],
)
def test_impossible_classes_are_refused(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ConfigError):
        Classes.from_list(rows)

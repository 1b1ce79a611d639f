"""Where the borders of annotated objects are, and where two are close. Knows no files."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def border_band(instances: npt.NDArray[np.int32], width_px: float) -> npt.NDArray[np.bool_]:
    """(H, W) bool: pixels of an object whose distance to a pixel outside of it is <= `width_px`.

    The edge of the image is no edge of an object.

    Args:
        instances: (H, W) object numbers, 0 = none.
        width_px: distance between pixel centres.
    """
    band = np.zeros(instances.shape, bool)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        around = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
        own = instances[around] == number
        if not own.all():
            band[around] |= own & (ndimage.distance_transform_edt(own) <= width_px)
    return band


def touching(instances: npt.NDArray[np.int32], width_px: float) -> npt.NDArray[np.bool_]:
    """(H, W) bool: pixels no farther than `width_px` from two objects or more, or in one of them.

    Args:
        instances: (H, W) object numbers, 0 = none.
        width_px: distance between pixel centres.
    """
    near = np.zeros(instances.shape, np.int32)
    reach = math.ceil(width_px)
    for number, box in enumerate(ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        around = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in box)
        other = instances[around] != number
        near[around] += ndimage.distance_transform_edt(other) <= width_px
    between: npt.NDArray[np.bool_] = near > 1
    return between

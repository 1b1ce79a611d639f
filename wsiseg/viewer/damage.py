"""Whether the mask of a result can be shown with it. Knows no pages and no slides."""

from __future__ import annotations

from dataclasses import replace

from wsiseg.errors import OutputError
from wsiseg.outputs.mask_reader import MaskReader
from wsiseg.outputs.run_folder import SlideResult


def open_mask(result: SlideResult) -> MaskReader:
    """The mask of a result, whose size must be that of its record.

    Raises:
        OutputError: there is none, it cannot be read, or it is that of another analysis.
    """
    path = result.files.get("mask")
    if path is None or result.size is None:
        raise OutputError("there is none")
    mask = MaskReader(path)
    if result.mask_size not in (None, tuple(mask.sizes[0])):
        mask.close()
        found, stated = ("{} x {} px".format(*size) for size in (mask.sizes[0], result.mask_size))
        raise OutputError(
            f"{path}: the mask is not that of its record ({found}, not {stated}); make both again"
        )
    return mask


def checked(result: SlideResult) -> SlideResult:
    """The result; as "damaged" where its mask is cut off, cannot be opened or is another's."""
    if result.status != "ok" or "mask" not in result.files:
        return result
    try:
        with open_mask(result) as mask:
            mask.check_length()
    except OutputError as e:
        return replace(result, status="damaged", error=str(e))
    return result

"""Text in pictures: European letters, line breaks, what is too long."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw

from wsiseg.lettering import font, shortened


def drawn(text: str) -> bytes:
    picture = Image.new("L", (40, 40))
    ImageDraw.Draw(picture).text((2, 2), text, fill=255, font=font(24))
    return picture.tobytes()


@pytest.mark.parametrize("letter", "äßéčłøñΩЖ²µ")
def test_letters_have_a_shape_of_their_own(letter: str) -> None:
    assert drawn(letter) != drawn("\ue000")  # a letter that no font has


def test_text_is_one_line_and_fits() -> None:
    draw = ImageDraw.Draw(Image.new("L", (8, 8)))
    assert shortened(draw, "a   b", 15, 500) == "a   b"
    assert shortened(draw, "line\nbreak\udcff.svs", 15, 500) == "line\\nbreak\\udcff.svs"
    short = shortened(draw, "name" * 50, 15, 100)
    assert "..." in short
    assert draw.textlength(short, font=font(15)) <= 100

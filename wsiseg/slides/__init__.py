"""Slides: pixels at a requested resolution, tissue, synthetic slides. Knows no torch."""

from wsiseg.slides.slide import Slide, open_slide

__all__ = ["Slide", "open_slide"]

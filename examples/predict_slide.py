"""Segments a slide in five lines of Python.

    python examples/predict_slide.py SLIDE [FOLDER [MODEL]]

writes SLIDE's mask pyramid and QuPath polygons to FOLDER (default masks) with MODEL (default
glas-small). Without arguments it takes the sample slide beside this file.
"""

import argparse
from pathlib import Path

from wsiseg import find_tissue, load_model, open_slide, predict_slide, write_geojson, write_pyramid


def main(path: Path, folder: Path, name: str) -> None:
    """Segment the slide at `path`."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / path.stem

    slide = open_slide(path)
    model = load_model(name)
    canvas = predict_slide(slide, model, f"{out}.canvas", tissue=find_tissue(slide))
    write_pyramid(f"{out}.mask.ome.tif", canvas)
    write_geojson(f"{out}.geojson", canvas)

    for tissue, area in canvas.areas_mm2().items():
        print(f"{tissue}: {area:.4f} mm2")
    slide.close()
    canvas.remove()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slide", nargs="?", type=Path, default=Path(__file__).parent / "colon.tif")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("masks"))
    parser.add_argument("model", nargs="?", default="glas-small")
    given = parser.parse_args()
    main(given.slide, given.folder, given.model)

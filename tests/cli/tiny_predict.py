"""`wsiseg predict` with a tiny model; writes the name of each slide that it works on to a file.

python tests/cli/tiny_predict.py LOG ARGUMENT...
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

import torch
from inference_fakes import stain_model

import wsiseg.cli.predict_run as predict_run
import wsiseg.cli.predict_slides as predict_slides
from wsiseg.cli import main
from wsiseg.inference.predict import Work, begin

if __name__ == "__main__":
    torch.set_num_threads(1)
    log = Path(sys.argv[1])

    def noted(slide: Any, *args: Any, **more: Any) -> Work:
        with log.open("a") as file:
            file.write(f"{slide.path.stem}\n")
        return begin(slide, *args, **more)

    predict_slides.begin = noted
    predict_run.load_model = lambda *args, **more: stain_model()
    sys.argv = ["wsiseg", "predict", *sys.argv[2:], "--overlap", "32", "--tissue", "none"]
    main()

"""Runs TIAToolbox 2 on a slide with a 1x1 convolution; for the Python of its own environment.

    /path/to/its/python benchmarks/peer_tiatoolbox.py SLIDE WEIGHTS.npz FOLDER

Needs TIAToolbox (version 2) and nothing of this project. Windows of 768 px every 512 px at 0.5 um
per pixel, no tissue mask, batches of 4, no worker processes, results in a zarr file. The labels go
to FOLDER.npy. Prints one line of JSON: CPU seconds of the whole run and of the model's own calls,
megapixels, peak memory in MiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import tiatoolbox
import torch
import zarr
from tiatoolbox.models.architecture.utils import argmax_last_axis
from tiatoolbox.models.engine.io_config import IOSegmentorConfig
from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
from tiatoolbox.models.models_abc import ModelABC
from tiatoolbox.wsicore.wsireader import WSIReader

WINDOW_PX, STRIDE_PX, MPP = 768, 512, 0.5
spent = 0.0


class Pointwise(ModelABC):
    """A 1x1 convolution of pixels in [-1, 1] and a softmax."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.classifier = torch.nn.Conv2d(3, len(bias), 1)
        self.classifier.weight.data = torch.from_numpy(weight)
        self.classifier.bias.data = torch.from_numpy(bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, classes, H, W) probabilities of (B, H, W, 3) pixels 0..255."""
        x = images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        return self.classifier(x).softmax(dim=1)

    def postproc(self, image):
        """The most probable class, as TIAToolbox's own U-Net takes it."""
        return argmax_last_axis(image=image)

    @staticmethod
    def infer_batch(model, batch_data, *, device="cpu"):
        """(B, H, W, classes) probabilities, timed."""
        global spent
        began = time.thread_time()
        with torch.inference_mode():
            out = model(batch_data.to(device)).permute(0, 2, 3, 1).contiguous().numpy()
        spent += time.thread_time() - began
        return out


def main(slide: str, weights: str, folder: str) -> None:
    """Run and print."""
    torch.set_num_threads(1)
    stored = np.load(weights)
    resolution = {"units": "mpp", "resolution": MPP}
    config = IOSegmentorConfig(
        input_resolutions=[resolution],
        output_resolutions=[resolution],
        patch_input_shape=[WINDOW_PX, WINDOW_PX],
        patch_output_shape=[WINDOW_PX, WINDOW_PX],
        stride_shape=[STRIDE_PX, STRIDE_PX],
        save_resolution=resolution,
    )
    reader = WSIReader.open(slide, mpp=(MPP, MPP), power=20)
    width, height = reader.slide_dimensions(**resolution)
    engine = SemanticSegmentor(
        model=Pointwise(stored["weight"], stored["bias"]),
        batch_size=4,
        num_workers=0,
        device="cpu",
        verbose=False,
    )
    began = time.process_time()
    written = engine.run(
        images=[reader],
        patch_mode=False,
        ioconfig=config,
        auto_get_mask=False,
        save_dir=folder,
        output_type="zarr",
        overwrite=True,
    )
    found = {
        "version": tiatoolbox.__version__,
        "cpu": time.process_time() - began,
        "model_cpu": spent,
        "megapixels": width * height / 1e6,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (path,) = written.values()
    np.save(f"{folder}.npy", zarr.open(str(path), mode="r")["predictions"][:])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

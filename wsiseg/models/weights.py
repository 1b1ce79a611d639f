"""The authors' checkpoints (CompVis latent diffusion, DINO HIPT) to one file of ours.

Sources: Graikos et al. (CVPR 2024, arXiv:2312.07330) for the diffusion model and its conditioner,
Chen et al. (CVPR 2022) for HIPT; the key map of U-Net and first stage is that of diffusers. Every
tensor of either file must find its place and every place its tensor. Knows no heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsiseg.errors import CheckpointError, UsageError
from wsiseg.models import storage
from wsiseg.models.checkpoint import save_extractor
from wsiseg.models.compat import ensure_torchvision_imports
from wsiseg.models.diffusion import ScheduleConfig, alphas_bar
from wsiseg.models.extractors.pathsegdiff import PathSegDiffExtractor, parameter_counts
from wsiseg.models.layout import UNET, infer_encoder, infer_first_stage, infer_schedule, infer_unet
from wsiseg.models.registry import extractor_skeleton
from wsiseg.models.torchfile import read_torch, tensors_of
from wsiseg.models.zoo import AUTHORS_TERMS

_FIRST_STAGE = "first_stage_model."
_CONDITIONER = "cond_stage_model."
_EMA = "model_ema."
_IGNORED = ("inception.", "first_stage_model.loss.", _EMA)
_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
)
_TOLERANCE = 1e-4


def import_weights(
    ldm: str | Path,
    hipt: str | Path,
    *,
    out: str | Path,
    arch: Mapping[str, Any] | None = None,
    ema: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Bring the authors' diffusion model and encoder into one extractor file.

    Args:
        ldm: CompVis checkpoint: ["state_dict"] (or bare) with model.diffusion_model.*,
            first_stage_model.*, cond_stage_model.patch_fc.* and region_fc.*.
        hipt: DINO checkpoint: ["teacher"] with module.backbone.*.
        out: the file to write, a name that ends in .safetensors and does not exist yet.
        arch: mapping {name: pathsegdiff, ...} that the files must fit; without it the widths are
            read off the tensors.
        ema: take the exponential moving average of the U-Net instead of its plain weights.
        allow_pickle: open files that hold other objects than tensors; runs code that they name.

    Returns:
        The card that was written.

    Raises:
        CheckpointError: a file that is missing, truncated, of another layout or does not fit.
        UsageError: `out` exists already.
        OutputError: `out` cannot be written.
    """
    ldm, hipt, out = Path(ldm), Path(hipt), Path(out)
    if out.exists():
        raise UsageError(f"{out}: exists already; remove it or give another --out")
    denoiser = _ldm_tensors(ldm, allow_pickle)
    encoder = _hipt_tensors(hipt, allow_pickle)
    _check_conditioning(denoiser, encoder, ldm)
    extractor = _skeleton(
        arch if arch is not None else infer_config(denoiser, encoder, ldm, hipt), ldm
    )
    schedule = _check_schedule(denoiser, extractor.config.schedule, ldm)
    _check_scale(denoiser, extractor.config.first_stage.scale, ldm)
    _place(extractor.encoder.net, encoder, hipt, "HIPT")
    _place_ldm(extractor, _averaged(denoiser, ldm) if ema else denoiser, ldm)
    card = {
        "summary": "PathSegDiff extractor brought in from the authors' checkpoints",
        "sources": {k: _source(p) for k, p in (("ldm", ldm), ("hipt", hipt))},
        "unet_weights": "exponential moving average" if ema else "plain",
        "schedule": schedule,
        "left_out": {p: n for p in _IGNORED if (n := sum(k.startswith(p) for k in denoiser))},
        "parameters": parameter_counts(extractor),
    }
    save_extractor(out, extractor, card=card, licence=AUTHORS_TERMS)
    return card


def infer_config(
    denoiser: Mapping[str, Tensor], encoder: Mapping[str, Tensor], ldm: Path, hipt: Path
) -> dict[str, Any]:
    """The extractor's mapping {name, ...configuration} read off the tensors' shapes."""
    try:
        parts: dict[str, Any] = {"encoder": infer_encoder(encoder)}
    except (KeyError, IndexError, ValueError) as e:
        raise CheckpointError(
            f"{hipt}: tensor {e} is missing or odd; expected HIPT's 256 px vision transformer"
        ) from e
    try:
        parts |= {"unet": infer_unet(denoiser), "first_stage": infer_first_stage(denoiser)}
        if "betas" in denoiser:
            parts["schedule"] = infer_schedule(denoiser["betas"])
    except (KeyError, IndexError, ValueError) as e:
        raise CheckpointError(
            f"{ldm}: tensor {e} is missing or odd; expected a CompVis latent-diffusion checkpoint"
        ) from e
    region = denoiser.get(_CONDITIONER + "region_fc.weight")
    parts["region_dim"] = 0 if region is None else int(region.shape[-1])
    return {"name": "pathsegdiff", **parts}


def _skeleton(config: Mapping[str, Any], path: Path) -> PathSegDiffExtractor:
    """The extractor without memory that the files are to fill."""
    try:
        extractor = extractor_skeleton(config)
    except ValueError as e:
        raise CheckpointError(f"{path}: no architecture has these widths ({e})") from e
    if not isinstance(extractor, PathSegDiffExtractor):
        raise UsageError(f"extractor {config['name']}: the authors' weights are for pathsegdiff")
    return extractor


def _ldm_tensors(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    data = read_torch(path, allow_pickle=allow_pickle)
    state = data.get("state_dict", data)
    tensors = tensors_of(state) if isinstance(state, Mapping) else {}
    if not any(k.startswith(UNET) for k in tensors):
        raise CheckpointError(
            f"{path}: no {UNET}* tensors; expected a CompVis latent-diffusion checkpoint"
        )
    known = (UNET, _FIRST_STAGE, _CONDITIONER, *_IGNORED)
    for name in tensors:
        if not name.startswith(known) and name not in _SCHEDULE:
            raise CheckpointError(f"{path}: tensor {name} belongs to no part of the model")
    return tensors


def _hipt_tensors(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    data = read_torch(path, allow_pickle=allow_pickle)
    state = data.get("teacher")
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path}: no 'teacher'; expected HIPT's DINO checkpoint (vit256_small_dino.pth)"
        )
    tensors = {
        name.removeprefix("module.").removeprefix("backbone."): tensor
        for name, tensor in tensors_of(state).items()
    }
    return {name: t for name, t in tensors.items() if not name.startswith("head.")}


def _check_conditioning(
    denoiser: Mapping[str, Tensor], encoder: Mapping[str, Tensor], path: Path
) -> None:
    weight = denoiser.get(_CONDITIONER + "patch_fc.weight")
    if weight is None:
        raise CheckpointError(
            f"{path}: no {_CONDITIONER}patch_fc; only models that are guided by HIPT are supported"
        )
    width = int(encoder["cls_token"].shape[-1]) if "cls_token" in encoder else 0
    if weight.shape[1] != width:
        raise CheckpointError(
            f"{path}: guided by vectors of {weight.shape[1]} numbers where the encoder gives "
            f"{width}; only models that are guided by HIPT (384) are supported, not iBOT or "
            "CTransPath (768)"
        )


def _check_schedule(denoiser: Mapping[str, Tensor], known: ScheduleConfig, path: Path) -> str:
    """Whether the noise schedule is that of the file, in words for the card."""
    stored = denoiser.get("alphas_cumprod")
    if stored is None:
        return "assumed: the file holds none"
    ours = alphas_bar(known)
    if stored.shape != ours.shape or not torch.allclose(
        stored.float(), ours, rtol=_TOLERANCE, atol=1e-7
    ):
        raise CheckpointError(
            f"{path}: its noise schedule is not {known.kind} from {known.beta_start} to "
            f"{known.beta_end} in {known.steps} steps; give the right one with --arch FILE"
        )
    return "equal to the one in the file"


def _check_scale(denoiser: Mapping[str, Tensor], known: float, path: Path) -> None:
    """Refuse a file that states another scale of its latents."""
    stored = denoiser.get("scale_factor")
    if stored is not None and not math.isclose(float(stored), known, rel_tol=_TOLERANCE):
        raise CheckpointError(
            f"{path}: its latents are scaled by {float(stored):g}, not {known:g}; give "
            "first_stage.scale with --arch FILE"
        )


def _averaged(denoiser: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with the U-Net's replaced by their moving averages, as LitEma names them."""
    result = dict(denoiser)
    for name in denoiser:
        if name.startswith(UNET):
            average = _EMA + name.removeprefix("model.").replace(".", "")
            if average not in denoiser:
                raise CheckpointError(f"{path}: no moving average of {name}; import without --ema")
            result[name] = denoiser[average]
    return result


def _place_ldm(extractor: PathSegDiffExtractor, denoiser: Mapping[str, Tensor], path: Path) -> None:
    """Convert and load first stage, conditioner and U-Net."""
    ensure_torchvision_imports()
    from diffusers.loaders import single_file_utils as convert

    unet = {k: v for k, v in denoiser.items() if k.startswith(UNET)}
    first = {
        k: v
        for k, v in denoiser.items()
        if k.startswith(_FIRST_STAGE) and not k.startswith(_IGNORED)
    }
    cond = {
        k.removeprefix(_CONDITIONER): v for k, v in denoiser.items() if k.startswith(_CONDITIONER)
    }
    try:
        new_unet = convert.convert_ldm_unet_checkpoint(dict(unet), _plain(extractor.unet))
        new_first = convert.convert_ldm_vae_checkpoint(dict(first), _plain(extractor.first_stage))
    except KeyError as e:
        raise CheckpointError(
            f"{path}: tensor {e.args[0]} is missing; the file is not whole"
        ) from e
    codes = first.get(_FIRST_STAGE + "quantize.embedding.weight")
    if codes is not None:
        new_first["quantize.embedding.weight"] = codes
    _refuse_left_over({**unet, **first}, {**new_unet, **new_first}, path)
    _place(extractor.unet, new_unet, path, "U-Net")
    _place(extractor.first_stage, new_first, path, "first stage")
    _place(extractor.conditioner, cond, path, "conditioner")


def _plain(module: nn.Module) -> dict[str, Any]:
    """The configuration that a diffusers network was made with."""
    config: Any = module.config
    return dict(config)


def _refuse_left_over(
    original: Mapping[str, Tensor], converted: Mapping[str, Tensor | None], path: Path
) -> None:
    """Every original tensor must have been given a place (the conversion drops what it misses)."""
    used = {t.data_ptr() for t in converted.values() if t is not None}
    for name, tensor in original.items():
        if tensor.data_ptr() not in used:
            raise CheckpointError(f"{path}: tensor {name} has no place in the architecture")


def _place(module: nn.Module, tensors: Mapping[str, Tensor | None], path: Path, part: str) -> None:
    """Load tensors as float32 into a module without memory; names and shapes must be equal."""
    places = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for name, shape in places.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{path}: {part}: tensor {name} is missing")
        if tuple(tensor.shape) != shape:
            found, wanted = list(tensor.shape), list(shape)
            raise CheckpointError(
                f"{path}: {part}: tensor {name} is {found} where the architecture has {wanted}"
            )
    for name in tensors:
        if name not in places:
            raise CheckpointError(f"{path}: {part}: tensor {name} has no place in it")
    module.load_state_dict(
        {k: t.float() for k, t in tensors.items() if t is not None}, strict=True, assign=True
    )


def _source(path: Path) -> dict[str, Any]:
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": storage.sha256_of(path),
    }

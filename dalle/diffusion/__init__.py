"""Diffusion without a network: schedules, losses, samplers and guidance (Ho et al. 2020 and later)."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    dict.fromkeys(("Denoised", "Schedule", "denoiser", "make_schedule", "respace"), "schedule")
    | dict.fromkeys(("bits_per_dim", "hybrid", "simple", "vlb_bits"), "losses")
    | dict.fromkeys(("ancestral", "ddim", "ddim_invert", "dpm_solver"), "samplers")
    | dict.fromkeys(("classifier_free", "clip_x0", "keep_known", "score_gradient"), "guidance"),
)

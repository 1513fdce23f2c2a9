"""Training: one `Trainer` for every model family, given an objective."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "EMAConfig": "config",
        "LogConfig": "config",
        "OptimizerConfig": "config",
        "PlateauConfig": "config",
        "PowerSGDConfig": "config",
        "TrainConfig": "config",
        "Trainer": "trainer",
    },
)

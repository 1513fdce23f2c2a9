"""One training loop for every family: it receives an objective and knows no model."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "TrainConfig": "trainer",
        "fit": "trainer",
    },
)

"""Lazy exports: the names of a package are imported when they are first used.

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"DVAE": "model", "DVAEConfig": "config"})
"""

import sys
from collections.abc import Callable
from importlib import import_module


def lazy_exports(package: str, homes: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` (PEP 562) of a package whose names live in its modules.

    Args:
        package: the package's `__name__`.
        homes: public name -> module, relative to the package.
    """

    def get(name: str):
        if name not in homes:
            raise AttributeError(f"{package!r} has no attribute {name!r}; public names: {', '.join(homes)}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *homes}), sorted(homes)

"""Building models on the meta device, which has shapes and no memory, and from slices of parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

WHOLE = ("normal_", "uniform_")
ELEMENTWISE = ("add_", "clamp_", "fill_", "mul_", "zero_")


class SkipRandomInit(TorchFunctionMode):
    """Omits random initialization, for which torch imports 900 modules even on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if _is_init(function) and "tensor" in kwargs:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def build_in_slices(
    make: Callable[[], nn.Module], keep: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with its parameters on the meta device, and what `keep` takes of the value of each, by name.

    Values are those of `make()`, from the same random numbers in the same order, but no more than one
    parameter is whole at a time. `keep` is called once for each initialization and must copy. Buffers and
    scalars are made as ever.
    """
    with _SlicedInit(keep) as init:
        model = make()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    return model, {name: init.slices[id(parameter)][1] for name, parameter in named.items()}


class _SlicedInit(TorchFunctionMode):
    """Replaces parameters as they are registered, and follows their initialization on slices."""

    def __init__(self, keep: Callable[[Tensor], Tensor]):
        super().__init__()
        self.keep = keep
        self.slices: dict[int, tuple[nn.Parameter, Tensor]] = {}
        """By id, which the parameter next to it keeps in use."""

    def __enter__(self):
        self.hook = register_module_parameter_registration_hook(self._register)
        return super().__enter__()

    def __exit__(self, *error):
        self.hook.remove()
        return super().__exit__(*error)

    def _register(self, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter is None or parameter.ndim == 0 or parameter.is_meta:
            return None
        shape = torch.empty_like(parameter, device="meta")
        empty = nn.Parameter(shape, requires_grad=parameter.requires_grad)
        self.slices[id(empty)] = empty, self.keep(parameter.detach())
        return empty

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        changes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if name == "requires_grad_" or not (changes and isinstance(target, Tensor) and target.is_meta):
            return function(*args, **kwargs)
        parameter, part = self.slices.get(id(target), (None, None))
        numbers = not any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values()))
        if parameter is not None and (_is_init(function) or name in WHOLE):
            whole = torch.empty(target.shape, dtype=target.dtype)
            if _is_init(function):
                function(**kwargs | {"tensor": whole})
            else:
                function(whole, *args[1:], **kwargs)
            self.slices[id(target)] = parameter, self.keep(whole)
        elif parameter is not None and name in ELEMENTWISE and numbers:
            function(part, *args[1:], **kwargs)
        else:
            raise NotImplementedError(f"{name} in the initialization of a parameter cannot be done on slices")
        return target


def _is_init(function: Any) -> bool:
    return getattr(function, "__module__", None) == "torch.nn.init"

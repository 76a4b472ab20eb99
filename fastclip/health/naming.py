"""Names for parameters: those of ``named_parameters()``, whatever wraps the model or parts of it."""

import weakref
from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from fastclip.health.history import Layer

# Wrappers that hold the model as `.module`, by class name so that nothing has to be imported.
_OUTER_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
# What torch.compile, FSDP1 and activation checkpointing put into the names of what they wrap.
_PARTS_OF_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, torch.compile and the like."""
    while True:
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif "module" in model._modules and not _OUTER_WRAPPERS.isdisjoint(c.__name__ for c in type(model).__mro__):
            model = model.get_submodule("module")
        else:
            return model


def cleaned(name: str) -> str:
    """A name as it would be without wrappers inside of the model."""
    return ".".join(part for part in name.split(".") if part not in _PARTS_OF_WRAPPERS)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in unwrapped(model).named_modules():
        yield cleaned(name), module


_FOREIGN, _FROZEN = -1, -2  # in the place of a number: not the model's; has had no gradient and needs none


class Layers:
    """The parameters of a model by number: known ones keep theirs, new ones are added at the end.

    Frozen parameters are none of them until they have a gradient. A parameter that is put in the place of another one
    takes over its name and number. Shared parameters have the first of their names.
    """

    def __init__(self, model: nn.Module | None, known: Sequence[Layer] = ()):
        self._model = model
        self._first_runs: dict[str, int] = {}
        self.layers = list(known)
        self._numbers = {layer.name: number for number, layer in enumerate(self.layers)}
        # Ids come again when parameters die, hence the reference beside the number.
        self._by_id: dict[int, tuple[weakref.ref, int]] = {}
        if not known:  # a copy of a model is not whole when the copy of its monitor is made
            self.refresh()

    def number(self, layer: Layer) -> int:
        """The number of a layer that may be new, or another one in the place of one that is known."""
        if layer.name not in self._numbers:
            self._numbers[layer.name] = len(self.layers)
            self.layers.append(layer)
            if self._first_runs:
                layer.depth = self._depth(layer)
        known = self.layers[self._numbers[layer.name]]
        known.shape, known.dtype, known.module = layer.shape, layer.dtype, layer.module
        return self._numbers[layer.name]

    def number_of_read(self, layer: Layer) -> int:
        """The same of a layer that comes out of a file, whose depth is the newest one."""
        number = self.number(layer)
        self.layers[number].depth = layer.depth
        return number

    def refresh(self) -> None:
        """Looks at the model again."""
        if self._model is None:
            return
        self._by_id = {}
        for depth, (prefix, module) in enumerate(named_modules(self._model)):
            for short, parameter in module._parameters.items():
                if parameter is None or id(parameter) in self._by_id:
                    continue
                has_none = not parameter.requires_grad and parameter.grad is None
                if has_none or isinstance(parameter, UninitializedTensorMixin):
                    self._by_id[id(parameter)] = weakref.ref(parameter), _FROZEN
                    continue
                name = f"{prefix}.{short}" if prefix else short
                layer = Layer(name, tuple(parameter.shape), _dtype(parameter), type(module).__name__, depth)
                self._by_id[id(parameter)] = weakref.ref(parameter), self.number(layer)

    def numbers_of(self, parameters: Sequence[Tensor]) -> tuple[int, ...]:
        """The number of each parameter that has a gradient, -1 for those that are not the model's."""
        numbers = tuple(map(self._number_of, parameters))
        if _FROZEN in numbers or None in numbers:
            self._look_again(parameters)
            numbers = tuple(map(self._number_of, parameters))
        return cast(tuple[int, ...], numbers)

    def has_one_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether one of the tensors is a parameter of the model, whatever its gradient."""
        parameters = [parameter for parameter in parameters if isinstance(parameter, Tensor)]
        if any(self._number_of(parameter) is None for parameter in parameters):
            self._look_again(parameters)
        return any(self._number_of(parameter) != _FOREIGN for parameter in parameters)

    def items(self) -> list[tuple[int, Tensor]]:
        """(number, parameter) of all that are alive."""
        alive = ((entry[1], entry[0]()) for entry in self._by_id.values() if entry[1] >= 0)
        return [(number, parameter) for number, parameter in alive if parameter is not None]

    def order_by(self, first_runs: dict[str, int]) -> None:
        """Sets depths from the order in which modules began to run."""
        self._first_runs = first_runs
        for layer in self.layers:
            layer.depth = self._depth(layer)

    def _depth(self, layer: Layer) -> int:
        """The place of its module, or of the nearest one around it that ran: a parent may use its parameters itself.

        Parts of the model itself that did not run are most likely not used. They come last.
        """
        name = layer.name.rpartition(".")[0]
        while name and name not in self._first_runs:
            name = name.rpartition(".")[0]
        is_known = name in self._first_runs and (name or "." not in layer.name)
        return self._first_runs[name] if is_known else len(self._first_runs) + max(layer.depth, 0)

    def _number_of(self, parameter: Tensor) -> int | None:
        """None: not seen yet."""
        entry = self._by_id.get(id(parameter))
        return entry[1] if entry is not None and entry[0]() is parameter else None

    def _look_again(self, parameters: Sequence[Tensor]) -> None:
        foreign = {key: entry for key, entry in self._by_id.items() if entry[1] == _FOREIGN and entry[0]() is not None}
        self.refresh()
        for key, entry in foreign.items():
            self._by_id.setdefault(key, entry)
        for parameter in parameters:
            if self._number_of(parameter) is None:
                self._by_id[id(parameter)] = weakref.ref(parameter), _FOREIGN


def _dtype(parameter: Tensor) -> str:
    like = parameter if parameter.grad is None else parameter.grad
    return str(like.dtype).removeprefix("torch.")

"""What a capture of a module reads: its classes, their code, its attributes, its tensors' kinds.

Two modules with equal descriptions give the same graph. Anything that cannot be described for sure
(hooks, code of unknown origin, objects that are more than their attributes) is an error, and such a
module is captured in each process. Code is known where it is torch's, this package's, LatentSync's
or diffusers': there, a module's ``forward`` computes from its arguments and its own attributes.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsync_compile.compile_cache import digest
from lsync_compile.sources import module_uuid

KNOWN = ("torch", "diffusers", "lsync_compile", "latentsync")
"""Packages whose code is known."""

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(...))
_NAMED = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)
_TENSORS = ("_parameters", "_buffers")
# Dynamo does not look at hooks either, once it has captured; a capture with some is not kept.
_NOT_STATE = frozenset({*_TENSORS, "_modules", "_compiled_call_impl"})
# What diffusers notes in a configuration of where its values come from, in random order at that.
_BOOKKEEPING = frozenset({"_use_default_values", "_name_or_path"})


class UnknownError(Exception):
    """Something cannot be described: in one line, what."""


def describe(module: nn.Module) -> list[Any]:
    """All that a capture of a module's call depends on but the arguments, as plain values.

    Raises:
        UnknownError: something in it cannot be described.
    """
    code = _Code()
    parts: list[Any] = []
    for path, child in module.named_modules(remove_duplicate=False):
        if "forward" in vars(child):
            raise UnknownError(f"{path}.forward is exchanged")
        code.add(type(child))
        state = {name: _plain(value, code) for name, value in _attributes(path, child)}
        parts.append((path, _qualified(type(child)), sorted(state.items())))
    parts.extend((path, *tensor_kind(tensor)) for path, tensor in named_tensors(module).items())
    return [*parts, *code.described()]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by path.

    Raises:
        UnknownError: one is there under two paths, so that it matters which is exchanged.
    """
    found: dict[str, Tensor] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for slots in (child._parameters, child._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    found[f"{path}.{name}".lstrip(".")] = tensor
    if len({id(tensor) for tensor in found.values()}) != len(found):
        raise UnknownError("tensors that are shared by modules")
    return found


def tensor_kind(tensor: Tensor) -> tuple[Any, ...]:
    """What is compiled into a graph of a tensor: all but the values."""
    kind, shape, stride = type(tensor).__name__, tuple(tensor.shape), tensor.stride()
    return kind, str(tensor.dtype), shape, stride, str(tensor.device), tensor.requires_grad


def modes() -> tuple[Any, ...]:
    """What torch itself is set to, as far as graphs depend on it.

    Raises:
        UnknownError: something looks at each operation, or changes it.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise UnknownError("a mode of torch is active")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise UnknownError("autocast is on")
    if torch.is_grad_enabled():
        raise UnknownError("gradients are on")
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.is_inference_mode_enabled(), deterministic, torch.get_default_dtype()


class Watch:
    """Whether a module is still what it was: its attributes, its children, their attributes.

    Values of tensors do not matter, and the tensors themselves are looked at by who passes them on.
    Lists, mappings and objects that attributes hold are compared one by one as well.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pairs: list[tuple[Any, Any]] = []
        for child in module.modules():
            for now in (vars(child), child._modules):
                self._pairs.append((now, dict(now)))
            for _, value in _attributes("", child):
                self._pairs.extend(_inside(value))

    def unchanged(self) -> bool:
        """Whether nothing has been set, added or deleted since."""
        try:
            return all(now == then for now, then in self._pairs)
        except (RuntimeError, ValueError):  # tensors and arrays that took another's place
            return False


def _attributes(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if "_hooks" in name:
            if value:
                raise UnknownError(f"{path or 'the module'} has hooks")
        elif name not in _NOT_STATE:
            yield name, value


def _inside(value: Any) -> Iterator[tuple[Any, Any]]:
    """Pairs of what an attribute holds and a copy, as far as it can be changed in place."""
    if isinstance(value, (*_CONSTANTS, *_NAMED, *_FUNCTIONS, type, nn.Module)):
        return
    if isinstance(value, Mapping):
        yield value, dict(value)
        parts: Iterable[Any] = value.values()
    elif isinstance(value, (list, set)):
        yield value, value.copy()
        parts = value
    elif isinstance(value, (tuple, frozenset)):
        parts = value
    else:
        own = getattr(value, "__dict__", {})
        yield own, dict(own)
        parts = own.values()
    for part in parts:
        yield from _inside(part)


def _plain(value: Any, code: _Code, depth: int = 0) -> Any:
    """A value as what ``repr`` tells apart.

    Raises:
        UnknownError: it is more than it shows.
    """
    if depth > 8:
        raise UnknownError("objects inside each other without end")
    if isinstance(value, Enum):
        return _qualified(type(value)), value.name
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, _NAMED):
        return str(value)
    if isinstance(value, type):
        return "class", _qualified(value)
    if isinstance(value, _FUNCTIONS):
        return "function", code.function(value)
    inner = functools.partial(_plain, code=code, depth=depth + 1)
    if isinstance(value, functools.partial):
        return "partial", inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, Mapping):
        items = [
            (inner(key), inner(part)) for key, part in value.items() if key not in _BOOKKEEPING
        ]
        return _qualified(type(value)), items
    if isinstance(value, (list, tuple)):
        return _qualified(type(value)), [inner(part) for part in value]
    if isinstance(value, (set, frozenset)):
        return _qualified(type(value)), sorted(repr(inner(part)) for part in value)
    if isinstance(value, (Tensor, nn.Module, types.MethodType)):
        raise UnknownError(f"an attribute that is a {type(value).__name__}")
    code.add(type(value))
    if any(vars(cls).get("__slots__") for cls in type(value).__mro__):
        raise UnknownError(f"a {_qualified(type(value))}, which has slots")
    return _qualified(type(value)), inner(dict(getattr(value, "__dict__", {})))


class _Code:
    """The code that classes and functions come from."""

    def __init__(self) -> None:
        self._modules: set[str] = set()
        self._called: dict[str, Any] = {}

    def add(self, cls: type) -> None:
        """A class whose instances are called, or hold something.

        Raises:
            UnknownError: it is not known code.
        """
        name = _qualified(cls)
        if name in self._called:
            return
        self._called[name] = []
        for base in cls.__mro__:
            if base is not object and base.__module__ not in ("typing", "abc", "collections"):
                self._know(base.__module__, _qualified(base))
        for method in ("forward", "__call__", "_call_impl"):
            function = getattr(cls, method, None)
            if isinstance(function, types.FunctionType):
                self._called[name].append((method, self._text(function)))

    def function(self, function: Any) -> str:
        """The name of a function that a module holds.

        Raises:
            UnknownError: it is not known code, or not all there is of it.
        """
        name = f"{function.__module__}.{function.__qualname__}"
        if isinstance(function, types.FunctionType):
            self._know(function.__module__, name)
            self._called[name] = self._text(function)
        elif isinstance(function, types.BuiltinFunctionType):
            # Of torch's own functions some do not say where they are from.
            self._know(function.__module__ or "torch", name)
        return name

    def described(self) -> list[Any]:
        """Versions and sources of all that was added."""
        roots = {name.partition(".")[0] for name in self._modules}
        ours = sorted(name for name in self._modules if name.partition(".")[0] != "torch")
        return [
            *((root, _version(root)) for root in sorted(roots)),
            *((name, _source_uuid(name)) for name in ours),
            *sorted(self._called.items(), key=lambda item: item[0]),
        ]

    def _know(self, module: str, what: str) -> None:
        if module.partition(".")[0] not in KNOWN:
            raise UnknownError(f"{what} is code that may do anything")
        self._modules.add(module)

    def _text(self, function: types.FunctionType) -> list[str]:
        """Names and code of a function and of those that it wraps."""
        parts: list[str] = []
        each: Any = function
        while isinstance(each, types.FunctionType):
            home = each.__globals__.get("__name__", "")
            self._know(home, f"{home}.{each.__qualname__}")
            code = each.__code__
            parts.append(f"{home}.{each.__qualname__} {digest([code.co_code, code.co_names])}")
            each = getattr(each, "__wrapped__", None)
        return parts


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _version(package: str) -> str:
    if package == "torch":
        return f"{torch.__version__} {torch.version.git_version}"
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return ""


@functools.cache
def _source_uuid(module: str) -> str:
    """Of a package that is edited, all that a module of it uses; of an installed one the file."""
    if module.partition(".")[0] == "diffusers":
        return _file_digest(module)
    return module_uuid(sys.modules[module])


def _file_digest(module: str) -> str:
    return digest([Path(str(sys.modules[module].__file__)).read_bytes()])

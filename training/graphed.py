"""Training steps recorded as CUDA graphs.

A step of the small UNet is two thousand small kernels forwards and twice as many backwards, which
Python launches more slowly than the GPU runs them. Recorded once for each shape, forward and
backward are one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Inputs = tuple[Tensor, ...]
Terms = Callable[..., dict[str, Tensor]]


class GraphedTerms:
    """``terms(*inputs)`` and the gradients of its ``"loss"``, replayed for each shape seen.

    On a CPU it simply computes them. Random numbers drawn on the device differ from replay to
    replay, as they should; random numbers drawn on the host would not.

    Args:
        terms: inputs to named losses; uses the device only.
        parameters: what gets gradients, in ``.grad``, overwritten by every call.
        record: whether to record at all.
    """

    def __init__(self, terms: Terms, parameters: list[Tensor], *, record: bool = True) -> None:
        self._terms = terms
        self._parameters = parameters
        self._record = record
        self._recorded: dict[tuple[torch.Size, ...], _Recording] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The terms, detached; valid until the next call."""
        if not self._record or not inputs[0].is_cuda:
            return self._compute(inputs)
        key = tuple(x.shape for x in inputs)
        if key not in self._recorded:
            self._recorded[key] = _Recording(self._compute, inputs, self._parameters)
        return self._recorded[key].replay(inputs)

    def _compute(self, inputs: Inputs) -> dict[str, Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        values = self._terms(*inputs)
        values["loss"].backward()
        return {name: value.detach() for name, value in values.items()}


class _Recording:
    """One shape: the graph, and the memory that it reads and writes."""

    WARM_UP = 3  # cuDNN's choices and lazy initialisation must not be recorded

    def __init__(
        self,
        compute: Callable[[Inputs], dict[str, Tensor]],
        inputs: Inputs,
        parameters: list[Tensor],
    ) -> None:
        self._parameters = parameters
        self._inputs = tuple(x.clone() for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_UP):
                compute(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        for parameter in parameters:
            parameter.grad = None  # made anew in the graph's own memory
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._values = compute(self._inputs)
        self._gradients = [parameter.grad for parameter in parameters]

    def replay(self, inputs: Inputs) -> dict[str, Tensor]:
        torch._foreach_copy_(list(self._inputs), list(inputs))
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._values

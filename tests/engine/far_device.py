"""A stand-in for a GPU on machines without one: its tensors have shapes and a device, and no values.

An operation that mixes it with the host raises as it would on a GPU, and so does one that waits for a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

FAR = torch.device("cuda")


class FarDevice(FakeTensorMode):
    """While active, what is made on `FAR` or from it has no values, and everything else is computed as ever."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Hand on to torch's own what is far, by an argument or by the device asked for."""
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        from_far = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if from_far or (wanted is not None and torch.device(wanted).type == FAR.type):
            return super().__torch_dispatch__(func, types, args, kwargs)
        with no_dispatch():
            return func(*args, **kwargs)


def move(module: nn.Module) -> None:
    """Move a module's parameters and buffers to `FAR`, in place and by `Module.to`'s own way."""
    # Not `to`: torch remembers what it makes far from the host's, and what is remembered cannot be swapped.
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=FAR))

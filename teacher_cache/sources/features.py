"""Networks that return the features of one of their modules."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, UnknownName, did_you_mean
from sskt.teacher_cache.format.features import FEATURES, OUTPUTS, SOFT_LABELS, Head
from sskt.teacher_cache.sources.outputs import tensor_of


def parse_output(text: str) -> tuple[str, str]:
    """Reads ``--output``.

    Args:
        text: ``soft-labels``, ``features``, ``features:MODULE`` or ``logits``.

    Returns:
        The kind, and the name of the module; empty if there is none.

    Raises:
        UnknownName: If there is no such kind.
        InputError: If a module is named for another kind than features, or its name is empty.
    """
    kind, colon, module = text.partition(":")
    if kind not in OUTPUTS:
        raise UnknownName("--output", kind, OUTPUTS)
    if colon and (kind != FEATURES or not module):
        raise InputError(f"--output {text}: expected {SOFT_LABELS}, features[:MODULE] or logits")
    return kind, module


class FeatureNetwork(nn.Module):
    """Runs a network and returns features: what one of its modules takes or returns.

    Its ``state_dict`` is that of the network, so that it has the same hash. Whatever is done to
    make a network faster is done to this one, and compared by its features.
    """

    def __init__(self, network: nn.Module, module: str, *, taken: bool = False) -> None:
        """Wraps a network, in evaluation mode.

        Args:
            network: The network.
            module: Name of the module.
            taken: Whether the features are the module's input, instead of its output.
        """
        super().__init__()
        self.network, self.module, self.taken = network, module, taken
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Features of images ``[n, 3, H, W]``: ``[n, D]``."""
        kept: list[Any] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept.append(inputs[0] if self.taken else output)

        with self.network.get_submodule(self.module).register_forward_hook(keep):
            self.network(x)
        if len(kept) != 1:
            raise InputError(
                f"module {self.module} runs {len(kept)} times in a forward pass; name one that "
                "runs once with --output features:MODULE"
            )
        return pooled(kept[0], self.module)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The ``state_dict`` of the network."""
        return self.network.state_dict(*args, **kwargs)


def pooled(output: Any, module: str) -> Tensor:
    """The features of a module's output: ``[n, D]``.

    A map ``[n, D, h, h]`` is averaged over its places, tokens ``[n, t, D]`` over the tokens.

    Raises:
        InputError: If the output is none of these.
    """
    found = tensor_of(output)
    if isinstance(found, Tensor) and found.is_floating_point():
        if found.ndim == 2:
            return found
        if found.ndim == 3:
            return found.float().mean(dim=1)
        # Images are square, so a map with other sides has its channels last.
        if found.ndim == 4 and found.shape[2] == found.shape[3]:
            return found.float().mean(dim=(2, 3))
    what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise InputError(
        f"module {module} returns {what}; expected [n, D], a square map [n, D, h, h] or tokens "
        "[n, t, D]: name another module with --output features:MODULE"
    )


def require_module(network: nn.Module, module: str) -> None:
    """Raises ``UnknownName`` unless a network has a module of that name."""
    known = [name for name, _ in network.named_modules() if name]
    if module not in known:
        listed = known if did_you_mean(module, known) else [n for n, _ in network.named_children()]
        raise UnknownName("module of the network", module, listed)


def find_head(network: nn.Module, x: Tensor) -> tuple[str, Head] | None:
    """Finds the last ``nn.Linear`` of a network whose output is what the network returns.

    Args:
        network: The network.
        x: Some of its inputs, with which it is run.

    Returns:
        The name of the layer, and its weight and bias; None if there is none.
    """
    outputs: dict[str, Any] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        outputs.pop(name, None)
        outputs[name] = output

    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    hooks = [
        layer.register_forward_hook(functools.partial(keep, name)) for name, layer in layers.items()
    ]
    try:
        returned = tensor_of(network(x))
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in reversed(outputs.items()):
        if output is returned or (output.shape == returned.shape and output.equal(returned)):
            weight = layers[name].weight
            bias = weight.new_zeros(len(weight)) if layers[name].bias is None else layers[name].bias
            return name, Head(*(t.detach().float().cpu().numpy() for t in (weight, bias)))
    return None

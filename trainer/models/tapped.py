"""torchvision's and users' networks as targets: stages tapped by module name.

The taps are forward hooks put in place when the network is built, so that ``torch.compile``
sees them, DistributedDataParallel and ``copy.deepcopy`` keep them, and parameters keep the names
that checkpoints have. A traced copy (``create_feature_extractor``) would not take a user's
network with branches in its ``forward``.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sskt.teacher_cache.errors import InputError, SsktError, UnknownName, described, first_line
from sskt.teacher_cache.own_code import load_module
from sskt.teacher_cache.sources.names import TIMM
from sskt.trainer.models.base import FIRST_STAGE, KNOWN_TAPS, Features, TargetNetwork

PROBE = 32
"""Pixels of the image that finds the stages' widths of known networks."""
USUAL = 224
QUARTERS = 4
"""Stages that are taken of a network with one resolution."""
FIRST_REDUCTION = 4
"""The first stage has a quarter of the image's resolution, as in figure 1 of the paper."""


class _Pass:
    """What the taps keep of a forward pass: nothing (None) while ``features`` does not run."""

    outputs: dict[str, Tensor] | None = None


class _Keep:
    """A forward hook that keeps a module's output; an object, so that copies keep their own."""

    def __init__(self, current: _Pass, name: str) -> None:
        self.current, self.name = current, name

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.current.outputs is not None:
            self.current.outputs[self.name] = output


class TappedNetwork(TargetNetwork):
    """A network of images whose last linear layer is the classifier ``fc``.

    ``body`` is the network without it. ``taps`` name the modules of ``body`` whose outputs
    ``[n, c, h, w]`` are the stages, in order; ``size`` is the pixels of the image that finds
    their widths. The first stage begins with the module ``begin``, by default with the first tap.
    Raises ``InputError`` if there is no such classifier or tap.
    """

    transfer_fan_out = True

    def __init__(
        self,
        name: str,
        network: nn.Module,
        classes: int,
        taps: Sequence[str],
        size: int,
        begin: str = "",
    ) -> None:
        super().__init__()
        self.name, self.taps = name, tuple(taps)
        modules = dict(network.named_modules())
        linears = [key for key, m in modules.items() if isinstance(m, nn.Linear) and key]
        if not linears:
            raise InputError(
                f"{name} has no linear classifier (nn.Linear) to replace by one of {classes} "
                "classes; take another network, or wrap it in FILE.py:factory with one at its end"
            )
        if len(set(taps)) < len(taps):
            raise InputError(f"--taps names a module of {name} twice: {', '.join(taps)}")
        self._classifier = linears[-1]
        linear = modules[self._classifier]
        assert isinstance(linear, nn.Linear)
        network.set_submodule(self._classifier, nn.Identity())
        self.body = network
        for tap in self.taps:
            if tap not in modules or tap == self._classifier:
                raise InputError(
                    f"{name} has no module '{tap}' to tap; it has e.g. {', '.join(self.tappable())}"
                )
        found = _look(name, network, self._classifier, self.taps, size, begin)
        self.stage_widths, self.width = found.widths, linear.in_features
        self._finished, self._first = found.finished, found.first
        self.fc = linear
        if linear.out_features != classes:
            self.fc = nn.Linear(linear.in_features, classes, linear.bias is not None)
        self._pass = _Pass()
        for tap in self.taps:
            network.get_submodule(tap).register_forward_hook(_Keep(self._pass, tap))

    def features(self, x: Tensor) -> Features:
        """Stage outputs and pooled features of float images ``[n, 3, h, w]``."""
        outputs = self._pass.outputs = {}
        try:
            pooled = self.body(x)
        finally:
            self._pass.outputs = None
        return Features([outputs[tap] for tap in self.taps], pooled)

    def parts_before(self, stage: int) -> list[nn.Module]:
        """All modules that have run when ``stage`` begins."""
        count = self._first if stage == 1 else self._finished.index(self.taps[stage - 2]) + 1
        done = set(self._finished[:count])
        whole = [name for name in self._finished[:count] if name.rpartition(".")[0] not in done]
        return [self.body.get_submodule(name) for name in dict.fromkeys(whole)]

    def own_key(self, key: str) -> str:
        head = f"{self._classifier}."
        return f"fc.{key.removeprefix(head)}" if key.startswith(head) else f"body.{key}"

    def published_key(self, key: str) -> str:
        if key.startswith("fc."):
            return f"{self._classifier}.{key.removeprefix('fc.')}"
        return key.removeprefix("body.")

    def tappable(self) -> list[str]:
        """Some inner modules with parts of their own."""
        inner = [
            name
            for name, module in self.body.named_modules()
            if 0 < len(name.split(".")) <= 2 and name and next(module.children(), None) is not None
        ]
        return (inner or [name for name, _ in self.body.named_children()])[:6]


@dataclass(frozen=True)
class _Found:
    """One run: the stages' widths, modules as they finish, how many before the first stage."""

    widths: tuple[int, ...]
    finished: tuple[str, ...]
    first: int


def _look(
    name: str, body: nn.Module, classifier: str, taps: Sequence[str], size: int, begin: str
) -> _Found:
    """Looks at one run of a black image."""
    finished: list[str] = []
    outputs: dict[str, tuple[Any, int]] = {}
    first: list[int] = []

    def leave(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            finished.append(key)
            if key in taps or key == classifier:
                outputs[key] = output, getattr(output, "_version", 0)

        return hook

    handles = [m.register_forward_hook(leave(key)) for key, m in body.named_modules() if key]
    if taps:
        module = body.get_submodule(begin or taps[0])
        # A tap without parameters (a ReLU) only ends its stage, which then began with the image.
        whole = next(module.parameters(), None) is not None
        handles.append(
            module.register_forward_pre_hook(lambda *_: first.append(len(finished) if whole else 0))
        )
    try:
        output = run_once(body, size)
    except Exception as error:
        raise InputError(
            f"{name} does not run on images of {size} pixels: {first_line(error)[:200]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if output is not outputs.get(classifier, (None, 0))[0] or output.ndim != 2:
        raise InputError(
            f"{name}: its last linear layer, {classifier}, must be its last step (on [n, width]), "
            "so that it can be the classifier"
        )
    for tap in taps:
        _check_tap(name, tap, finished.count(tap), *outputs.get(tap, (None, 0)))
    order = [finished.index(tap) for tap in taps]
    if order != sorted(order):
        found = ", ".join(sorted(taps, key=finished.index))
        raise InputError(f"{name} runs its taps in another order; name them as {found}")
    widths = tuple(int(outputs[tap][0].shape[1]) for tap in taps)
    return _Found(widths, tuple(finished), first[0] if first else 0)


def _check_tap(name: str, tap: str, runs: int, output: Any, version: int) -> None:
    found = hint = ""
    if runs != 1:
        found = f"runs {runs} times in one forward"
    elif not isinstance(output, Tensor) or output.ndim != 4:
        found = f"returns {type(output).__name__}"
        if isinstance(output, Tensor):
            found = f"returns a tensor of shape {list(output.shape)}"
            hint = (
                ", so tap a module that returns one, or add a module that reshapes: tokens "
                "[n, h*w, channels] of a transformer by x.transpose(1, 2).unflatten(2, (h, w))"
            )
    elif output._version != version:
        found = "gives a tensor that the next module changes in place: tap that one"
    if found:
        raise InputError(
            f"{name}: module '{tap}' {found}; a stage is one tensor [n, channels, h, w]{hint}"
        )


def torchvision_names() -> list[str]:
    """torchvision's classifiers."""
    from torchvision import models

    names: list[str] = models.list_models(module=models)
    return names


def torchvision_arch(name: str) -> str:
    """torchvision's name of a network: its VGG-16 with BatchNorm is the paper's VGG-16."""
    return "vgg16_bn" if name == "vgg16" else name


def torchvision_network(
    name: str, classes: int, small: bool, stem: str, taps: Sequence[str], size: int | None
) -> TappedNetwork:
    """A classifier of torchvision's with fresh parameters; ``small``: its CIFAR form.

    Raises ``InputError``, also for a CIFAR form of a network that has none here.
    """
    from torchvision import models

    known = KNOWN_TAPS.get(name, ())
    taps = tuple(taps) or known
    if stem == "cifar" and name not in KNOWN_TAPS:
        raise InputError(f"{name} has no CIFAR form; --stem cifar is for {', '.join(KNOWN_TAPS)}")
    if name == "vgg16" and small:
        return TappedNetwork(name, _small_vgg16(classes), classes, taps, PROBE)
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and size:
        options = {"image_size": size}
    try:
        network = models.get_model(
            torchvision_arch(name), weights=None, num_classes=classes, **options
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"{name} cannot be built for images of {size} pixels: {first_line(error)}"
        ) from error
    if small and name in KNOWN_TAPS:
        _shrink(name, network)
    probe = PROBE if name in KNOWN_TAPS else size or USUAL
    begin = FIRST_STAGE.get(name, "") if taps == known else ""
    return TappedNetwork(name, network, classes, taps, probe, begin)


def timm_network(
    name: str, classes: int, stem: str, taps: Sequence[str], size: int | None
) -> TappedNetwork:
    """A network of timm's registry with fresh parameters, ``timm/ARCH``.

    A network that takes images of one size only is built for ``size``. Without ``taps`` its
    stages are those of ``timm_target``. Raises ``UnknownName``, and ``InputError`` if it cannot be
    built or has no such taps.
    """
    import timm

    if stem != "auto":
        raise InputError(f"{name} has timm's stem; leave --stem out")
    arch = name.removeprefix(TIMM)
    if not timm.is_model(arch):
        raise UnknownName("network of timm", arch, timm.list_models())
    known = timm.get_pretrained_cfg(arch)
    options: dict[str, Any] = {}
    if known is not None and known.fixed_input_size and size and known.input_size[-1] != size:
        options = {"img_size": size}
    try:
        network = timm.create_model(arch, pretrained=False, num_classes=classes, **options)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        at = f" for images of {size} pixels" if options else ""
        raise InputError(f"{name} cannot be built{at}: {first_line(error)}") from error
    return timm_target(name, network, classes, taps, size)


def is_of_timm(network: nn.Module) -> bool:
    """Whether the class of a network is one of timm's, which list their stages."""
    return type(network).__module__.partition(".")[0] == "timm"


def timm_target(
    name: str, network: nn.Module, classes: int, taps: Sequence[str], size: int | None
) -> TappedNetwork:
    """A network of timm as a target.

    Its stages are those that timm lists, one for each resolution from a quarter of the image's
    on; of a network with one resolution, such as a ViT, the last block of each quarter. They are
    tapped where the modules return maps ``[n, c, h, w]``, and else taken from
    ``forward_intermediates``, which reshapes tokens. Raises ``InputError`` as ``TappedNetwork``.
    """
    pixels = size or USUAL
    heads = getattr(network, "default_cfg", {}).get("classifier")
    if isinstance(heads, tuple | list):
        raise InputError(
            f"{name} has {len(heads)} classifiers ({', '.join(heads)}), whose outputs it averages, "
            "as networks with a distillation token do; take a network with one, or wrap it in "
            "FILE.py:factory"
        )
    stages = _timm_stages(network) if not taps else []
    if not stages:
        return TappedNetwork(name, network, classes, taps, pixels)
    if _are_maps(network, stages, pixels):
        return TappedNetwork(name, network, classes, [s.module for s in stages], pixels)
    if not hasattr(network, "forward_intermediates"):
        return TappedNetwork(name, network, classes, (), pixels)
    return IntermediatesNetwork(name, network, classes, stages, pixels)


@dataclass(frozen=True)
class _TimmStage:
    """A stage as timm lists it: its number there, its module and its channels."""

    index: int
    module: str
    width: int


def _listed(network: nn.Module) -> list[dict[str, Any]]:
    info = getattr(network, "feature_info", None) or []
    return list(getattr(info, "info", info))


def _timm_stages(network: nn.Module) -> list[_TimmStage]:
    last: dict[int, _TimmStage] = {}
    every = []
    for index, row in enumerate(_listed(network)):
        stage = _TimmStage(index, row["module"], row["num_chs"])
        every.append(stage)
        last[row["reduction"]] = stage
    if len(last) == 1 and len(every) >= QUARTERS:
        return [every[len(every) * (i + 1) // QUARTERS - 1] for i in range(QUARTERS)]
    return [stage for reduction, stage in last.items() if reduction >= FIRST_REDUCTION]


def _are_maps(network: nn.Module, stages: Sequence[_TimmStage], size: int) -> bool:
    """Whether the modules return maps with the channels that timm lists, not changed in place."""
    modules = dict(network.named_modules())
    if not all(stage.module in modules for stage in stages):
        return False
    outputs: dict[str, list[tuple[Any, int]]] = {stage.module: [] for stage in stages}

    def keep(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[key].append((output, getattr(output, "_version", 0)))

        return hook

    handles = [modules[s.module].register_forward_hook(keep(s.module)) for s in stages]
    try:
        run_once(network, size)
    except Exception:  # TappedNetwork says what it is
        return True
    finally:
        for handle in handles:
            handle.remove()
    return all(
        len(found := outputs[stage.module]) == 1
        and isinstance(output := found[0][0], Tensor)
        and output.ndim == 4
        and output.shape[1] == stage.width
        and output._version == found[0][1]
        for stage in stages
    )


class IntermediatesNetwork(TappedNetwork):
    """A network of timm whose stages come from its ``forward_intermediates``.

    Raises ``InputError`` if that gives no maps, or other features than ``forward``.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        classes: int,
        stages: Sequence[_TimmStage],
        size: int,
    ) -> None:
        super().__init__(name, network, classes, (), size)
        self._indices = [stage.index for stage in stages]
        self.taps = tuple(stage.module for stage in stages)
        try:
            found, pooled = run_once(self, size, self.features), run_once(network, size)
        except Exception as error:
            raise InputError(
                f"{name} has no stages for transfer modules: its forward_intermediates fails on "
                f"images of {size} pixels: {first_line(error)[:200]}"
            ) from error
        if not torch.allclose(found.pooled, pooled, rtol=1e-4, atol=1e-5):
            raise InputError(
                f"{name} has no stages for transfer modules: its forward_intermediates gives "
                "other features than its forward"
            )
        self.stage_widths = tuple(int(stage.shape[1]) for stage in found.stages)
        first = f"{_listed(network)[0]['module']}."
        within = (i for i, key in enumerate(self._finished) if f"{key}.".startswith(first))
        self._first = next(within, 0)

    def features(self, x: Tensor) -> Features:
        """Stage outputs and pooled features of float images ``[n, 3, h, w]``."""
        body: Any = self.body
        last, stages = body.forward_intermediates(x, indices=self._indices)
        return Features(list(stages), body.forward_head(last))


def run_once(network: nn.Module, size: int, call: Callable[[Tensor], Any] | None = None) -> Any:
    """Runs a black image in eval mode; leaves modes, statistics and generators as they were."""
    modes = {module: module.training for module in network.modules()}
    device = next(network.parameters(), torch.zeros(0)).device
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network.eval()
            return (call or network)(torch.zeros(1, 3, size, size, device=device))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _shrink(name: str, network: nn.Module) -> None:
    """The CIFAR form: a 3x3 stem of stride 1 without pooling, so that 32 pixels stay 32."""
    if name == "mobilenet_v2":
        for key in ("features.0.0", "features.2.conv.1.0"):
            convolution = network.get_submodule(key)
            assert isinstance(convolution, nn.Conv2d)
            convolution.stride = (1, 1)
        return
    dense = name == "densenet121"
    stem, pool = ("features.conv0", "features.pool0") if dense else ("conv1", "maxpool")
    convolution = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    # As torchvision initialises the rest of these two families.
    nn.init.kaiming_normal_(
        convolution.weight, mode="fan_in" if dense else "fan_out", nonlinearity="relu"
    )
    network.set_submodule(stem, convolution)
    network.set_submodule(pool, nn.Identity())


def _small_vgg16(classes: int) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer from 512 channels, initialised as torchvision's.

    Not torchvision's class: that draws the 120 million parameters of its classifier first.
    """
    from torchvision.models import vgg

    network = nn.Sequential(
        OrderedDict(
            features=vgg.make_layers(vgg.cfgs["D"], batch_norm=True),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(1),
            classifier=nn.Linear(512, classes),
        )
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return network


def user_network(
    name: str, classes: int, stem: str, taps: Sequence[str], size: int | None
) -> TappedNetwork:
    """A user's network, ``FILE.py:factory`` or ``package.module:factory``.

    The factory is called with ``classes`` or ``num_classes`` if it takes one.
    Raises ``MissingData``, and ``InputError`` for whatever else is wrong with it.
    """
    if stem != "auto":
        raise InputError(f"{name} has the stem that it was written with; leave --stem out")
    place, _, factory = name.rpartition(":")
    try:
        module = load_module(place, f"model {name}")
        build = getattr(module, factory, None)
        if not callable(build):
            raise InputError(f"model {name}: {place} has no function '{factory}'")
        network = build(**_arguments(build, classes))
    except SsktError:
        raise
    except Exception as error:
        what = described(error)
        raise InputError(f"model {name} failed: {what}") from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise InputError(f"model {name}: {factory}() gave {kind}, not a torch Module")
    return TappedNetwork(name, network, classes, taps, size or USUAL)


def _arguments(build: Callable[..., Any], classes: int) -> dict[str, int]:
    parameters = inspect.signature(build).parameters
    if "classes" in parameters:
        return {"classes": classes}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"num_classes": classes} if takes_any or "num_classes" in parameters else {}

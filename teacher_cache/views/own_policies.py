"""View policies of the user: a function, or a pipeline of torchvision.transforms.v2.

Whatever the code draws from, its view is a function of (policy, seed, sample, pixels): the global
generators of Python, numpy and torch are seeded for each view from Philox words, and put back
afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sskt.teacher_cache.errors import InputError, SpecMismatch, SsktError, described, first_line
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.own_code import called, code_of, read_code, run_code
from sskt.teacher_cache.rng import words_of

if TYPE_CHECKING:
    from sskt.teacher_cache.views.policies import Policy

OWN = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)(?::(?P<options>.*))?")
"""``FILE.py:function`` or ``FILE.py:function:key=value,...``."""
REPLAYED = 3
"""Views of each process that are made twice, to notice code that has a state of its own."""
_FENCE = threading.Lock()  # the generators are the process's


class Words:
    """Random words of one sample under one view seed, for a policy of the user.

    ``words(k)`` is block k: four integers from 0 to 2^32 - 1. Blocks are independent, and every
    call with the same number returns the same words.
    """

    def __init__(self, sample: int, seed: int, key: int) -> None:
        self._place = (sample, seed, key)

    def __call__(self, block: int = 0) -> tuple[int, int, int, int]:
        return words_of(*self._place, block=block)


class OwnView:
    """Makes views by code of the user.

    Args:
        view: A function of an image, uint8 ``[H, W, 3]``, its ``Words`` and the parameters by name;
            or a transform of torchvision, which takes a uint8 tensor ``[3, H, W]``.
        what: The name of the policy, for messages.
    """

    def __init__(self, view: Callable[..., Any], what: str) -> None:
        self.view, self.what = view, what
        self.pipeline = is_pipeline(view)
        self.bound = False
        self._replayed = 0

    def __call__(self, policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
        made = self._once(policy, image, sample, seed)
        if self._replayed < REPLAYED:
            self._replayed += 1
            random.random()  # a state that differs from the first time
            if not np.array_equal(made, self._once(policy, image, sample, seed)):
                raise InputError(
                    f"policy {self.what}: the view of sample {sample} under seed {seed} differs "
                    "when it is made again; draw from the words, or from the generators of random, "
                    "numpy.random and torch, and keep no state"
                )
        return made

    def _once(self, policy: Policy, image: UInt8, sample: int, seed: int) -> UInt8:
        words = Words(sample, seed, policy.key)
        high, low, *_ = words()
        named = {} if self.bound else policy.parameters
        with _FENCE, seeded(high << 32 | low):
            if self.pipeline:
                return self._checked(called(self._by_tensor, self._says(), image))
            return self._checked(called(self.view, self._says(), image.copy(), words, **named))

    def _by_tensor(self, image: UInt8) -> Any:
        import torch
        from torchvision import tv_tensors

        tensor = tv_tensors.Image(torch.from_numpy(image.copy()).permute(2, 0, 1))
        made = self.view(tensor)
        if not isinstance(made, torch.Tensor) or made.dtype != torch.uint8 or made.ndim != 3:
            found = f"{made.dtype} {list(made.shape)}" if isinstance(made, torch.Tensor) else ""
            raise InputError(
                f"policy {self.what} returned {found or type(made).__name__}; a view is a uint8 "
                "tensor [3, H, W]: leave out ToDtype, ToTensor and Normalize, which the training "
                "does by itself"
            )
        return made.permute(1, 2, 0).numpy()

    def _checked(self, made: Any) -> UInt8:
        view = np.asarray(made)
        if view.dtype != np.uint8 or view.ndim != 3 or view.shape[2] != 3 or not view.size:
            raise InputError(
                f"policy {self.what} returned {view.dtype} {list(view.shape)}; a view is an array "
                "uint8 [H, W, 3]"
            )
        return np.ascontiguousarray(view)

    def _says(self) -> str:
        return f"policy {self.what}"


class FileView(OwnView):
    """Views by a function of a file. What is run is the text that was hashed, in every process."""

    def __init__(
        self, file: str, function: str, content: bytes, parameters: Mapping[str, Any]
    ) -> None:
        self._from = (file, function, content, dict(parameters))
        what = f"{Path(file).name}:{function}"
        module = _module(file, content, what)
        factory = getattr(module, function, None)
        if not callable(factory):
            raise InputError(f"policy {what}: {file} has no function '{function}'")
        view = called(factory, f"policy {what}", **parameters)
        if not callable(view):
            raise InputError(
                f"policy {what} returned {type(view).__name__}; return a function of an image and "
                "its random words, or a transform of torchvision.transforms.v2"
            )
        super().__init__(view, what)
        self.bound = True  # the parameters were given to the factory
        self.evaluation = str(getattr(module, "EVALUATION", "none"))

    def __reduce__(self) -> tuple[type[FileView], tuple[Any, ...]]:
        return FileView, self._from


def _module(file: str, content: bytes, what: str) -> Any:
    try:
        return run_code(Path(file), content)
    except SsktError:
        raise
    except Exception as error:
        failed = described(error)
        raise InputError(f"policy {what}: {file} cannot be imported: {failed}") from error


def is_pipeline(view: Any) -> bool:
    """Whether a view policy is a transform of torchvision, and not a function of the user."""
    module = type(view).__module__
    if module.startswith("torchvision.transforms"):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(view, torch.nn.Module)


def environment_of(view: Any) -> dict[str, str]:
    """What a pipeline's pixels depend on beside its code: its parameters and torchvision."""
    if not is_pipeline(view):
        return {}
    import torchvision

    return {"pipeline": repr(view), "torchvision": torchvision.__version__.partition("+")[0]}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch, and puts them back at the end."""
    torch = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    state = torch.default_generator.get_state() if torch else None
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if torch:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch:
            torch.default_generator.set_state(state)


def read_options(text: str) -> dict[str, int | float | str]:
    """``key=value,...`` to numbers, or texts where they are none."""
    found: dict[str, int | float | str] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        found[key] = value
        for kind in (float, int):
            with contextlib.suppress(ValueError):
                found[key] = kind(value)
    return found


def load_view(text: str, code: str = "") -> tuple[FileView, str, dict[str, int | float | str]]:
    """Runs the file of a policy of the user.

    Args:
        text: As ``OWN`` says.
        code: What the file has to be, ``sha256:...``; empty: anything.

    Returns:
        What makes the views, the hash of the file, and the parameters.

    Raises:
        MissingData: If there is no such file.
        SpecMismatch: If the file is another one than ``code`` says; it was not run.
        InputError: If the file cannot be used.
    """
    match = OWN.fullmatch(text)
    assert match
    content = read_code(Path(match["file"]), "policy")
    found = code_of(content)
    if code and found != code:
        raise SpecMismatch(
            f"policy {match['file']} is not the file that the labels were made with (views.code: "
            f"expected {code}, found {found}); it was not run; give that file"
        )
    parameters = read_options(match["options"] or "")
    view = FileView(str(Path(match["file"]).resolve()), match["function"], content, parameters)
    return view, found, parameters


def source_hash(function: Any) -> str:
    """The hash of the source text of a function or class that was registered.

    Raises:
        InputError: If Python does not have its text.
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        return code_of(inspect.getsource(named).encode())
    except (OSError, TypeError) as error:
        raise InputError(
            f"the source text of {named.__qualname__} is not known ({first_line(error)}), so its "
            "labels could not be told from those of a changed one; put it into a file"
        ) from error

"""Views: the uint8 image or clip that a sample becomes under a view seed, replayed exactly.

The teacher stage and the trainer both make their views by this module only. A view is a pure
function of (policy, seed, sample, pixels).
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sskt.teacher_cache.errors import BadImage, InputError, ViewMismatch
from sskt.teacher_cache.media.images import UInt8
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.views.augment import augmented, augmented_batch
from sskt.teacher_cache.views.frame_sampling import CENTER, IDENTITY, FrameSampling
from sskt.teacher_cache.views.mixing import Mixed, mixed, mixes, partners
from sskt.teacher_cache.views.policies import POLICIES, Policy, PolicyInfo, clip_frames

Int64 = NDArray[np.int64]


def check_of(view: UInt8) -> int:
    """The 32-bit view check: CRC-32 (zlib) of the view's bytes, rows of RGB triples."""
    return zlib.crc32(np.ascontiguousarray(view).data)


def require_same_view(view: UInt8, expected: int, sample: int, seed: int) -> None:
    """Compares a view with the checksum that was stored beside its label.

    Args:
        view: uint8 ``[H, W, 3]``, or ``[D, H, W, 3]`` for clips.
        expected: The stored CRC-32.
        sample: Row of the sample, for the message.
        seed: View seed, for the message.

    Raises:
        ViewMismatch: If the view is not the one that the sources saw.
    """
    if check_of(view) != expected:
        raise ViewMismatch(
            f"sample {sample} under view seed {seed} is not the image that the sources saw "
            f"(checksum {check_of(view):08x}, stored {expected:08x}): the image, its decoder or "
            "the augmentation changed; cache the labels again"
        )


def checks_of(views: UInt8) -> NDArray[np.uint32]:
    """View checks of a batch: uint32 ``[n]``."""
    return np.array([check_of(view) for view in views], dtype=np.uint32)


@dataclass(frozen=True)
class DecodedViews:
    """Views of several samples under several seeds.

    Attributes:
        rows: The samples that could be read, int64 ``[n]``.
        views: Their views by seed: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips.
        bad: The other samples, each with the reason.
        mixed: What the views of a seed were mixed with; empty under a policy that mixes none.
    """

    rows: Int64
    views: dict[int, UInt8]
    bad: list[tuple[int, str]]
    mixed: dict[int, Mixed] = field(default_factory=dict)


@dataclass(frozen=True)
class Views:
    """A target under a view policy: what the sources label and the target network is trained on.

    ``views[sample, seed]`` is uint8 ``[H, W, 3]`` RGB, or ``[D, H, W, 3]`` for clips of D frames.
    It is a pure function of policy, seed, sample and pixels. ``sskt.open_views`` makes it.

    Attributes:
        target: The samples.
        policy: The augmentation.
        f_s: The frame sampling of the paper's equation 1: the stills of a clip that a source sees.
            For images it is the identity.
        regions: Whether to decode the crop of an image only, if it is wanted under one seed. The
            views are the same, but damage elsewhere in a JPEG file may pass unnoticed.

    Raises:
        InputError: If the policy or the frame sampling is not for such a target.
        BadImage: By ``views[sample, seed]``, if the sample cannot be decoded.
        MissingData: By ``views[sample, seed]``, if its file cannot be opened.
    """

    target: Target
    policy: Policy
    f_s: FrameSampling = IDENTITY
    regions: bool = False

    def __post_init__(self) -> None:
        info, name = self.policy.info, self.target.name
        if (info.per_clip is not None) != self.target.clips:
            kind, other = ("clips", "images") if self.target.clips else ("images", "clips")
            fitting = ", ".join(
                n for n, i in POLICIES.items() if bool(i.per_clip) == self.target.clips
            )
            raise InputError(
                f"policy {self.policy.name} is for {other}, target {name} has {kind}; "
                f"choose {fitting}"
            )
        if info.windows and self.target.starts is None:
            raise InputError(f"policy {self.policy.name} needs {name} cut into windows: open_views")
        if self.f_s.clips != self.target.clips:
            what = "is of images, which have no frames" if self.f_s.clips else "holds clips"
            raise InputError(f"frame sampling {self.f_s.name}: target {name} {what}")

    @property
    def _info(self) -> PolicyInfo:
        return self.policy.info

    def identity(self) -> dict[str, Any]:
        """The part of a label set's spec that names these views."""
        identity = self.policy.identity() | {"f_s": self.f_s.identity()}
        return identity | ({"decoder": self.target.decoder} if self.target.clips else {})

    def __getitem__(self, key: tuple[int, int]) -> UInt8:
        sample, seed = key
        if mixes(self.policy):
            view: UInt8 = self.batch(np.array([sample]), seed)[0]
            return view
        return self._of_sample(sample, [seed])[seed]

    def of_image(self, image: UInt8, sample: int, seed: int) -> UInt8:
        """The view of an image already decoded; uint8 ``[H, W, 3]``, memory of its own."""
        assert self._info.per_sample is not None
        view = self._info.per_sample(self.policy, image, sample, seed)
        return self._augmented(view, sample, seed)

    def _augmented(self, view: UInt8, sample: int, seed: int) -> UInt8:
        view = augmented(self.policy, view, sample, seed)
        return np.require(view, requirements=["C", "W"])

    def of_images(self, images: UInt8, samples: Int64, seed: int) -> UInt8:
        """Views of images in RAM, uint8 ``[n, H, W, 3]`` to the same, batched if possible."""
        if self._info.batched is not None:
            views = self._info.batched(self.policy, images, samples, seed)
            return augmented_batch(self.policy, views, samples, seed)
        pairs = zip(images, samples.tolist(), strict=True)
        return np.stack([self.of_image(image, sample, seed) for image, sample in pairs])

    def _stacked(self, views: Sequence[UInt8], samples: Sequence[int]) -> UInt8:
        for sample, view in zip(samples, views, strict=True):
            if view.shape != views[0].shape:
                raise InputError(
                    f"views of {self.target.name} differ in size under policy '{self.policy}': "
                    f"{self.target.ids[samples[0]]} gives {views[0].shape[:2]}, "
                    f"{self.target.ids[sample]} gives {view.shape[:2]}; "
                    "choose random-resized-crop-flip or resize-center-crop"
                )
        return np.stack(views)

    def _of_sample(self, sample: int, seeds: Sequence[int]) -> dict[int, UInt8]:
        """Views of one sample under several seeds, its file decoded once."""
        target, policy, per_clip = self.target, self.policy, self._info.per_clip
        per_box = self._info.per_box
        if self.regions and per_box is not None and len(seeds) == 1:
            view = per_box(policy, functools.partial(target.read, sample), sample, seeds[0])
            return {seeds[0]: self._augmented(view, sample, seeds[0])}
        if per_clip is None:
            image = target.read(sample)
            with self._named(sample):
                return {seed: self.of_image(image, sample, seed) for seed in seeds}
        assert target.frames is not None
        start = None if target.starts is None else int(target.starts[sample])
        count = max(1, int(target.frames[sample]))
        wanted = {s: clip_frames(policy, sample, s, start, count).tolist() for s in seeds}
        read = target.read_frames(sample, sorted({n for frames in wanted.values() for n in frames}))
        with self._named(sample):
            made = {s: per_clip(policy, [read[n] for n in wanted[s]], sample, s) for s in seeds}
            return {s: augmented(policy, clip, sample, s) for s, clip in made.items()}

    @contextlib.contextmanager
    def _named(self, sample: int) -> Iterator[None]:
        """Names the sample whose view cannot be made."""
        try:
            yield
        except BadImage as error:
            target = self.target
            name = target.ids[sample] if target.paths is None else target.paths[sample]
            raise BadImage(
                f"{name}: {error}; replace it, or leave it out with --on-error skip"
            ) from error

    def seen(self, samples: Int64, seeds: Sequence[int]) -> DecodedViews:
        """Samples under several seeds, each decoded once.

        Args:
            samples: int64 ``[n]``.
            seeds: View seeds.

        Returns:
            The views, and the samples that cannot be decoded.

        Raises:
            MissingData: If a file cannot be opened.
            InputError: If the views differ in size.
        """
        seen = self.unmixed(samples, seeds)
        if not mixes(self.policy):
            return seen
        return self.mix(seen, lambda rows, seed: self.unmixed(rows, [seed]))

    def label_text(self, sample: int, seed: int) -> str | None:
        """The class of a view in words; of a mixed view those of both samples, with their weights.

        Args:
            sample: Number of the sample.
            seed: View seed.

        Returns:
            The text; None if no class is known.
        """
        text = self.target.label_text
        if not mixes(self.policy):
            return text(sample)
        seen = self.seen(np.array([sample]), [seed])
        if seen.bad:
            return text(sample)
        other, weight = int(seen.mixed[seed].partners[0]), float(seen.mixed[seed].weights[0])
        return (
            f"{text(sample) or 'unknown'} ({weight:.0%}) and {text(other) or 'unknown'} "
            f"({1 - weight:.0%}, sample {other})"
        )

    def mix(self, seen: DecodedViews, read: Callable[[Int64, int], DecodedViews]) -> DecodedViews:
        """Mixes each view with that of its partner, unless that cannot be decoded.

        Args:
            seen: What ``unmixed`` returned.
            read: Gives the partners' own views, as ``unmixed`` under one seed.

        Returns:
            What ``seen`` returns for these samples.

        Raises:
            InputError: If the views differ in size.
        """
        count, found = len(self.target), DecodedViews(seen.rows, {}, seen.bad)
        for seed, views in seen.views.items():
            others = partners(self.policy, seen.rows, seed, count)
            decoded = read(np.unique(others), seed)
            place = {row: i for i, row in enumerate(decoded.rows.tolist())}
            made, weights = views.copy(), np.ones(len(others), np.float32)
            if place:
                self._stacked(
                    [views[0], decoded.views[seed][0]], [int(seen.rows[0]), int(decoded.rows[0])]
                )
            for i, (row, other) in enumerate(zip(seen.rows.tolist(), others.tolist(), strict=True)):
                if other in place:
                    theirs = decoded.views[seed][place[other]]
                    made[i], weights[i] = mixed(self.policy, views[i], theirs, row, seed)
            found.views[seed], found.mixed[seed] = made, Mixed(others, weights)
        return found

    def unmixed(self, samples: Int64, seeds: Sequence[int]) -> DecodedViews:
        """Each sample's own views, as ``seen`` gives them under policies that do not mix."""
        if self.target.images is not None:
            images = self.target.images[samples]
            made = {seed: self.of_images(images, samples, seed) for seed in seeds if len(samples)}
            return DecodedViews(samples, made, [])
        views: dict[int, list[UInt8]] = {seed: [] for seed in seeds}
        rows: list[int] = []
        bad: list[tuple[int, str]] = []
        for sample in samples.tolist():
            try:
                of_sample = self._of_sample(sample, seeds)
            except BadImage as error:
                bad.append((sample, str(error)))
                continue
            rows.append(sample)
            for seed, view in of_sample.items():
                views[seed].append(view)
        stacked = {seed: self._stacked(each, rows) for seed, each in views.items() if each}
        return DecodedViews(np.array(rows, np.int64), stacked, bad)

    def stills(self, views: UInt8, samples: Int64, seed: int) -> UInt8:
        """The images that a source sees: equation 1's f_s of the views.

        Args:
            views: uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips.
            samples: The samples of the views, int64 ``[n]``.
            seed: View seed.

        Returns:
            The views themselves, or the K stills of each clip, uint8 ``[n, K, H, W, 3]``.

        Raises:
            InputError: If the number of stills differs between clips.
        """
        if not self.target.clips:
            return views
        depth = views.shape[1]
        stills = [
            view[self.f_s.frames(depth, int(s), seed)]
            for view, s in zip(views, samples, strict=True)
        ]
        counts = sorted({len(some) for some in stills})
        if len(counts) > 1:
            raise InputError(
                f"frame sampling {self.f_s.name} gave {' and '.join(map(str, counts))} stills; "
                "expected as many for every clip"
            )
        return np.stack(stills)

    def batch(self, samples: Int64, seed: int) -> UInt8:
        """Stacks the views of several samples.

        Args:
            samples: int64 ``[n]``.
            seed: View seed.

        Returns:
            uint8 ``[n, H, W, 3]``, or ``[n, D, H, W, 3]`` for clips.

        Raises:
            BadImage: If a sample cannot be decoded.
        """
        seen = self.seen(samples, [seed])
        if seen.bad:
            raise BadImage(seen.bad[0][1])
        return seen.views[seed]


def open_views(target: Target, policy: Policy, f_s: FrameSampling | None = None) -> Views:
    """Puts a target under a policy.

    Args:
        target: The samples. Under an evaluation policy of clips they are cut into windows.
        policy: The augmentation.
        f_s: Frame sampling; default: the centre frame of a clip.

    Returns:
        The views.

    Raises:
        InputError: If the policy is not for such a target.
    """
    if policy.info.windows and target.clips:
        target = target.windows(int(policy.parameters["frames"]))
    return Views(target, policy, f_s or (CENTER if target.clips else IDENTITY))

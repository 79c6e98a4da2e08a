"""View policies of the user: functions of policy, seed, sample and pixels, chosen by no data."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY
from torchvision import transforms as v1
from torchvision.transforms import v2

import sskt as public
from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, SpecMismatch, UnknownName
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.views.own_policies import seeded
from sskt.teacher_cache.views.policies import (
    POLICIES,
    evaluation_policy,
    parse_policy,
    register_policy,
)
from sskt.teacher_cache.views.views import Views
from sskt.trainer.config import TrainConfig, make_config, read_config
from sskt.trainer.loop.runs import run_training
from sskt.trainer.loop.setup import make_plan
from sskt.trainer.loop.trained import open_run

Call = Callable[..., tuple[int, str, str]]

OWN = """
import random
import numpy as np
import torch
from torchvision.transforms import v2

EVALUATION = "resize-center-crop:resize=20,size=20"

def brighter(strength=40):
    def view(image, words):
        w0, w1, _, _ = words()
        shift = w0 % (2 * strength) - strength
        flipped = image[:, ::-1] if words(1)[0] % 2 else image
        return np.clip(flipped.astype(int) + shift, 0, 255).astype(np.uint8)[:20, :20]
    return view

def strong():
    return v2.Compose([v2.RandomCrop(20), v2.RandAugment(), v2.RandomErasing(p=0.5)])

def anyhow():
    def view(image, words):
        noise = np.random.randint(0, 9) + random.randrange(9) + int(torch.randint(9, (1,)))
        return (image[:20, :20] // 2 + noise).astype(np.uint8)
    return view

class Counting:
    calls = 0
    def __call__(self, image, words):
        self.calls += 1
        return (image // 2 + self.calls).astype(np.uint8)

def stateful():
    return Counting()

def floats():
    return v2.ToDtype(torch.float32, scale=True)

def mixing():
    return v2.CutMix(num_classes=3)

def wrong():
    return lambda image, words: image[..., 0]

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(POLICIES)
    yield
    POLICIES.clear()
    POLICIES.update(before)


def views_of(images: Path, text: str) -> Views:
    return Views(open_target(str(images)), parse_policy(text))


def random_transforms() -> dict[str, v2.Transform]:
    """All of torchvision's transforms that draw, each with arguments that make it draw."""
    identity = v2.Identity()
    made: dict[str, v2.Transform] = {
        "AugMix": v2.AugMix(),
        "AutoAugment": v2.AutoAugment(),
        "ColorJitter": v2.ColorJitter(0.4, 0.4, 0.4, 0.2),
        "ElasticTransform": v2.ElasticTransform(),
        "GaussianBlur": v2.GaussianBlur(5),
        "JPEG": v2.JPEG((5, 60)),
        "RandAugment": v2.RandAugment(),
        "RandomAdjustSharpness": v2.RandomAdjustSharpness(2, 0.5),
        "RandomAffine": v2.RandomAffine(20),
        "RandomApply": v2.RandomApply([v2.RandomHorizontalFlip(1)]),
        "RandomAutocontrast": v2.RandomAutocontrast(0.5),
        "RandomChannelPermutation": v2.RandomChannelPermutation(),
        "RandomChoice": v2.RandomChoice([identity, v2.RandomVerticalFlip(1)]),
        "RandomCrop": v2.RandomCrop(16),
        "RandomEqualize": v2.RandomEqualize(0.5),
        "RandomErasing": v2.RandomErasing(0.7),
        "RandomGrayscale": v2.RandomGrayscale(0.5),
        "RandomHorizontalFlip": v2.RandomHorizontalFlip(),
        "RandomInvert": v2.RandomInvert(0.5),
        "RandomOrder": v2.RandomOrder([v2.RandomHorizontalFlip(), v2.ColorJitter(0.4)]),
        "RandomPerspective": v2.RandomPerspective(),
        "RandomPhotometricDistort": v2.RandomPhotometricDistort(),
        "RandomPosterize": v2.RandomPosterize(3, 0.5),
        "RandomResize": v2.RandomResize(12, 30),
        "RandomResizedCrop": v2.RandomResizedCrop(16),
        "RandomRotation": v2.RandomRotation(20),
        "RandomShortestSize": v2.RandomShortestSize([12, 16, 20]),
        "RandomSolarize": v2.RandomSolarize(128, 0.5),
        "RandomVerticalFlip": v2.RandomVerticalFlip(),
        "RandomZoomOut": v2.RandomZoomOut(),
        "ScaleJitter": v2.ScaleJitter((24, 24)),
        "TrivialAugmentWide": v2.TrivialAugmentWide(),
    }
    made["of version 1"] = v1.Compose([v1.RandomHorizontalFlip(), v1.RandomRotation(30)])
    return made


UNCHANGED = {"RandomAutocontrast"}  # the images have all values already
# Need boxes, or a batch with labels, or keep the image as it is.
OTHERS = {"RandomIoUCrop", "RandomTransform"}


def test_all_random_transforms_are_tried() -> None:
    named = {n for n in dir(v2) if n.startswith("Random") or n in ("AugMix", "AutoAugment")}
    assert named - OTHERS <= set(random_transforms())


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
@pytest.mark.parametrize("name", random_transforms())
def test_a_pipeline_is_a_function_of_sample_and_seed(
    name: str, images: Path, registered: None
) -> None:
    """Whatever was drawn before, in whatever order; seeds differ, and nothing is left behind."""
    register_policy("pipeline", random_transforms()[name])
    views = views_of(images, "pipeline")
    places = [(sample, seed) for sample in range(4) for seed in range(6)]
    first = {place: views[place] for place in places}
    torch.manual_seed(1234)
    random.seed(5)
    np.random.seed(6)
    before = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(1234)
    random.seed(5)
    np.random.seed(6)
    again = views_of(images, "pipeline")
    for place in reversed(places):
        assert np.array_equal(again[place], first[place]), place
    after = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    distinct = {views[0, seed].tobytes() for seed in range(6)}
    assert len(distinct) > 1 or name in UNCHANGED


def _digest_of(views: Views) -> list[int]:
    from sskt.teacher_cache.views.views import check_of

    return [check_of(views[sample, seed]) for sample in range(3) for seed in range(2)]


@pytest.mark.parametrize("function", ["brighter", "brighter:strength=10", "strong", "anyhow"])
@pytest.mark.slow
def test_another_process_makes_the_same_views(images: Path, own: Path, function: str) -> None:
    """Also one that was not forked: the policy goes there with the text that was hashed."""
    views = views_of(images, f"{own}:{function}")
    here = _digest_of(views)
    own.write_text("raise SystemExit('this file was run again')\n")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_digest_of, [views]) == here
    assert _digest_of(pickle.loads(pickle.dumps(views))) == here


def test_the_identity_has_code_and_parameters(images: Path, own: Path) -> None:
    one, other = (parse_policy(f"{own}:brighter:strength={s}") for s in (10, 20))
    assert one.identity()["parameters"] == {"strength": 10}
    assert one.identity()["code"].startswith("sha256:") and one.key != other.key
    strong = parse_policy(f"{own}:strong").identity()
    assert "RandAugment" in strong["pipeline"] and strong["torchvision"].startswith("0.")
    assert one == parse_policy(f"{own}:brighter:strength=10")
    own.write_text(OWN + "\n# changed\n")
    changed = parse_policy(f"{own}:brighter:strength=10")
    assert changed != one and changed.key != one.key
    assert str(one) == f"{own}:brighter:strength=10"
    assert evaluation_policy(one).parameters == {"resize": 20, "size": 20}
    with pytest.raises(SpecMismatch, match="is not the file that the labels were made with"):
        parse_policy(f"{own}:brighter", "sha256:0")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("stateful", r"policy own\.py:stateful: the view of sample 0 under seed 0 differs when it"),
        ("floats", r"policy own\.py:floats returned torch\.float32 .*leave out ToDtype, ToTensor"),
        ("mixing", r"policy own\.py:mixing failed: "),
        ("wrong", r"policy own\.py:wrong returned uint8 \[\d+, \d+\]; a view is an array uint8"),
        ("nothing", r"policy own\.py:nothing returned int; return a function of an image"),
        ("absent", r"policy own\.py:absent: .*own\.py has no function 'absent'"),
        ("brighter:size=3", r"policy own\.py:brighter failed: TypeError: .*'size'"),
    ],
)
def test_what_is_no_policy_is_named(images: Path, own: Path, function: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = views_of(images, f"{own}:{function}")[0, 0]


def test_registered_policies(images: Path, registered: None) -> None:
    def shifted(image: Any, words: Any, by: int) -> Any:
        return np.roll(image, words()[0] % (by + 1), axis=1)

    public.register_policy("shifted", shifted, parameters={"by": 5})
    views = views_of(images, "shifted:by=3")
    assert views.policy.identity()["parameters"] == {"by": 3}
    assert views.policy.identity()["code"].startswith("sha256:")
    assert any(not np.array_equal(views[0, s], views.target.read(0)) for s in range(8))
    assert {v.tobytes() for v in (views[0, s] for s in range(40))} <= {
        np.roll(views.target.read(0), by, axis=1).tobytes() for by in range(4)
    }
    with pytest.raises(InputError, match="policy none is one of sskt's own"):
        register_policy("none", shifted)
    with pytest.raises(InputError, match="a name has letters"):
        register_policy("own.py:f", shifted)
    with pytest.raises(UnknownName, match="unknown policy 'middle'"):
        register_policy("other", shifted, evaluation="middle")
    with pytest.raises(UnknownName, match="unknown parameter of policy shifted 'width'"):
        parse_policy("shifted:width=3")


def test_generators_are_put_back_after_an_error() -> None:
    state = torch.default_generator.get_state()
    with pytest.raises(ZeroDivisionError), seeded(3):
        torch.rand(1)
        raise ZeroDivisionError
    assert torch.equal(torch.default_generator.get_state(), state)


@pytest.mark.parametrize("function", ["brighter:strength=10", "strong"])
def test_labelled_verified_and_trained_from_the_command_line(
    sskt: Call, images: Path, own: Path, tmp_path: Path, function: str
) -> None:
    cache, out, source = tmp_path / "labels", tmp_path / "run", f"tiny={TINY}:build"
    policy = ("--policy", f"{own}:{function}")
    status, _, err = sskt("cache-teachers", "--source", source, "--target", images, *policy,
                          "--seeds", 2, "--cache", cache)  # fmt: skip
    assert status == 0, err
    again = ("verify", "--cache", cache, "--recompute", 6, "--source", source)
    status, _, err = sskt(*again)
    assert status == 2 and f"give --policy own.py:{function}" in err
    status, printed, err = sskt(*again, *policy)
    assert status == 0, printed + err
    training = ("train", "--target", images, "--tm", "--cache", cache, "--epochs", 3)
    training += ("--batch-size", 16, "--schedule", "constant", "--out", out)  # type: ignore[assignment]
    status, _, err = sskt(*training)
    assert status == 2 and f"give --policy own.py:{function}" in err
    status, printed, err = sskt(*training, *policy, "--workers", 2)
    assert status == 0 and "test top-1" in printed, err
    assert read_config(out / "config.json")["policy"] == f"{own}:{function}"
    more = ("train", "--resume", "--out", out, "--epochs", 4)
    status, _, err = sskt(*more)
    assert status == 2 and "the policy of" in err and "is code" in err
    assert sskt(*more, *policy)[0] == 0
    text = own.read_text()
    own.write_text("raise SystemExit('this file was run')\n")
    network = open_run(out, device="cpu")
    assert network.view_size == 20 and network.evaluate()["samples"] > 0
    own.write_text(text + "\n# changed\n")
    status, _, err = sskt(*again, *policy)
    assert status == 2 and "it was not run; give that file" in err
    status, _, err = sskt(*training[:-1], tmp_path / "other", *policy)
    assert status == 2 and "labels" in err


def test_a_changed_view_is_noticed_even_if_the_identity_is_the_same(
    config: TrainConfig, tmp_path: Path, own: Path, images: Path, sskt: Call
) -> None:
    """The code reads a file beside it: its hash stays, and the view check finds the change."""
    from sskt.teacher_cache.errors import ViewMismatch

    (tmp_path / "by").write_text("1")
    own.write_text(
        "from pathlib import Path\n"
        "def view():\n"
        f"    by = int(Path({str(tmp_path / 'by')!r}).read_text())\n"
        "    return lambda image, words: image // 2 + by\n"
    )
    policy = f"{own}:view"
    status, _, err = sskt("cache-teachers", "--source", f"tiny={TINY}:build", "--target", images,
                          "--policy", policy, "--seeds", 1, "--cache", tmp_path / "c")  # fmt: skip
    assert status == 0, err
    (tmp_path / "by").write_text("2")
    changed = replace(config, policy=policy, cache=tmp_path / "c", epochs=1, out=tmp_path / "run")
    with pytest.raises(ViewMismatch):
        run_training(changed)


def test_data_chooses_no_policy(
    sskt: Call, label_cache: Path, images: Path, own: Path, tmp_path: Path
) -> None:
    """A label set and a run that name a file: it is not run, wherever they are read."""
    cache = shutil.copytree(label_cache, tmp_path / "labels")
    group = next(cache.glob("[!.]*")) / "zarr.json"
    document = json.loads(group.read_text())
    about = document["attributes"]["sskt"]
    about["spec"]["views"] |= {"policy": f"{own}:brighter", "parameters": {}, "code": "sha256:1"}
    from sskt.teacher_cache.format.spec import digest_of

    about["digest"] = digest_of(about["spec"])
    group.write_text(json.dumps(document))
    own.write_text("raise SystemExit('this file was run')\n")
    (label_set,) = list_label_sets(cache)
    assert label_set.samples
    source = f"tiny={TINY}:build"
    for command in (
        ["verify", "--cache", cache, "--recompute", 2, "--source", source, "--target", images],
        ["inspect", "--cache", cache, "--source", source, "--target", images],
        ["train", "--target", images, "--tm", "--cache", cache, "--epochs", 1],
        ["ls", "--cache", cache],
    ):
        status, out, err = sskt(*command)
        assert "this file was run" not in out + err
        assert command[0] != "train" or (status == 2 and "is not run" in err), err
    plan_of = make_config({"target": str(images), "policy": f"{own}:brighter"})
    with pytest.raises(SystemExit):  # named by the person who trains
        make_plan(plan_of)

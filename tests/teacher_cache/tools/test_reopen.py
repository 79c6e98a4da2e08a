"""Opening what a set was made from: provenance never chooses code; the right file does."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import TINY, one_line
from support.servers import serving
from torchvision import models

from sskt.teacher_cache.errors import CorruptStore, InputError, SpecMismatch
from sskt.teacher_cache.label_sets.create import list_label_sets
from sskt.teacher_cache.tools.recompute import recompute
from sskt.teacher_cache.tools.reopen import (
    Reopen,
    reopen,
    reopen_policy,
    reopen_source,
    reopen_views,
)
from sskt.teacher_cache.tools.verify import Report, probe_pairs

Call = Callable[..., tuple[int, str, str]]
RIGHT = f"tiny={TINY}:build"


@pytest.fixture
def cache(label_cache: Path, images: Path, tmp_path: Path) -> Path:
    """A copy of a small cache of the source ``tiny=tests/networks/tiny.py:build``."""
    folder = shutil.copytree(label_cache, tmp_path / "cache")
    forged(folder, source=RIGHT, target=str(images))
    return folder


def forged(cache: Path, **provenance: Any) -> None:
    """Gives every set of a cache another provenance, which no digest covers."""
    for file in cache.glob("*/zarr.json"):
        document = json.loads(file.read_text())
        attributes = document["attributes"]["sskt"]
        attributes["made"] = attributes.get("made", {}) | provenance
        file.write_text(json.dumps(document))


def marking(flag: Path, body: str = "") -> str:
    """Python code that leaves a mark when it is run."""
    return f"from pathlib import Path\nPath({str(flag)!r}).touch()\n{body}"


# --- provenance chooses no code ---------------------------------------------------------------


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that exists once foreign code was run; modules and files that would run it."""
    flag, lab = tmp_path / "was run", tmp_path / "lab"
    lab.mkdir()
    for name in ("evil.py", "evil_module.py"):
        (lab / name).write_text(marking(flag, "def f(*_):\n    return None\n"))
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 3, 8, 8),))
    for name in ("evil.pt", "evil.pt2"):
        torch.export.save(program, lab / name)
    monkeypatch.syspath_prepend(str(lab))

    def aborted() -> None:
        flag.touch()
        raise AssertionError("os.abort was called")

    monkeypatch.setattr(os, "abort", aborted)
    yield flag
    sys.modules.pop("evil_module", None)
    assert not flag.exists(), "code that a label set named was run"


FORGED = {
    "function of a module": {"source": "tiny=os:abort"},
    "own module": {"source": "tiny=evil_module:f"},
    "file": {"source": "tiny=LAB/evil.py:f"},
    "program": {"source": "tiny=LAB/evil.pt2"},
    "program by another ending": {"source": "tiny=LAB/evil.pt"},
    "weights": {"source": "imagenet:resnet18", "weights": "LAB/evil.pt"},
}


@pytest.mark.parametrize("over", ["folder", "http"])
@pytest.mark.parametrize("what", FORGED)
def test_a_forged_source_is_not_opened(
    what: str, over: str, cache: Path, flag: Path, sskt: Call
) -> None:
    lab = str(flag.parent / "lab")
    forged(cache, **{k: v.replace("LAB", lab) for k, v in FORGED[what].items()})
    with serving(cache) as url:
        at = url if over == "http" else cache
        status, _, err = sskt("verify", "--cache", at, "--recompute", 3)
        assert status == 2 and ("give --source tiny=" in err or "give --weights" in err), err
        one_line(err)
        status, out, err = sskt("inspect", "--cache", at)
        assert status == 0 and "not recomputed: label set" in out, err
    (label_set,) = list_label_sets(cache)
    with pytest.raises(InputError, match=r"a label set names is not (run|opened)"):
        reopen(label_set, Reopen())


def test_a_forged_target_is_data_and_no_code(cache: Path, flag: Path, sskt: Call) -> None:
    forged(cache, target=f"{flag.parent}/lab/evil.py:f")
    status, _, err = sskt("verify", "--cache", cache, "--recompute", 3, "--source", RIGHT)
    assert status == 2 and "does not record how its target" in one_line(err)


def test_provenance_of_another_shape_is_damage(cache: Path, sskt: Call) -> None:
    for value in ({"source": ["os:abort"]}, {"limit": "3"}, {"root": 5}):
        forged(cache, **value)
        status, _, err = sskt("verify", "--cache", cache, "--recompute", 3)
        assert status == 1 and "damaged" in one_line(err)
        forged(cache, **dict.fromkeys(value))


# --- the file that the person names -----------------------------------------------------------


def test_the_right_file_is_run_wherever_it_lies(cache: Path, tmp_path: Path, sskt: Call) -> None:
    moved = shutil.copy(TINY, tmp_path / "tiny.py")
    with serving(cache) as url:
        for at, text in ((cache, RIGHT), (url, f"tiny={moved}:build")):
            status, out, err = sskt("verify", "--cache", at, "--recompute", 5, "--source", text)
            assert status == 0 and "5 recomputed" in out and ": clean" in out, err
            shown = json.loads(sskt("inspect", "--cache", at, "--source", text, "--json")[1])
            assert shown["sources"][0]["live"]["distance"] < 1e-3


def test_a_changed_file_is_not_run(cache: Path, tmp_path: Path, sskt: Call) -> None:
    flag = tmp_path / "was run"
    (tmp_path / "tiny.py").write_text(TINY.read_text() + marking(flag))
    text = f"tiny={tmp_path}/tiny.py:build"
    status, _, err = sskt("verify", "--cache", cache, "--recompute", 5, "--source", text)
    assert status == 2 and "is not the file that the labels were made with" in one_line(err)
    assert "source.code: expected sha256:" in err and "it was not run" in err
    status, out, _ = sskt("inspect", "--cache", cache, "--source", text)
    assert status == 0 and "not recomputed: source tiny" in out
    assert not flag.exists()


def test_a_changed_module_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sskt: Call
) -> None:
    flag = tmp_path / "was run"
    (tmp_path / "changed_lab.py").write_text(TINY.read_text() + marking(flag))
    shutil.copy(TINY, tmp_path / "same_lab.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    (label_set,) = list_label_sets(cache)
    with pytest.raises(SpecMismatch, match="it was not run"):
        reopen_source(label_set, Reopen(sources=["tiny=changed_lab:build"]))
    assert not flag.exists() and "changed_lab" not in sys.modules
    source = reopen_source(label_set, Reopen(sources=["tiny=same_lab:build"]))
    assert source.weights == label_set.spec["source"]["weights"]
    sys.modules.pop("same_lab")


def test_a_changed_program_is_not_opened(images: Path, tmp_path: Path, sskt: Call) -> None:
    namespace: dict[str, Any] = {}
    exec(TINY.read_text(), namespace)
    network, file = namespace["build"]().eval(), tmp_path / "net.pt2"
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(network, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=batch)
    torch.export.save(program, file)
    ask = ["cache-teachers", "--source", f"own={file}", "--target", images, "--seeds", 1]
    ask += ["--policy", "none", "--preprocessing", "size=16,mean=0.5,std=0.5", "--workers", 0]
    assert sskt(*ask, "--cache", tmp_path / "cache")[0] == 0
    verify = ("verify", "--cache", tmp_path / "cache", "--recompute", 3)
    status, _, err = sskt(*verify)
    assert status == 2 and "give --source own=FILE, the file net.pt2" in one_line(err)
    status, out, err = sskt(*verify, "--source", f"own={file}")
    assert status == 0 and ": clean" in out, err
    file.write_bytes(b"PK" + file.read_bytes())
    status, _, err = sskt(*verify, "--source", f"own={file}")
    assert status == 2 and "it was not run" in one_line(err)


def test_a_source_that_no_set_has_is_an_error(cache: Path, sskt: Call) -> None:
    for command in (("verify", "--recompute", 1), ("inspect",)):
        status, _, err = sskt(*command, "--cache", cache, "--source", f"other={TINY}:build")
        assert status == 2 and "no label set of source other was chosen" in one_line(err)


def test_weights_are_read_where_the_person_points(images: Path, tmp_path: Path, sskt: Call) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        network = models.squeezenet1_1(num_classes=1000)
    home = tmp_path / "home"
    home.mkdir()
    torch.save(network.state_dict(), home / "w.pth")
    ask = ["cache-teachers", "--source", "imagenet:squeezenet1_1@64", "--target", images]
    ask += ["--policy", "none", "--limit", 6, "--seeds", 1, "--workers", 0]
    assert sskt(*ask, "--weights", home / "w.pth", "--cache", tmp_path / "cache")[0] == 0
    verify = ("verify", "--cache", tmp_path / "cache", "--recompute", 2)
    status, _, err = sskt(*verify)
    assert status == 2 and "weights of its own" in err and "give --weights FILE" in one_line(err)
    (tmp_path / "empty").mkdir()
    assert sskt(*verify, "--weights", tmp_path / "empty")[0] == 2
    for where in (home / "w.pth", home, tmp_path):
        status, out, err = sskt(*verify, "--weights", where)
        assert status == 0 and ": clean" in out, err


# --- own datasets and modules -----------------------------------------------------------------

LAB = """
import numpy as np
import torch
from torch import nn
import sskt


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        return rng.integers(0, 256, (10, 10, 3), np.uint8), i % 3


class Teacher(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.layer = nn.Linear(300, 5)

    def forward(self, x):
        return self.layer(x.flatten(1))


def target():
    return sskt.open_target(Numbers(), name="numbers")


def source():
    return sskt.freeze(Teacher(), name="own", size=10, mean=(0.5,) * 3, std=(0.5,) * 3,
                       device="cpu")
"""


def test_own_datasets_and_modules_are_reopened_from_their_file(tmp_path: Path, sskt: Call) -> None:
    """The labels are made by another module, as by a script that was run."""
    import importlib.util

    import sskt as public

    file, other = tmp_path / "lab.py", tmp_path / "other.py"
    file.write_text(LAB.replace("SEED", "1"))
    other.write_text(LAB.replace("SEED", "2"))
    spec = importlib.util.spec_from_file_location("a_script", file)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["a_script"] = script
    spec.loader.exec_module(script)
    cache = tmp_path / "cache"
    public.cache_teachers(script.target(), script.source(), cache=cache, seeds=2, workers=0)
    del sys.modules["a_script"]
    (label_set,) = list_label_sets(cache)
    assert label_set.spec["source"]["arch"] == "a_script.Teacher"
    verify = ("verify", "--cache", cache, "--recompute", 8)
    status, _, err = sskt(*verify)
    assert status == 2 and "how its target (numbers) is opened; give --target" in one_line(err)
    target = ("--target", f"{file}:target")
    status, _, err = sskt(*verify, *target)
    assert status == 2 and "give a file with --source own=FILE.py:function" in one_line(err)
    status, out, err = sskt(*verify, *target, "--source", f"own={file}:source")
    assert status == 0 and "8 recomputed" in out and ": clean" in out, err
    status, out, err = sskt("inspect", "--cache", cache, *target, "--source", f"own={file}:source")
    assert status == 0 and "distance, stored to recomputed" in out, err
    for text, message in (
        (f"own={other}:source", "source.weights is 'sha256:"),
        (f"own={file}:target", "returned Target; return what sskt.freeze returned"),
        (f"own={file}:gone", "has no function 'gone'"),
        (f"own={file}:Teacher.x", "expected NAME=FILE.py"),
    ):
        status, _, err = sskt(*verify, *target, "--source", text)
        assert status == 2 and message in one_line(err)
    status, _, err = sskt(*verify, "--target", f"{file}:source", "--source", f"own={file}:source")
    assert status == 2 and "returned Source; return what sskt.open_target" in one_line(err)


PROBABILITIES = """
from torch import nn, Generator, no_grad, randn

MEAN, STD, SIZE = (0.5,) * 3, (0.25,) * 3, 8

def build():
    layer = nn.Linear(192, 5, bias=False)
    with no_grad():
        layer.weight.copy_(randn(5, 192, generator=Generator().manual_seed(0)))
    return nn.Sequential(nn.Flatten(), layer, nn.LAST)
"""


@pytest.mark.parametrize(
    ("last", "kind"), [("Softmax(1)", "probabilities"), ("Sigmoid()", "logits")]
)
def test_what_was_declared_of_outputs_is_kept(
    last: str, kind: str, images: Path, tmp_path: Path, sskt: Call
) -> None:
    (tmp_path / "net.py").write_text(PROBABILITIES.replace("LAST", last))
    source, cache = ("--source", f"net={tmp_path}/net.py:build"), ("--cache", tmp_path / "cache")
    ask = ("cache-teachers", *source, *cache, "--target", images, "--seeds", 1, "--workers", 0)
    status, _, err = sskt(*ask)
    assert status == 2 and "--logits-are probabilities" in one_line(err)
    for option in ("odds", f"other={kind}"):
        assert sskt(*ask, "--logits-are", option)[0] == 2
    status, _, err = sskt(*ask, "--logits-are", f"net={kind}")
    assert status == 0, err
    (label_set,) = list_label_sets(tmp_path / "cache")
    assert label_set.spec["source"].get("outputs", "logits") == kind
    status, out, err = sskt("verify", *cache, "--recompute", 6, *source)
    assert status == 0 and ": clean" in out, err


def test_recomputing_goes_on_after_a_damaged_shard(cache: Path, sskt: Call) -> None:
    (file,) = cache.glob("*/labels/c/1/0/0")
    file.write_bytes(bytes(file.stat().st_size))
    ask = ("verify", "--cache", cache, "--recompute", 60, "--source", RIGHT, "--json")
    status, out, err = sskt(*ask)
    (report,) = json.loads(out)
    assert status == 1 and 0 < report["recomputed"] < 60, err
    (problem,) = report["problems"]
    assert problem.startswith("seed 1, samples 0 to 15") and report["worst_distance"] < 1e-3


def test_other_labels_are_recomputed_each_time(cache: Path) -> None:
    """A forger who knew them could leave them right."""
    (label_set,) = list_label_sets(cache)
    assert len(set(probe_pairs(label_set, 50, 1)) & set(probe_pairs(label_set, 50, 2))) < 30
    reports = [recompute(label_set, 30, Report(""), instead=Reopen(sources=[RIGHT]), tolerance=-1)
               for _ in range(2)]  # fmt: skip
    assert reports[0].problems != reports[1].problems


def test_views_alone_need_no_source(cache: Path) -> None:
    (label_set,) = list_label_sets(cache)
    views = reopen_views(label_set, Reopen())
    np.testing.assert_array_equal(views[3, 1].shape, (24, 24, 3))


@pytest.mark.parametrize(
    "parameters",
    [
        {"padding": 4, "randaugment": 10**9, "magnitude": 9},
        {"padding": -1},
        {"padding": "4,trivial=1"},
        {"padding": [4]},
        {"padding": 4, "unknown": 1},
        {"padding": 4, "jitter": 0.0},
        {},
    ],
)
def test_parameters_of_a_view_policy_out_of_their_ranges_are_damage(
    cache: Path, parameters: dict[str, Any]
) -> None:
    (label_set,) = list_label_sets(cache)
    assert label_set.spec["views"]["policy"] == "pad-crop-flip"
    assert reopen_policy(label_set).parameters == label_set.spec["views"]["parameters"]
    label_set.spec["views"]["parameters"] = parameters
    with pytest.raises(CorruptStore, match="parameters out of their ranges"):
        reopen_policy(label_set)

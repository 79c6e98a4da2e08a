"""UCF101 and HMDB51: real clips under their official lists, and every layout they come in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from sskt.teacher_cache.api import open_target
from sskt.teacher_cache.errors import InputError, MissingData
from sskt.teacher_cache.targets.base import Target
from sskt.teacher_cache.targets.spec import DatasetSpec
from sskt.teacher_cache.targets.ucf101_hmdb51 import HMDB51_CLASSES, hmdb51, ucf101

_LOADERS = {"ucf101": ucf101, "hmdb51": hmdb51}
CLASSES = ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
TRAIN = ("HandstandPushups/v_HandStandPushups_g08_c01", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02")
TEST = ("YoYo/v_YoYo_g01_c01", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01")
ACTS = tuple(
    sorted({"sit", "situp", "sword", "sword_exercise", "wave"} | {f"a{i}" for i in range(46)})
)
ODD = ("#1_Ca(n)'t!_wave_f_goo_0", "300+_Yards!!!_wave_f_nm_1", "a b_wave_2", "ü_wave_3")


def load(root: Path, split: str, name: str = "ucf101", *, partial: bool = False) -> Target:
    return _LOADERS[name](DatasetSpec(name, split, root, partial=partial))


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_frames(folder: Path, frames: int = 2) -> None:
    for i in range(frames):
        write(folder / f"image_{i + 1:05d}.jpg", bytes(100 + i))
    write(folder / "n_frames", str(frames))


def write_ucf101_lists(folder: Path, end: str = "\n") -> None:
    write(folder / "classInd.txt", "".join(f"{i} {n}{end}" for i, n in enumerate(CLASSES, 1)))
    for fold in (1, 2, 3):
        train = TRAIN[:1] if fold == 3 else TRAIN
        lines = [f"{v}.avi {CLASSES.index(v.split('/')[0]) + 1}{end}" for v in train]
        write(folder / f"trainlist0{fold}.txt", "".join(lines))
        write(folder / f"testlist0{fold}.txt", "".join(f"{v}.avi{end}" for v in TEST[::-1][:fold]))


def write_hmdb51_lists(folder: Path) -> None:
    """Train and test: two clips each of every class, one of them unused in fold 3."""
    for fold in (1, 2, 3):
        for name in ACTS:
            videos = ODD if name == "wave" else [f"x_{name}_{i}" for i in range(4)]
            flags = ("1", "2", "2", "1") if fold < 3 else ("1", "2", "0", "1")
            lines = [f"{v}.avi {flag} \n" for v, flag in zip(videos, flags, strict=True)]
            write(folder / f"{name}_test_split{fold}.txt", "".join(lines))


def write_hmdb51_clips(folder: Path) -> None:
    for name in ACTS:
        for video in ODD if name == "wave" else [f"x_{name}_{i}" for i in range(4)]:
            write(folder / name / f"{video}.avi", bytes(len(video)))


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """A complete UCF101 of four clips."""
    root = tmp_path / "ucf"
    write_ucf101_lists(root / "ucfTrainTestlist")
    for i, video in enumerate(TRAIN + TEST):
        write(root / "UCF-101" / f"{video}.avi", bytes(10 + i))
    return root


# --- real clips --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_ucf101_is_in_the_order_of_its_list(data: Path, split: str) -> None:
    root = data / "ucf101"
    target = load(root, split, partial=True)
    lines = (root / "ucfTrainTestlist" / f"{split}list01.txt").read_text().split()
    expected = [line for line in lines if (root / "UCF-101" / line).exists()]
    assert list(target.ids) == expected and expected
    assert target.paths is not None and target.sizes is not None
    assert [path.stat().st_size for path in target.paths] == target.sizes.tolist()
    assert len(target.classes) == 101
    for sample, label in zip(target.ids, target.labels.tolist(), strict=True):
        in_name = sample.split("/v_")[1].split("_")[0]
        assert target.classes[label].casefold() == in_name.casefold()


def test_every_real_ucf101_clip_is_in_one_split(data: Path) -> None:
    splits = [load(data / "ucf101", split, partial=True) for split in ("train", "test")]
    clips = {path.name for path in (data / "ucf101").rglob("*.avi")}
    found = [path.name for target in splits for path in target.paths or ()]
    assert sorted(found) == sorted(clips)


def test_real_hmdb51(data: Path) -> None:
    root = data / "hmdb51"
    found = 0
    for split, flag in (("train", "1"), ("test", "2")):
        target = load(root, split, "hmdb51", partial=True)
        assert len(target.classes) == HMDB51_CLASSES and "wave" in target.classes
        for path, label in zip(target.paths or (), target.labels.tolist(), strict=True):
            name = target.classes[label]
            listed = (root / "splits" / f"{name}_test_split1.txt").read_text()
            assert path.parent.name == name and f"{path.name} {flag}" in listed
            assert path.is_file()
        found += len(target)
    clips = [path.name for path in (root / "videos").rglob("*.avi")]
    unused = [
        c for c in clips if any(f"{c} 0" in f.read_text() for f in root.glob("splits/*1.txt"))
    ]
    assert found == len(clips) - len(unused) > 0


@pytest.mark.parametrize(("name", "listed"), [("ucf101", "9,537"), ("hmdb51", "3,570")])
def test_what_is_missing_is_counted(data: Path, name: str, listed: str) -> None:
    with pytest.raises(MissingData, match=rf"of {listed} .* are missing, first .*--partial"):
        load(data / name, "train", name)


def test_a_missing_fold_is_named(data: Path) -> None:
    with pytest.raises(MissingData, match=r"no trainlist02\.txt and no ucf101_02\.json .*expected"):
        load(data / "ucf101", "train2", partial=True)
    with pytest.raises(MissingData, match=r"no \*_test_split3\.txt and no hmdb51_3\.json"):
        load(data / "hmdb51", "test3", "hmdb51", partial=True)


def test_real_clips_are_counted_when_opened(data: Path) -> None:
    target = open_target("hmdb51", "train", root=data / "hmdb51", partial=True)
    assert target.frames is not None and target.frames.min() > 10 and not target.damaged
    some = target.read_frames(0, [0, int(target.frames[0]) - 1])
    assert all(frame.shape[2] == 3 and frame.dtype == np.uint8 for frame in some.values())


# --- layouts -----------------------------------------------------------------------------------


def test_folds_order_and_labels(ucf: Path) -> None:
    train = load(ucf, "train")
    assert list(train.ids) == [f"{v}.avi" for v in TRAIN]
    assert train.labels.tolist() == [1, 0]
    assert train.classes == CLASSES and train.decoder == "pyav" and train.clips
    assert train.sizes is not None and train.sizes.tolist() == [10, 11]
    assert [len(load(ucf, s)) for s in ("train2", "train3", "test", "test2", "test3")] == [
        2,
        1,
        1,
        2,
        2,
    ]
    assert load(ucf, "test2").labels.tolist() == [0, 2]
    assert load(ucf, "train").fingerprint == load(ucf, "train2").fingerprint
    assert load(ucf, "test").fingerprint != load(ucf, "test2").fingerprint


def test_windows_line_ends_spaces_and_marks(ucf: Path) -> None:
    expected = load(ucf, "train")
    write_ucf101_lists(ucf / "ucfTrainTestlist", "  \r\n\r\n")
    lists = ucf / "ucfTrainTestlist" / "trainlist01.txt"
    lists.write_bytes(b"\xef\xbb\xbf" + lists.read_bytes())
    again = load(ucf, "train")
    assert again.fingerprint == expected.fingerprint
    assert again.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize("folder", ["HandStandPushups", "handstandpushups"])
def test_the_spelling_of_handstand_pushups_does_not_matter(ucf: Path, folder: str) -> None:
    expected = load(ucf, "train")
    clips = ucf / "UCF-101"
    (clips / "HandstandPushups").rename(clips / folder)
    clip = next((clips / folder).iterdir())
    clip.rename(clip.with_name(clip.name.replace("HandStand", "Handstand")))
    found = load(ucf, "train")
    assert found.fingerprint == expected.fingerprint
    assert all(path.is_file() for path in found.paths or ())


@pytest.mark.parametrize(
    ("clips", "lists", "root"),
    [
        (".", "ucfTrainTestlist", "."),
        (".", ".", "."),
        ("UCF-101", ".", "."),
        ("jpg", "ucfTrainTestlist", "."),
        ("UCF-101", "ucfTrainTestlist", "UCF-101"),
    ],
)
def test_the_same_target_from_every_layout(
    ucf: Path, tmp_path: Path, clips: str, lists: str, root: str
) -> None:
    expected = load(ucf, "train").fingerprint
    other = tmp_path / "other"
    other.mkdir()
    for source, to in ((ucf / "UCF-101", clips), (ucf / "ucfTrainTestlist", lists)):
        (other / to).mkdir(exist_ok=True)
        for entry in source.iterdir():
            entry.rename(other / to / entry.name)
    assert load(other / root, "train").fingerprint == expected


def test_a_relative_root_and_a_link_as_root(
    ucf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(ucf, "train").fingerprint
    monkeypatch.chdir(ucf / "UCF-101")
    assert load(Path(), "train").fingerprint == expected
    (tmp_path / "link").symlink_to(ucf / "UCF-101")
    assert load(tmp_path / "link", "train").fingerprint == expected


def test_frames_are_another_target_than_files(ucf: Path) -> None:
    files = load(ucf, "train")
    for video in TRAIN:
        (ucf / "UCF-101" / f"{video}.avi").unlink()
        write_frames(ucf / "UCF-101" / video)
    frames = load(ucf, "train")
    assert list(frames.ids) == list(TRAIN)
    assert frames.sizes is not None and frames.sizes.tolist() == [202, 202]
    assert frames.labels.tolist() == files.labels.tolist()
    assert frames.fingerprint != files.fingerprint


def test_a_file_is_preferred_to_its_frames(ucf: Path) -> None:
    expected = load(ucf, "train").fingerprint
    write_frames(ucf / "UCF-101" / TRAIN[0])
    assert load(ucf, "train").fingerprint == expected


def test_an_empty_folder_is_no_clip(ucf: Path) -> None:
    (ucf / "UCF-101" / f"{TRAIN[1]}.avi").unlink()
    (ucf / "UCF-101" / TRAIN[1]).mkdir()
    with pytest.raises(MissingData, match=r"1 of 2 .* are missing, first ApplyEyeMakeup/v_Apply"):
        load(ucf, "train")
    assert len(load(ucf, "train", partial=True)) == 1


def test_converted_clips_are_found_and_are_another_target(ucf: Path) -> None:
    expected = load(ucf, "train").fingerprint
    clip = ucf / "UCF-101" / f"{TRAIN[0]}.avi"
    clip.rename(clip.with_suffix(".mp4"))
    found = load(ucf, "train")
    assert found.ids[0] == f"{TRAIN[0]}.mp4"
    assert found.fingerprint != expected


def test_hmdb51_layouts_and_odd_names(tmp_path: Path) -> None:
    write_hmdb51_lists(tmp_path / "splits")
    write_hmdb51_clips(tmp_path / "videos")
    train, test = load(tmp_path, "train", "hmdb51"), load(tmp_path, "test", "hmdb51")
    assert train.classes == ACTS
    wave = ACTS.index("wave")
    assert [n for n, c in zip(train.ids, train.labels, strict=True) if c == wave] == [
        f"wave/{ODD[0]}.avi",
        f"wave/{ODD[3]}.avi",
    ]
    assert [n for n, c in zip(test.ids, test.labels, strict=True) if c == wave] == [
        f"wave/{ODD[1]}.avi",
        f"wave/{ODD[2]}.avi",
    ]
    assert train.labels.tolist() == sorted([*range(51), *range(51)])
    assert len(load(tmp_path, "test3", "hmdb51")) == 51
    (tmp_path / "videos").rename(tmp_path / "hmdb51_org")
    (tmp_path / "splits").rename(tmp_path / "testTrainMulti_7030_splits")
    assert load(tmp_path, "train", "hmdb51").fingerprint == train.fingerprint


def annotation(subset: str) -> dict[str, object]:
    database = {
        video.split("/")[1]: {"subset": side, "annotations": {"label": video.split("/")[0]}}
        for side, videos in (("training", TRAIN), (subset, TEST))
        for video in videos
    }
    return {"labels": CLASSES, "database": database}


@pytest.mark.parametrize("subset", ["validation", "testing"])
@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_the_annotation_of_3d_resnets(tmp_path: Path, name: str, subset: str) -> None:
    file = "ucf101_02.json" if name == "ucf101" else "hmdb51_2.json"
    write(tmp_path / file, json.dumps(annotation(subset)))
    for video in TRAIN + TEST:
        write_frames(tmp_path / "jpg" / video)
    train, test = load(tmp_path, "train2", name), load(tmp_path, "test2", name)
    assert (list(train.ids), train.labels.tolist()) == (list(TRAIN), [1, 0])
    assert (list(test.ids), test.labels.tolist()) == (list(TEST), [2, 0])
    assert train.classes == CLASSES
    with pytest.raises(MissingData, match=r"1\.json"):
        load(tmp_path, "train", name)


def test_lists_come_before_an_annotation_and_both_give_the_same_target(ucf: Path) -> None:
    expected = load(ucf, "train")
    lists = ucf / "ucfTrainTestlist" / "trainlist01.txt"
    write(ucf / "ucf101_01.json", "not read")
    assert load(ucf, "train").fingerprint == expected.fingerprint
    lists.unlink()
    write(ucf / "ucf101_01.json", json.dumps(annotation("validation")))
    assert load(ucf, "train").fingerprint == expected.fingerprint


# --- faults ------------------------------------------------------------------------------------


def test_nothing_there_names_the_layout_and_where_to_get_it(tmp_path: Path, ucf: Path) -> None:
    with pytest.raises(MissingData, match=r"expected UCF-101/.*crcv\.ucf\.edu"):
        load(tmp_path / "nowhere", "train")
    for clip in (ucf / "UCF-101").rglob("*.avi"):
        clip.unlink()
    with pytest.raises(MissingData, match=r"2 files of .*trainlist01.*expected UCF-101/.*get "):
        load(ucf, "train", partial=True)
    for folder in (ucf / "UCF-101").iterdir():
        folder.rmdir()
    with pytest.raises(MissingData, match=r"no class folder in any of .*expected UCF-101/"):
        load(ucf, "train", partial=True)


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_download_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"cannot download {name}.*\.rar.*--download.*unpack"):
        _LOADERS[name](DatasetSpec(name, "train", tmp_path, download=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("YoYo v_YoYo_g01_c02.avi 3", "expected 'CLASS/VIDEO.avi'"),
        ("YoYo/v_YoYo_g01_c0", "expected 'CLASS/VIDEO.avi'"),
        ("YoYo/v_YoYo_g01_c02.avi three", "expected 'CLASS/VIDEO.avi'"),
        ("YoYo/../v_YoYo_g01_c02.avi 3", "expected 'CLASS/VIDEO.avi'"),
        ("Yodel/v_YoYo_g01_c02.avi 3", "class 'Yodel' is not in classInd.txt"),
        ("YoYo/v_YoYo_g01_c02.avi 4", "class number 4, .* gives YoYo number 3 of 3"),
        ("YoYo/v_YoYo_g01_c02.avi 2", "class number 2, .* gives YoYo number 3 of 3"),
        (f"{TRAIN[0]}.avi 2", "a second time"),
    ],
)
def test_a_malformed_line_is_named(ucf: Path, line: str, message: str) -> None:
    lists = ucf / "ucfTrainTestlist" / "trainlist01.txt"
    lists.write_text(lists.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"trainlist01\.txt, line 3: .*{message}"):
        load(ucf, "train", partial=True)


@pytest.mark.parametrize("text", ["1 A\n3 B\n", "A\nB\n", "1\n", "1 A\n2 B C\n", "0 A\n1 B\n"])
def test_malformed_classes_are_named(ucf: Path, text: str) -> None:
    (ucf / "ucfTrainTestlist" / "classInd.txt").write_text(text)
    with pytest.raises(InputError, match=r"classInd\.txt, line [12]: expected '[12] CLASS', found"):
        load(ucf, "train")


def test_missing_classes_and_an_empty_list(ucf: Path) -> None:
    (ucf / "ucfTrainTestlist" / "testlist01.txt").write_text("\n\n")
    with pytest.raises(InputError, match=r"testlist01\.txt lists no video of test"):
        load(ucf, "test")
    (ucf / "ucfTrainTestlist" / "classInd.txt").unlink()
    with pytest.raises(MissingData, match=r"no .*classInd\.txt\); expected UCF-101/"):
        load(ucf, "train")


@pytest.mark.parametrize("line", ["x_wave_9.avi", "x_wave_9.avi 3", "x_wave_9 1", "a/b.avi 1"])
def test_a_malformed_line_of_hmdb51_is_named(tmp_path: Path, line: str) -> None:
    write_hmdb51_lists(tmp_path / "splits")
    write_hmdb51_clips(tmp_path / "videos")
    lists = tmp_path / "splits" / "wave_test_split1.txt"
    lists.write_text(lists.read_text() + line)
    with pytest.raises(InputError, match=r"wave_test_split1\.txt, line 5: expected 'VIDEO\.avi 1'"):
        load(tmp_path, "train", "hmdb51")
    lists.write_text(lists.read_text().replace(line, f"{ODD[0]}.avi 2"))
    with pytest.raises(InputError, match=r"wave_test_split1\.txt, line 5: .* a second time"):
        load(tmp_path, "train", "hmdb51")


def test_a_missing_list_of_hmdb51_would_shift_the_labels(tmp_path: Path) -> None:
    write_hmdb51_lists(tmp_path / "splits")
    write_hmdb51_clips(tmp_path / "videos")
    (tmp_path / "splits" / "sit_test_split1.txt").rename(
        tmp_path / "splits" / "._sit_test_split1.txt"
    )
    with pytest.raises(MissingData, match=r"expected 51 lists .*_test_split1\.txt.* found 50"):
        load(tmp_path, "train", "hmdb51")


BROKEN = {
    "cut": json.dumps(annotation("validation"))[:-40],
    "no object": "[]",
    "no labels": '{"database": {}}',
    "unknown label": '{"labels": ["A"], "database": {"v": {"subset": "training", '
    '"annotations": {"label": "B"}}}}',
    "unknown subset": '{"labels": ["A"], "database": {"v": {"subset": "spare", '
    '"annotations": {"label": "A"}}}}',
    "no annotations": '{"labels": ["A"], "database": {"v": {"subset": "testing"}}}',
    "numbers": '{"labels": [1], "database": {"v": {"subset": "training", '
    '"annotations": {"label": 1}}}}',
    "not UTF-8": b"\xff\xfe{",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_annotation_is_named(tmp_path: Path, broken: str | bytes) -> None:
    write(tmp_path / "ucf101_01.json", broken)
    with pytest.raises(InputError, match=r"ucf101_01\.json: expected JSON with 'labels'"):
        load(tmp_path, "train")


def test_names_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "secret.avi", b"secret")
    away = {
        "labels": ["A", ".."],
        "database": {
            "../../secret": {"subset": "training", "annotations": {"label": "A"}},
            "secret": {"subset": "training", "annotations": {"label": ".."}},
        },
    }
    write(tmp_path / "in" / "ucf101_01.json", json.dumps(away))
    write(tmp_path / "in" / "jpg" / "A" / "b.avi", b"")
    with pytest.raises(MissingData, match=re.escape("2 files")):
        load(tmp_path / "in", "train", partial=True)

"""``sskt inspect``: one sample under one seed, as the sources saw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sskt.cli.help import GroupedCommand
from sskt.cli.labels.label_set_options import (
    REOPENED,
    cache_option,
    reopen_options,
    sets_argument,
)
from sskt.cli.output import as_json, input_line, print_json, print_table, show, working
from sskt.teacher_cache.errors import IncompleteLabels, InputError, SsktError

if TYPE_CHECKING:
    from sskt.teacher_cache.label_sets.label_set import LabelSet
    from sskt.teacher_cache.media.images import UInt8
    from sskt.teacher_cache.tools.reopen import Reopen
    from sskt.teacher_cache.views.views import Views


@click.command(
    "inspect",
    cls=GroupedCommand,
    groups={
        "Labels": ("cache", "sample", "seed"),
        "Images": ("png", "clip"),
        "What the labels were made from": (*REOPENED, "live"),
    },
    examples=(
        "sskt inspect stl10 --sample 3 --seed 1 --png view.png",
        "sskt inspect b900af --sample 17",
    ),
)
@cache_option
@sets_argument
@click.option(
    "--sample", type=click.IntRange(0), default=0, show_default=True, help="Number of the sample."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="View seed.")
@click.option(
    "--png",
    type=click.Path(path_type=Path),
    help="PNG file for what the sources saw: the view, or the stills of a clip.",
)
@click.option(
    "--clip", type=click.Path(path_type=Path), help="PNG file for all frames of a clip's view."
)
@click.option(
    "--live/--no-live", default=True, show_default=True, help="Recompute the label with its source."
)
@reopen_options
@as_json
def inspect(
    cache: str,
    sets: tuple[str, ...],
    sample: int,
    seed: int,
    png: Path | None,
    clip: Path | None,
    live: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Look at one sample under one seed: its view, each source's top-5, the spec.

    All sets of one target and one view policy are shown together; name one to choose.
    """
    from sskt.teacher_cache.label_sets.find import choose_sets, same_views
    from sskt.teacher_cache.tools.reopen import Reopen, reopen_views, require_named_sources
    from sskt.teacher_cache.tools.verify import stored_row

    chosen = choose_sets(cache, sets)
    same_views(chosen)
    first = chosen[0]
    if sample >= first.samples or seed >= first.seeds:
        raise InputError(
            f"{first.name} has samples 0 to {first.samples - 1} and seeds 0 to {first.seeds - 1}, "
            f"found sample {sample}, seed {seed}"
        )
    for label_set in chosen:
        if seed >= label_set.seeds or not label_set.has(
            label_set.shard(seed, sample // label_set.shard_rows)
        ):
            raise IncompleteLabels(
                f"label set {label_set.name} has no label of sample {sample} under seed {seed} yet"
            )
    instead = Reopen(**given)
    require_named_sources(instead, chosen)
    shown: dict[str, Any] = {
        "sample": sample,
        "seed": seed,
        "specs": {s.name: s.spec for s in chosen},
    }
    seen = [s for s in chosen if stored_row(s, sample, seed) is not None]
    if (png or clip) and not seen:
        raise InputError(
            f"sample {sample} could not be read when it was labelled under seed {seed}: there is "
            f"no view for --{'png' if png else 'clip'}; choose another --sample"
        )
    if (live or png or clip) and seen:
        by_f_s = {s.spec["views"].get("f_s", ""): s for s in reversed(seen)}
        with working("opening the target"):
            views = {f_s: reopen_views(by_f_s[f_s], instead) for f_s in sorted(by_f_s)}
        stored = int(seen[0].read_checks(seed, sample, sample + 1)[0])
        shown |= _view_of(views, sample, seed, stored, png, clip)
    with working("recomputing" if live else "reading"):
        shown["sources"] = [
            _labels_of(s, sample, seed, cache, instead if live else None) for s in chosen
        ]
    if as_json:
        print_json(shown)
        return
    _print_inspected(shown)


def _view_of(
    by_f_s: dict[str, Views],
    sample: int,
    seed: int,
    stored: int,
    png: Path | None,
    clip: Path | None,
) -> dict[str, Any]:
    """The view of a sample, its check against the stored one, and images of it.

    by_f_s: the same views, of clips under every f_s that a source saw them by.
    """
    import numpy as np

    from sskt.teacher_cache.views.views import check_of

    views = next(iter(by_f_s.values()))
    target = views.target
    if clip and not target.clips:
        raise InputError(f"--clip: target {target.name} has images; use --png")
    view = views[sample, seed]
    shown: dict[str, Any] = {
        "id": target.ids[sample],
        "label": views.label_text(sample, seed),
        "view": {"shape": list(view.shape), "check": f"{check_of(view):08x}"},
        "view_matches": stored == check_of(view),
    }
    if target.clips:
        shown["stills"] = {
            f_s: v.f_s.frames(len(view), sample, seed).tolist() for f_s, v in by_f_s.items()
        }
    if png:
        stills = [v.stills(view[None], np.array([sample]), seed)[0] for v in by_f_s.values()]
        _write_png(_rows(stills) if target.clips else stills[0], png)
        shown["png"] = str(png)
    if clip:
        _write_png(_sheet(view), clip)
        shown["clip"] = str(clip)
    return shown


def _rows(stills: Sequence[UInt8]) -> UInt8:
    """Stills ``[K, H, W, 3]`` side by side, a row for each f_s; shorter rows end in black."""
    import numpy as np

    rows = [np.concatenate(list(some), axis=1) for some in stills]
    widest = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(r, ((0, 0), (0, widest - r.shape[1]), (0, 0))) for r in rows])


def _sheet(clip: UInt8) -> UInt8:
    """Frames of a clip in rows of about as many as there are rows."""
    import numpy as np

    columns = math.ceil(math.sqrt(len(clip)))
    blank = [np.zeros_like(clip[0])] * (-len(clip) % columns)
    frames = [*clip, *blank]
    rows = [np.concatenate(frames[i : i + columns], 1) for i in range(0, len(frames), columns)]
    return np.concatenate(rows)


def _write_png(view: Any, path: Path) -> None:
    from PIL import Image

    try:
        Image.fromarray(view).save(path, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _labels_of(
    label_set: LabelSet, sample: int, seed: int, cache: str, instead: Reopen | None
) -> dict[str, Any]:
    from sskt.teacher_cache.tools.verify import stored_row

    shown: dict[str, Any] = {
        "label_set": label_set.name,
        "source": label_set.spec["source"]["name"],
    }
    shown["arch"], shown["encoding"] = label_set.spec["source"]["arch"], str(label_set.encoding)
    shown["output"] = label_set.output
    row = stored_row(label_set, sample, seed)
    shown["skipped"] = row is None
    if row is None:
        return shown
    shown |= _row_of(label_set, row)
    if instead is not None:
        try:
            live, distance = _recomputed(label_set, sample, seed, cache, instead)
        except SsktError as error:
            shown["live"] = {"error": str(error)}
            return shown
        key = "features" if label_set.encoding.of_features else "labels"
        shown["live"] = {"distance": distance} | _row_of(label_set, {key: live[None]}, stored=False)
    return shown


def _row_of(label_set: LabelSet, row: dict[str, Any], *, stored: bool = True) -> dict[str, Any]:
    """The five most probable classes of a row, if it has classes; of features also figures.

    stored: whether the row is encoded, else it is what the source gives now.
    """
    import numpy as np

    found: dict[str, Any] = {}
    if label_set.output == "features":
        values = label_set.decoded(row)[0]
        figures = {"mean": values.mean(), "least": values.min(), "largest": values.max()}
        found["features"] = {"count": len(values)} | {k: float(v) for k, v in figures.items()}
    whole = stored or label_set.encoding.of_features
    p = label_set.probabilities(row) if whole else row["labels"]
    if p is not None:
        best = np.argsort(-p[0], kind="stable")[:5]
        found["top5"] = [{"class": label_set.classes[i], "p": float(p[0][i])} for i in best]
    return found


def _recomputed(
    label_set: LabelSet, sample: int, seed: int, cache: str, instead: Reopen
) -> tuple[Any, float]:
    """The label that the source gives now, or the parents of a mean; its distance from ours."""
    from sskt.teacher_cache.format.spec import parents_of

    if parents_of(label_set.spec):
        from sskt.teacher_cache.tools.mean import compare_mean, stored_mean

        mean = compare_mean(label_set, stored_mean(label_set, cache), sample, seed)
        return mean.mean, mean.distance
    from sskt.teacher_cache.tools.recompute import compare
    from sskt.teacher_cache.tools.reopen import reopen

    views, source = reopen(label_set, instead)
    found = compare(label_set, views, source, sample, seed)
    return found.live, found.distance


def _print_inspected(shown: dict[str, Any]) -> None:
    spec = next(iter(shown["specs"].values()))
    target, views = spec["target"], spec["views"]
    size, fingerprint = f"{target['size']:,} samples", target["fingerprint"][:19]
    show(f"target   {target['name']} {target['split']}, {size}, {fingerprint}...")
    show(f"views    {views['policy']} {views['parameters']}")
    if "id" in shown:
        state = (
            "as the sources saw it"
            if shown["view_matches"]
            else "NOT the image that the sources saw"
        )
        *depth, height, width, _ = shown["view"]["shape"]
        size = "x".join(map(str, [*depth, width, height] if depth else [width, height]))
        sample = f"{shown['sample']} = {shown['id']} (label: {shown['label']})"
        show(f"sample   {sample}, seed {shown['seed']}: {size}, {state}")
    for f_s, frames in shown.get("stills", {}).items():
        numbers = ", ".join(map(str, frames))
        show(f"stills   f_s = {f_s.split('@')[0]}: frame {numbers} of the clip")
    for key in ("png", "clip"):
        if key in shown:
            show(f"written  {shown[key]}")
    for source in shown["sources"]:
        name = f"{source['source']} ({source['arch']})"
        show(f"\n{name}, {source['encoding']}, {source['label_set']}")
        _print_source(shown["specs"][source["label_set"]]["source"])
        if source["skipped"]:
            show("  no label: the sample could not be read")
            continue
        live = source.get("live", {})
        _print_row(source, live)
        if "distance" in live:
            how = "total variation" if source["output"] == "soft-labels" else "relative error"
            distance = f"{live['distance']:.2e} ({how})"
            show(f"distance, stored to recomputed label: {distance}")
        if "error" in live:
            show(f"not recomputed: {live['error']}")


def _print_row(stored: dict[str, Any], live: dict[str, Any]) -> None:
    for name, row in (("stored", stored), ("live", live)):
        if "features" in row:
            f = row["features"]
            show(
                f"  {name}: {f['count']:,} features, mean {f['mean']:.4g}, from {f['least']:.4g} "
                f"to {f['largest']:.4g}"
            )
    if "top5" not in stored:
        return
    again = live.get("top5", [{"class": "", "p": 0}] * 5)
    rows = [
        [f"{a['p']:.4f}", a["class"]] + ([f"{b['p']:.4f}", b["class"]] if "top5" in live else [])
        for a, b in zip(stored["top5"], again, strict=False)
    ]
    print_table(["stored", "class"] + (["live", "class"] if "top5" in live else []), rows)


def _print_source(spec: dict[str, Any]) -> None:
    if "parents" in spec:
        of = ", ".join(f"{p['digest'][:12]} ({p['weight']:.4g})" for p in spec["parents"])
        over = f", over {spec['seeds']} view seeds" if "seeds" in spec else ""
        show(f"  mean of label sets {of}{over}")
        return
    weights = spec["weights"][:19]
    show(f"  weights {weights}..., {spec['precision']}, BatchNorm {spec['batchnorm']}")
    show(f"  input {input_line(spec['preprocessing'])}")

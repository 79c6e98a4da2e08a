"""Data cards of label sets: what a person who finds a published set needs to know.

A card is Markdown with a YAML head, as dataset repositories show it, or Croissant, the JSON-LD
vocabulary of MLCommons (http://mlcommons.org/croissant/1.0), which search engines of datasets read.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import closing
from typing import Any, NoReturn

from sskt.teacher_cache.errors import InputError, MissingData, printable
from sskt.teacher_cache.format.encodings import error_text, gradient_error
from sskt.teacher_cache.format.metadata import GROUP
from sskt.teacher_cache.format.spec import parents_of
from sskt.teacher_cache.label_sets.create import open_for_writing
from sskt.teacher_cache.label_sets.label_set import LabelSet
from sskt.teacher_cache.storage.base import CacheName

LICENSE = "license"
"""Attribute of a label set: the SPDX identifier of its licence. No part of the identity."""

_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{1,63}")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject",
    "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator",
    "source", "subField", "transform",
)  # fmt: skip
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {term: f"cr:{term}" for term in _TERMS}
"""The context that Croissant 1.0 requires of every document."""


def set_license(cache: CacheName, label_set: LabelSet, license: str) -> LabelSet:
    """Stores the licence of a label set in its metadata, in the place of an earlier one.

    Args:
        cache: The cache of the label set.
        label_set: The label set.
        license: An SPDX identifier, such as ``CC-BY-4.0``.

    Returns:
        The label set with the licence.

    Raises:
        InputError: If it cannot be an identifier, or the cache cannot be written to.
    """
    if not _SPDX.fullmatch(license):
        raise InputError(
            f"--license {license} is not an SPDX identifier; expected for example CC-BY-4.0, "
            "CC0-1.0 or Apache-2.0 (https://spdx.org/licenses)"
        )

    def documents(rows: int | None, seeds: int | None) -> NoReturn:
        raise MissingData(f"label set {label_set.name} is gone from {cache}")

    target = open_for_writing(cache, label_set.name, documents, label_set.seeds)
    with closing(target):
        target.add_attribute(LICENSE, license, replace=True)
    return target


def license_of(label_set: LabelSet) -> str:
    """The SPDX identifier of a label set's licence; "" if it has none."""
    found = label_set.attributes.get(LICENSE)
    return found if isinstance(found, str) and _SPDX.fullmatch(found) else ""


def markdown_card(label_set: LabelSet) -> str:
    """Makes the card of a label set as Markdown with a YAML head.

    Args:
        label_set: The label set.

    Returns:
        The text of the file, which ends with a line break.
    """
    spec, license = label_set.spec, license_of(label_set)
    clips = label_set.spec["views"].get("decoder")
    size = next((name for most, name in _SIZES if label_set.samples < most), "1M<n<10M")
    head = [
        "---",
        *([f"license: {license.lower()}"] if license else []),
        f"pretty_name: {json.dumps(_title(label_set))}",
        "task_categories:",
        f"- {'video' if clips else 'image'}-classification",
        "tags:",
        *(f"- {tag}" for tag in ("soft-labels", "knowledge-distillation", "zarr", "sskt")),
        "size_categories:",
        f"- {size}",
        "---",
    ]
    coverage = label_set.coverage()
    source, target, views = spec["source"], spec["target"], spec["views"]
    parameters = ", ".join(f"{k} {v}" for k, v in views.get("parameters", {}).items())
    parents = [f"{digest} ({w:.4g})" for digest, w in parents_of(spec).items()]
    error = label_set.attributes.get("error")
    rows = {
        "target": f"{target['name']}, split {target['split']}: {label_set.samples:,} samples",
        "source": f"{source['name']}, {source['arch']}: {label_set.contents}",
        **(
            {"mean of label sets": ", ".join(parents)}
            if parents
            else {"weights of the source": source.get("weights", "not recorded")}
        ),
        "views": f"{views['policy']}, version {views['version']}"
        + (f" ({parameters})" if parameters else ""),
        "view seeds": f"{label_set.seeds}, of which {coverage.count(1.0)} are whole",
        "encoding": f"{label_set.encoding}: {spec['encoding']['decode']}",
        **(
            {"error of the encoding": error_text(error)}
            if label_set.encoding.of_features
            else {
                "gradient error of the encoding": gradient_error(error, "T=1", "T=3")
                or "not measured"
            }
        ),
        "digest": label_set.digest,
        "licence": license or "not stated",
    }
    body = [
        f"# {_cell(_title(label_set))}",
        "",
        "The outputs of a frozen network (the source) for augmented views of a dataset (the "
        "target), stored once, to train other networks from them. The images are not included: "
        "the views are made again from the target by seed, and each view is compared with its "
        "checksum.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
        "",
        "The set is a Zarr v3 group. Train from it with `sskt train --labels URL/"
        f"{label_set.name}`, or read it by name:",
        "",
        "```python",
        "import xarray",
        "",
        f'labels = xarray.open_zarr("{label_set.name}")',
        "```",
        "",
        "The arrays hold the names of the target's files and of the source's classes. Check the "
        "licences of the target and of the source's weights before you publish labels.",
    ]
    return "\n".join([*head, "", *body]) + "\n"


def croissant_card(label_set: LabelSet, url: str = "") -> str:
    """Makes the card of a label set as Croissant 1.0.

    Args:
        label_set: The label set.
        url: Where it is or will be published; "" if that is not known.

    Returns:
        A JSON-LD document.
    """
    data, where = label_set.storage.read(GROUP), url.rstrip("/")
    license = license_of(label_set)
    document: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": label_set.name,
        "description": f"{_title(label_set)}: {label_set.samples:,} samples, {label_set.seeds} "
        f"view seeds, {label_set.contents}, stored as {label_set.encoding} in a "
        "Zarr v3 group.",
        "version": f"{label_set.seeds}.0.0",
        "keywords": ["soft labels", "knowledge distillation", "zarr"],
        "identifier": f"sha256:{label_set.digest}",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": GROUP,
                "name": GROUP,
                "description": "Metadata of the Zarr group; the arrays are beside it.",
                "contentUrl": f"{where}/{GROUP}" if where else GROUP,
                "contentSize": f"{len(data)} B",
                "encodingFormat": "application/json",
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        ],
    }
    if license:
        document["license"] = f"https://spdx.org/licenses/{license}.html"
    if where:
        document["url"] = where
    return json.dumps(_printable(document), indent=2) + "\n"


def _title(label_set: LabelSet) -> str:
    spec = label_set.spec
    source, target = spec["source"], spec["target"]
    what = label_set.output.capitalize().replace("-", " ")
    return printable(
        f"{what} of {source['name']} ({source['arch']}) over {target['name']} {target['split']}"
    )


def _cell(value: object) -> str:
    """Text of a label set as a part of a Markdown table, in which it means nothing."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(str(value)))


def _printable(value: Any) -> Any:
    """A JSON document whose texts cannot control a terminal."""
    if isinstance(value, dict):
        return {key: _printable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_printable(one) for one in value]
    return printable(value) if isinstance(value, str) else value

"""HTML as a strict reader sees it: a tree, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "input", "hr"}


@dataclass
class Node:
    """An element."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words, white space as one blank."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            else:
                yield " "
                yield from child._texts()
                yield " "

    def all(self, tag: str = "", **attributes: str) -> list[Node]:
        """Elements below with a tag and attributes; ``class_`` is one of its classes."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child._fits(tag, attributes):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def _fits(self, tag: str, attributes: dict[str, str]) -> bool:
        if tag and self.tag != tag:
            return False
        for key, value in attributes.items():
            mine = self.attributes.get(key.rstrip("_").replace("_", "-"))
            if mine is None or value not in (mine.split() if key == "class_" else [mine]):
                return False
        return True

    def one(self, tag: str = "", **attributes: str) -> Node:
        """The only such element."""
        (found,) = self.all(tag, **attributes)
        return found


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(names) != len(set(names)):
            self.faults.append(f"<{tag}> has an attribute twice")
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if len(self.open) < 2 or self.open[-1].tag != tag:
            self.faults.append(f"</{tag}> closes <{self.open[-1].tag}>")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Node:
    """The tree. Raises ``AssertionError`` if it is not well-formed."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    unclosed = [node.tag for node in builder.open[1:]]
    assert not builder.faults and not unclosed, (builder.faults, unclosed)
    return builder.root


def faults(root: Node) -> list[str]:
    """What a user of keyboard, screen reader or strict policy would stumble over."""
    found = []
    ids = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    found += [f"id {i} twice" for i in {i for i in ids if ids.count(i) > 1}]
    for node in root.all():
        about = f"<{node.tag} {node.attributes}>"
        for name in node.attributes:
            if name.startswith("on") or name == "style":
                found.append(f"{about}: the policy forbids {name}")
        if node.tag == "script" and (node.text or "src" not in node.attributes):
            found.append(f"{about}: the policy forbids it")
        if node.tag == "style":
            found.append(f"{about}: the policy forbids it")
        for key in ("src", "href", "action"):
            if node.attributes.get(key, "/").startswith(("http", "//", "javascript:", "data:")):
                found.append(f"{about}: leads elsewhere")
        if node.tag == "img" and "alt" not in node.attributes:
            found.append(f"{about}: no alt")
        if node.tag == "th" and "scope" not in node.attributes:
            found.append(f"{about}: no scope")
        if node.tag in ("a", "button") and not node.text:
            found.append(f"{about}: no name")
        for key in ("aria-labelledby", "for"):
            if key in node.attributes and node.attributes[key] not in ids:
                found.append(f"{about}: {key} names nothing")
    if root.all("html"):
        titles = root.all("h1")
        if len(titles) != 1:
            found.append(f"{len(titles)} h1")
        for tag in ("header", "main", "footer", "title"):
            if len(root.all(tag)) != 1:
                found.append(f"{len(root.all(tag))} <{tag}>")
    return found

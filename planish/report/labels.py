"""Names of nodes for people."""

from __future__ import annotations

from planish.ir.graph import Node


def label(node: Node) -> str:
    """A name of a node for people: its op, and the path in the model that it came from, else its result."""
    pathlike = "/" in node.source or "." in node.source
    path = node.source if pathlike else f"%{node.result.name}" if node.results else node.source
    return f"{node.op.name} {path}"

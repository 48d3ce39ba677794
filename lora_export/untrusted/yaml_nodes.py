"""Make the nodes of a YAML document, but not more than a document may have.

PyYAML takes half a kilobyte for each node, and its time for a token grows with the lists that are open: both
are limited while nodes are made, since afterwards they would be there.
"""

from __future__ import annotations

import yaml

from lora_export.untrusted.documents import MAX_DEPTH, MAX_YAML_NODES, DocumentError


class BoundedLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader that refuses a document with too many or too deep nodes; an alias is one."""

    _count = 0
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node with those in it.

        Raises:
            DocumentError: There are more than `MAX_YAML_NODES`, or they are nested deeper than `MAX_DEPTH`.
        """
        self._count += 1
        if self._count > MAX_YAML_NODES:
            raise DocumentError([f"it has more than {MAX_YAML_NODES} keys, values and lists"])
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise DocumentError([f"it is nested deeper than {MAX_DEPTH} levels"])
        made = super().compose_node(parent, index)
        self._depth -= 1
        return made

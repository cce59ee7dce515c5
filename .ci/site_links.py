"""For the site: what documents link to outside docs/ is no page of it, and becomes the path's name."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace [text](../path) by text (`path`)."""
    return re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", markdown)

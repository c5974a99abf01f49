"""Executed notebooks as HTML pages that need nothing from the network.

nbconvert writes the page. Formulas become MathML, which browsers draw themselves, so no script is fetched; the templates'
script tags that point to other hosts are taken out.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

from longalign_lib.course.outputs import tidy

_DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
_INLINE = re.compile(r"(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![\w$])")
_FENCE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)
_REMOTE_SCRIPT = re.compile(r"<script[^>]*\bsrc=\"(?:https?:)?//[^\"]*\"[^>]*>\s*</script>", re.S)


def formulas_to_mathml(markdown: str) -> str:
    """Replace ``$$…$$`` and ``$…$`` outside code with MathML."""
    from latex2mathml.converter import convert

    def prose(text: str) -> str:
        text = _DISPLAY.sub(lambda m: convert(m[1].strip(), display="block"), text)
        return _INLINE.sub(lambda m: convert(m[1]), text)

    parts = _FENCE.split(markdown)
    return "".join(part if k % 2 else prose(part) for k, part in enumerate(parts))


def write_page(notebook: Path, page: Path) -> Path:
    """Write ``notebook`` (executed) as the self-contained HTML file ``page``; returns ``page``."""
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    tidy(content)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas_to_mathml(cell.source)
            # links between notebooks become links between pages
            cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.html)", cell.source)
    exporter = HTMLExporter(template_name="lab", exclude_input_prompt=True, exclude_output_prompt=True, mathjax_url="")
    html, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": notebook.stem}})
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(_REMOTE_SCRIPT.sub("", html), encoding="utf8")
    return page

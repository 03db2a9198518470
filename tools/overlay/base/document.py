"""A Markdown file of docs/, rendered as a part of a page that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from overlay.base import plain_file
from overlay.base.errors import Exit, OverlayError

#: Raw HTML is text here, so that nothing in a document can load or run anything.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")


def render(text: str) -> Markup:
    """`text` as HTML: headings one level lower, wide tables scroll, links lead to the web only.

    >>> render("# Results\\n\\n[here](other.md) ![chart](chart.png) <b>")
    Markup('<h2>Results</h2>\\n<p>here chart &lt;b&gt;</p>\\n')
    """
    tokens = [_lowered(token) for token in _PARSER.parse(text)]
    for token in tokens:
        token.children = list(_kept(token.children)) if token.children else token.children
    html = _PARSER.renderer.render(tokens, _PARSER.options, {})
    scrolling = html.replace("<table>", '<div class="scroller"><table>')
    return Markup(scrolling.replace("</table>", "</table></div>"))


def _lowered(token: Token) -> Token:
    if token.type in ("heading_open", "heading_close"):
        token.tag = f"h{min(int(token.tag[1:]) + 1, 6)}"
    return token


def _kept(tokens: Sequence[Token]) -> Iterator[Token]:
    """Links to other files of the repository lose their target, images all but their text."""
    external = True
    for token in tokens:
        if token.type == "image":
            yield Token("text", "", 0, content=token.content)
        elif token.type == "link_open":
            external = str(token.attrGet("href")).startswith(("https://", "http://"))
            if external:
                yield token
        elif token.type != "link_close" or external:
            yield token


def read(path: Path) -> Markup:
    """The file at `path`, rendered.

    Raises:
        OverlayError: it can't be read.
    """
    try:
        return render(plain_file.read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise OverlayError(
            f"cannot read {path}", getattr(error, "strerror", None) or str(error),
            "Restore it from git, and run in a checkout of the overlay", Exit.USAGE,
        ) from error  # fmt: skip

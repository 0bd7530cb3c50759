"""Tests draw the plots of their conversions but do not render them, which takes half of a tiny conversion's time.

test_report_page.py, the conversions of every family and the commands that are run as processes render them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xeco_convert import report_page
from xeco_convert.report_page import Draw

_render = report_page._figure


def _draw_alone(name: str, caption: str, draw: Draw) -> str:
    """All that depends on the data, and nothing of the SVG."""
    from matplotlib.figure import Figure

    draw(Figure().add_subplot())
    return ""


@contextmanager
def drawn_alone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_figure", _draw_alone)
        yield


@contextmanager
def rendered() -> Iterator[None]:
    """As users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "_figure", _render)
        yield

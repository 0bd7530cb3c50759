"""The HTML report: well-formed, the same for the same report, complete, and readable without matplotlib too."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plots import rendered

import xeco_convert
from xeco_convert.demo import MODEL_FOLDER
from xeco_convert.report import ConversionReport
from xeco_convert.report_page import report_page

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; collects texts, ids, addresses and the cells of each table row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.addresses += [named[name] or "" for name in ("href", "xlink:href", "src") if name in named]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.rows[-1][-1] += data


@pytest.fixture(scope="module", autouse=True)
def _rendered() -> Iterator[None]:
    with rendered():
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ConversionReport:
    """The embedded model with one layer kept; a few steps of refinement, so that every column has values."""
    output = tmp_path_factory.mktemp("page") / "out"
    return xeco_convert.convert(
        MODEL_FOLDER,
        output,
        rank=24,
        rope_dim=8,
        layers="0,2-3",
        calibration_tokens=1024,
        refine=True,
        refine_steps=2,
        verify=True,
    )


def test_the_page_is_well_formed_and_needs_no_other_file(report: ConversionReport) -> None:
    page = Page(report_page(report))
    assert all(address.startswith("#") for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert "script" not in page.tags and "link" not in page.tags


def test_every_layer_has_its_row_with_widths_and_errors(report: ConversionReport) -> None:
    rows = [row for row in Page(report_page(report)).rows if row and row[0].isdigit()]
    assert [row[:5] for row in rows] == [
        ["0", "24", "8", "128", "32"],
        ["1", "kept", "", "128", "128"],
        ["2", "24", "8", "128", "32"],
        ["3", "24", "8", "128", "32"],
    ]
    assert f"{report.layers[0].details['refitted_error']:.4f}" in rows[0]
    assert all(cell == "" for cell in rows[1][5:])


def test_step_0_quality_is_on_the_page_and_in_the_card(report: ConversionReport) -> None:
    fidelity = report.summary["fidelity"]
    row = ["step-0 perplexity", f"{fidelity['perplexity_source']:.4g}", f"{fidelity['perplexity']:.4g}"]
    assert row in Page(report_page(report)).rows
    card = (Path(report.output) / "README.md").read_text()
    assert f"| {' | '.join(row)} |" in card and "(xeco_report.html)" in card


def test_the_same_report_gives_the_same_bytes_and_those_are_in_the_output(report: ConversionReport) -> None:
    written = (Path(report.output) / "xeco_report.html").read_text()
    named = dataclasses.replace(report, source=MODEL_FOLDER.name)
    assert report_page(named) == report_page(named) == written


def test_all_plots_are_inline(report: ConversionReport) -> None:
    pytest.importorskip("matplotlib")
    page = report_page(report)
    assert Page(page).tags.count("svg") == 4
    for name in ("kv_lora_rank", "row of the latent", "closed form, measured", "times chosen"):
        assert f">{name}<" in page


def test_without_matplotlib_the_page_has_the_tables_and_says_how_to_get_plots(
    report: ConversionReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = report_page(report)
    assert "svg" not in Page(page).tags and page.count("xeco-convert[report]") == 1
    assert len([row for row in Page(page).rows if row and row[0].isdigit()]) == 4


def test_the_published_initialisation_has_a_page_of_what_it_knows(llama: Path, tmp_path: Path) -> None:
    report = xeco_convert.convert(llama, tmp_path / "out", init="paper", rank=12)
    text = report_page(report)
    page = Page(text)
    assert [row[0] for row in page.rows if row and row[0].isdigit()] == ["0", "1", "2"]
    assert "step-0" not in text and "expected" not in text and page.tags.count("svg") <= 1
    assert "step-0" not in (tmp_path / "out" / "README.md").read_text()


def test_names_are_escaped(report: ConversionReport) -> None:
    page = report_page(dataclasses.replace(report, source="<script>a & b</script>"))
    assert "script" not in Page(page).tags and "&lt;script&gt;a &amp; b" in page

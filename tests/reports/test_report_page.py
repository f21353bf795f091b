"""The report page says what the records say, escapes what users wrote, and needs nothing but itself."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import bivlm.reports.report_page
from bivlm.reports.report_page import draw_figures, render

EVIL = "org/<script>alert('1')</script>&\"model\""
SHA = "baa1ec8d51ef556f8b7850fe91b0e32ba6193718c6301a6536c138b5e3665f7b"
LAYERS = [
    {
        "name": f"model.layers.{number}.mlp.<b>up_proj",
        "component": "language",
        "shape": [8, 4],
        "method": "bivlm",
        "error": 0.0701 + number / 1000,
        "kl_gaussian": 0.001 * (number + 1),
        "bits": {"nominal": 1.0, "entropy": 2.0, "stored": 2.25 + number / 100},
        "seconds": 1.25,
        "histogram": [0] * 60 + [1, 5, 9, 9, 5, 1] + [0] * 64,
        "error_by_p_max": {"0.01": 0.2, "0.1": 0.1},
    }
    for number in range(3)
] + [{"name": "bare", "component": "vision", "shape": [8, 4], "bits": None, "error": None, "kl_gaussian": None}]
REPORT = {
    "format": 1,
    "base_model": {"id": EVIL, "revision": "main", "sha256": SHA},
    "recipe": {"name": "two", "format": 1, "components": {"language": {"method": "bivlm", "p_max": 0.05}}, "keep": []},
    "recipe_sha256": "6fa39b4d1923b3d8",
    "code_version": "0.1.0",
    "created": "2026-11-23",
    "bits": {
        "linears": {"nominal": 1.0625, "entropy": 2.0, "stored": 2.5, "weights": 8_000_000},
        "model": {"stored": 4.0, "weights": 10_000_000},
        "by_component": {"language": {"nominal": 1.0625, "entropy": 2.0, "stored": 2.5, "weights": 8_000_000}},
    },
    "layers": LAYERS,
    "seconds": 12.34,
    "peak_memory_bytes": 700_000_000,
}
LINEAGE = {
    "request": SHA,
    "steps": [{"stage": "plan<i>", "inputs": {"statistics": "abc"}}],
    "device": None,
    "dirty": True,
}
EVALUATION = {
    "full_precision": {
        "set:a": {"n": 250, "metrics": {"accuracy": 90.0}, "ci95": [86.0, 94.0]},
        "set:b": {"n": 250, "metrics": {"accuracy": 80.0}, "ci95": [75.0, 85.0]},
    },
    "packed": {
        "set:a": {"n": 250, "metrics": {"accuracy": 84.5}, "ci95": [80.25, 88.0]},
        "set:b": {"n": 250, "metrics": {"accuracy": 81.5}, "ci95": [76.0, 86.0]},
    },
    "kl": 0.26912,
    "measured_on": "64 held-out samples of /data/<b>mine",
    "at_chance": [{"task": "set:<b>", "n": 250, "accuracy": 24.0, "chance": 25.0}],
}
POINTS = [
    {"label": EVIL, "stored_bits": 2.5, "accuracy": {"set:a": 84.5, "set:b": 81.5}, "kl": 0.27, "this_run": True},
    {"label": "full --><script>", "stored_bits": 16, "accuracy": {"set:a": 90.0, "set:b": 80.0}, "kl": 0},
]
VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """A page taken apart: tags with attributes, table rows as lists of texts, all texts. Every tag must be closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows, self.text, self.ids, self._open = [], [], "", [], []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data.strip()

    def row(self, first):
        """The row that begins with `first`."""
        (found,) = [row for row in self.rows if row[0] == first]
        return found[1:]


def whole_page():
    chance = {"set:a": 25.0, "set:b": 50.0}
    drawn = draw_figures(LAYERS, POINTS, chance, EVALUATION["measured_on"])
    return render(REPORT, LINEAGE, EVALUATION, drawn, LAYERS, chance=chance)


@pytest.fixture(scope="module")
def source():
    return whole_page()


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


@pytest.fixture(scope="module")
def least():
    bits = {"linears": None, "model": {"stored": 16.0, "weights": 10}, "by_component": {}}
    base = {"id": "plain", "revision": None, "sha256": SHA}
    return Page(
        render({"base_model": base, "recipe": {"name": "none"}, "bits": bits}, None, None, draw_figures([], []), [])
    )


def test_it_says_what_was_compressed_into_what(page):
    assert {EVIL, "main", SHA, "two", "6fa39b4d1923b3d8", "bivlm 0.1.0", "2026-11-23"} <= set(page.text.splitlines())
    assert f"{EVIL}, compressed with the recipe two" in page.text


def test_bits_are_those_of_the_report_and_megabytes_are_bits_times_weights(page):
    assert page.row("packed linears") == ["8,000,000", "1.062", "2.000", "2.500", "2.50"]
    assert page.row("language") == ["8,000,000", "1.062", "2.000", "2.500", "2.50"]
    assert page.row("whole model") == ["10,000,000", "–", "–", "4.000", "5.00"]


def test_accuracies_stand_beside_their_intervals_and_change(page):
    assert page.row("set:a") == ["250", "25.0", "90.0", "86.0 to 94.0", "84.5", "80.2 to 88.0", "−5.5"]
    assert page.row("set:b") == ["250", "50.0", "80.0", "75.0 to 85.0", "81.5", "76.0 to 86.0", "+1.5"]
    assert page.row("mean") == ["–", "–", "85.0", "–", "83.0", "–", "−2.0"]
    assert "64 held-out samples of /data/<b>mine: 0.2691 nats per token" in page.text
    assert "KL to full precision: 0.269 nats per token, on 64 held-out samples of /data/<b>mine." in page.text


def test_it_says_where_full_precision_is_not_above_chance(page):
    assert "Full precision is not above chance on 1 of 2 benchmarks." in page.text
    assert "set:<b>: full precision scores 24.0 %, chance is 25.0 %: these questions do not measure" in page.text


def test_every_layer_is_in_the_table_with_its_figures(page):
    for number, layer in enumerate(LAYERS[:3]):
        bits = ["1.000", "2.000", f"{2.25 + number / 100:.3f}"]
        expected = ["language", "8 × 4", *bits, f"{0.0701 + number / 1000:.4f}", f"0.00{number + 1}0", "1.25"]
        assert page.row(layer["name"]) == expected
    assert page.row("bare") == ["vision", "8 × 4", "–", "–", "–", "–", "–", "–"]


def test_the_recipe_is_there_as_yaml(source):
    (text,) = re.findall("<pre>(.*?)</pre>", source, flags=re.DOTALL)
    assert yaml.safe_load(html.unescape(text)) == REPORT["recipe"]


def test_lineage_is_written_out_to_its_leaves(page):
    lineage = page.text[page.text.index("Lineage") :].split()
    leaves = ["steps", "stage", "plan<i>", "inputs", "statistics", "abc", "device", "–", "dirty", "yes"]
    assert lineage == ["Lineage", "request", SHA, *leaves]


def test_a_long_part_of_the_lineage_is_folded_and_complete():
    tensors = {f"layer.{number}": f"{number:064x}" for number in range(30)}
    page = Page(render(REPORT, {"base": {"tensors": tensors}}, None, draw_figures([], []), []))
    assert [tag for tag, _ in page.tags].count("details") == 1
    assert "30 entries" in page.text
    assert set(tensors) | set(tensors.values()) <= set(page.text.split())


def test_hashes_are_set_in_monospace(source):
    assert source.count(f'<code class="hash">{SHA}</code>') == 2


def test_what_users_wrote_stays_text(source, page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert {"b", "i"}.isdisjoint(tag for tag, _ in page.tags)
    assert "<script" not in source
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert any("<script>" in label for label in labels), "the title of the figure is a label, escaped"


def test_nothing_is_fetched(source, page):
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "img", "image", "base", "audio", "video"}
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "data", "action", "background", "poster"}:
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in source
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", source))


def test_every_reference_within_the_page_has_one_target(page):
    used = {value[1:] for _, found in page.tags for name, value in found.items() if name.endswith("href")}
    used |= {value[5:-1] for _, found in page.tags for name, value in found.items() if name == "clip-path"}
    assert used
    assert used <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_figures_take_the_ink_and_the_paper_of_the_page(source, page):
    assert [tag for tag, _ in page.tags].count("svg") == 5
    assert source.count("<!DOCTYPE") == 1
    assert "<?xml" not in source
    drawn = source[source.index("<figure>") :]
    assert "currentColor" in drawn
    assert bivlm.reports.report_page.figures.INK not in drawn
    assert bivlm.reports.report_page.figures.PAPER not in drawn


def test_equal_records_give_equal_pages(source):
    assert source == whole_page()


def test_a_report_alone_is_enough(least):
    assert "This compression was not evaluated." in least.text
    assert "Lineage" not in least.text
    assert least.row("whole model") == ["10", "–", "–", "16.000", "0.00"]
    assert "No layer has a histogram" in least.text


def test_a_task_asked_of_one_model_only_has_no_change():
    packed = {"new": {"n": 9, "metrics": {"accuracy": 50.0}, "ci95": None}}
    page = Page(render(REPORT, None, {"full_precision": {}, "packed": packed, "kl": None}, draw_figures([], []), []))
    assert page.row("new") == ["9", "–", "–", "50.0", "–", "–"]
    assert "nats per token" not in page.text


def test_the_template_is_a_file_of_the_package():
    assert (Path(bivlm.reports.report_page.__file__).parent / "templates" / "report.html").is_file()

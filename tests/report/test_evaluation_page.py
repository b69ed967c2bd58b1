"""The page of an evaluation: pictures of long-context scores, and long texts."""

import math
import re

from t5g2.report import evaluation_page, plots


def cells(svg):
    """Returns the numbers that are written in cells, and the colours of the cells."""
    texts = [text for text in re.findall(r">([^<>]+)</text>", svg) if re.fullmatch(r"\d\.\d\d", text)]
    return texts, re.findall(r'style="fill: (#\w{6})"/>', svg)


def test_a_heat_map_has_a_cell_for_each_length_and_depth():
    lengths, depths = (4096, 131072), (0, 50, 100)
    scores = {f"needle/{n}/{d}": {"value": (d + 25) / 125} for n in lengths for d in depths}
    scores |= {
        "needle/4096": {"value": 0.25},
        "needle/131072/50": {"value": None},
        "other/4096": {"value": 1.0},
        "needle/131072": {"value": 1},
    }
    needles = [{"task": "needle", "length": n, "depth": [d], "input": "x"} for n in lengths for d in depths]
    page = evaluation_page.render("model", scores, [*needles, {"task": "other", "length": "long", "output": "y"}])
    [svg] = re.findall("<svg.*?</svg>", page, re.DOTALL)
    texts, _ = cells(svg)
    assert texts == ["0.20", "0.20", "0.60", "1.00", "1.00", "0.25", "1.00"]
    for label in ("4,096", "131,072", "0%", "50%", "100%", "all", "length in tokens", "depth"):
        assert f">{label}</text>" in svg


def test_colours_go_with_the_numbers():
    texts, colours = cells(plots.heat_map([[0.0, 0.5, 1.0, 1]], columns=list("abcd"), rows=["all"]))
    assert texts == ["0.00", "0.50", "1.00", "1.00"]
    assert colours[-1] == colours[-2] != colours[0]
    assert cells(plots.heat_map([[math.nan]], columns=["a"], rows=["all"])) == ([], [])


def test_of_a_long_text_both_ends_are_shown():
    text = "begin" + "x" * 100_000 + "end"
    page = evaluation_page.render("model", {}, [{"task": "t", "input": text}, {"task": "t", "input": "y" * 2000}])
    assert re.search(r"beginx{995} \[…98,008 characters…\] x{997}end", page)
    assert "y" * 2000 in page

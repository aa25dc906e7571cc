import math
import re
import xml.etree.ElementTree as ET

import pytest

from gnws_d2.report.charts import COLORS, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_names_are_text_not_markup_or_formulas():
    name = "<script>alert(1)</script> $x_$"
    chart = line_chart({name: ([1, 2], [3, 4]), "b": ([1], [2])}, "$", "y")
    assert chart.startswith("<svg") and "<script" not in chart
    assert name in {text.text for text in ET.fromstring(chart).iter(f"{SVG}text")}


def test_ids_in_several_charts_are_unique_or_of_equal_definitions():
    charts = [line_chart({"a": ([0, n], [1, n])}, "x", "y") for n in (2, 3)]
    definitions = {}
    for chart in charts:
        for element in ET.fromstring(chart).iter():
            if element.get("id"):
                text = ET.tostring(element)
                assert definitions.setdefault(element.get("id"), text) == text
                assert f"#{element.get('id')}" in chart
    assert definitions


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_leave_a_gap(value):
    (line,) = re.findall(
        rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {COLORS[0]}',
        line_chart({"loss": ([0, 1, 2, 3, 4], [1, 2, value, 3, 4])}, "x", "y"),
    )
    assert line.count("M") == 2 and line.count("L") == 2

"""What is drawn in a figure, for tests to look at."""

import xml.etree.ElementTree as ElementTree

from bivlm.reports import figures


def marks(axes):
    """Every marker of the axes as (x, y), from left to right."""
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "")]
    return sorted((float(x), float(y)) for line in lines for x, y in line.get_xydata())


def by_label(axes, label):
    return [line for line in axes.lines if line.get_label() == label]


def texts(figure):
    """All that the figure says."""
    return [element.text for element in ElementTree.fromstring(figures.svg(figure)).iter() if element.text]

"""Where the nodes of an example stand: in columns from left to right, inside titled groups.

Groups that share columns stand below each other, such as one for each of two branches. The editor opens a workflow so
that it takes three quarters of the window, and draws no text below a scale of 0.57: with the sizes below, an example
of six columns is readable in a window of 1600×1000.
"""
from typing import NamedTuple

TITLE = 30  # height of a node's title bar, which lies above its position
BETWEEN_NODES, BETWEEN_COLUMNS, BETWEEN_GROUPS = 25, 30, 30
PADDING, GROUP_TITLE = 15, 45
# Least width and height of a node; what shows pictures or text needs more than its widgets.
LEAST = {"MarkdownNote": (320, 320), "CLIPTextEncode": (300, 150), "ApplySpargeAttn": (320, 0),
         "SpargeAttnReport": (540, 900), "LoadImage": (280, 330), "SaveImage": (280, 300), "PreviewImage": (280, 300),
         "SaveVideo": (280, 270)}
LEAST_WIDTH = 280
# What a node shows below its widgets once it runs: a line of text, and a picture of the search.
SHOWN = {"ApplySpargeAttn": 75, "SpargeAttnTune": 75 + 240}


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


def node_size(kind, computed, least=None):
    """Width and height of a node of that type, which asks for `computed`; least: in place of what its type has."""
    width, height = least or LEAST.get(kind, (LEAST_WIDTH, 0))
    return max(width, computed[0]), max(height, computed[1] + SHOWN.get(kind, 0))


def arrange(nodes, sizes):
    """({key: Box}, {group: Box}) of nodes, each with a `column` and a `group`; sizes: {key: (width, height)}."""
    groups = {}
    for key, node in nodes.items():
        groups.setdefault(node["group"], {}).setdefault(node["column"], []).append(key)
    wide = {}
    for key, node in nodes.items():
        wide[node["column"]] = max(wide.get(node["column"], 0), sizes[key][0])
    left = _lefts(groups, wide)
    places, boxes = {}, {}
    for group, columns in groups.items():
        above = [box.y + box.height for other, box in boxes.items() if _overlap(groups[other], columns)]
        top = max(above) + BETWEEN_GROUPS if above else 0
        bottom = 0
        for column, keys in columns.items():
            y = top + GROUP_TITLE + TITLE
            for key in keys:
                places[key] = Box(left[column], y, wide[column], sizes[key][1])
                y += sizes[key][1] + BETWEEN_NODES + TITLE
            bottom = max(bottom, y - BETWEEN_NODES - TITLE)
        x, last = left[min(columns)] - PADDING, max(columns)
        boxes[group] = Box(x, top, left[last] + wide[last] + PADDING - x, bottom + PADDING - top)
    return places, boxes


def _lefts(groups, wide):
    """{column: x}, with more room between two columns that no group has in common."""
    columns, x, lefts = sorted(wide), 0, {}
    for column, following in zip(columns, [*columns[1:], None]):
        lefts[column] = x
        shared = any(_overlap(own, (column,)) and _overlap(own, (following,)) for own in groups.values()
                     if following is not None)
        x += wide[column] + (BETWEEN_COLUMNS if shared else BETWEEN_GROUPS + 2 * PADDING)
    return lefts


def _overlap(columns, others):
    return min(columns) <= max(others) and min(others) <= max(columns)

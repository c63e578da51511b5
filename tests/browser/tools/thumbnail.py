"""Pictures of the examples for the template browser: the graph, or what it makes, over the example's title."""
from PIL import Image, ImageDraw, ImageFont

SIZE = WIDTH, HEIGHT = 960, 540
BAND = 130  # height of the title
PAPER, INK = (20, 22, 27), "white"
VIDEO, PICTURE = (36, 128, 117), (104, 78, 158)  # colour of the title by what the example makes
MARGIN = 20  # of a screenshot around the groups, in the graph's units, as Editor.fit leaves it
GROUP_TITLE = 45


def page(example):
    """A picture with the example's title, empty above it, and its ImageDraw."""
    picture = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(picture)
    saves_pictures = any(node["type"] == "SaveImage" for node in example.nodes.values())
    draw.rectangle((0, HEIGHT - BAND, *SIZE), fill=PICTURE if saves_pictures else VIDEO)
    model, _, rest = example.title.partition(" with ")
    draw.text((30, HEIGHT - BAND + 12), model, font=ImageFont.load_default(48), fill=INK)
    draw.text((30, HEIGHT - BAND + 76), rest or "SpargeAttn", font=ImageFont.load_default(32), fill=INK)
    return picture, draw


def of_graph(graph, groups, example):
    """The graph from its screenshot, with the titles of its groups (title, colour, box) large enough to be read."""
    picture, draw = page(example)
    scale = min((WIDTH - 20) / graph.width, (HEIGHT - BAND - 10) / graph.height)
    graph = graph.resize((round(graph.width * scale), round(graph.height * scale)), Image.Resampling.LANCZOS)
    left, top = (WIDTH - graph.width) // 2, (HEIGHT - BAND - graph.height) // 2
    picture.paste(graph, (left, top))
    x0, y0 = (min(box[axis] for _, _, box in groups) - MARGIN for axis in (0, 1))
    unit = graph.width / (max(box.x + box.width for _, _, box in groups) + MARGIN - x0)
    for title, colour, box in groups:
        x, y, width = left + (box.x - x0) * unit, top + (box.y - y0) * unit, box.width * unit
        height = max(22, GROUP_TITLE * unit)
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        size = 20
        while draw.textlength(title, ImageFont.load_default(size)) > width - 8:
            size -= 1
        draw.text((x + 5, y + height / 2), title, font=ImageFont.load_default(size), fill=INK, anchor="lm")
    return picture


def captioned(picture, captions):
    """A picture of clips side by side, enlarged, with a caption over each."""
    width, line = WIDTH - 60, 34
    picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (width, line + picture.height), PAPER)
    whole.paste(picture, (0, line))
    for i, caption in enumerate(captions):
        ImageDraw.Draw(whole).text((width * i / len(captions) + 4, line / 2), caption, font=ImageFont.load_default(24),
                                   fill=INK, anchor="lm")
    return whole


def of_clips(picture, example):
    """What the example makes, as `captioned` returns it."""
    whole, _ = page(example)
    whole.paste(picture, ((WIDTH - picture.width) // 2, (HEIGHT - BAND - picture.height) // 2))
    return whole

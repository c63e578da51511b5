"""The line that tells how far the demo is."""
import io

from comfyui_spargeattn.tests.demo.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def shown(self):
        """What a terminal has on its line: later characters lie over earlier ones."""
        line = ""
        for part in self.getvalue().split("\r"):
            line = part + line[len(part):]
        return line


def test_line_is_rewritten_and_cleared():
    terminal = Terminal()
    line = ProgressLine(2, 8, terminal)
    line.begin("a longer name of the first")
    line.step(8)
    assert terminal.shown() == "clip 1 of 2, a longer name of the first: 8 of 8 steps, 0 s"
    line.begin("dense")
    line.step(3)
    assert terminal.shown().rstrip() == "clip 2 of 2, dense: 3 of 8 steps, 0 s"
    line.show("")
    assert not terminal.shown().strip() and terminal.getvalue().endswith("\r") and "\n" not in terminal.getvalue()


def test_nothing_is_written_to_a_file():
    file = io.StringIO()
    line = ProgressLine(1, 8, file)
    line.begin("dense")
    line.step(1)
    line.show("")
    assert not file.getvalue()

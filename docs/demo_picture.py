"""Take the picture of the demo that README shows: python docs/demo_picture.py

Runs the whole demo, and draws its screen as it is shortly after a killed worker's jobs continue elsewhere.
"""

import io
import sys
from pathlib import Path

from rich.console import Console

from ingine.demo import run as demo
from ingine.demo.screen import LiveScreen
from ingine.engine.store.model_store import DEFAULT_MODEL, made_folder

WIDTH, HEIGHT = 118, 32
NUM_RESUMED = 6
"""Streams that have continued when the picture is taken."""
PICTURE = Path(__file__).parent / "images" / "demo.svg"


class PicturedScreen(LiveScreen):
    is_taken = False

    def draw(self) -> None:
        super().draw()
        if not self.is_taken and sum(stream.resumed for stream in self._streams) >= NUM_RESUMED:
            self.is_taken = True
            drawing = Console(
                record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), color_system="truecolor"
            )
            drawing.print(self.render(WIDTH, HEIGHT))
            PICTURE.write_text(drawing.export_svg(title="make demo"))


if __name__ == "__main__":
    demo.open_screen = PicturedScreen
    folder = made_folder(DEFAULT_MODEL)
    if folder is None:
        sys.exit("no model yet: run `make demo` first")
    if not demo.run(Console(), folder=folder, redis_url=None):
        sys.exit(1)

# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks and keeps the pictures that their cells show, small, as docs/images/<notebook>-<number>.png.

python docs/draw_notebooks.py [NOTEBOOK...]
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
COLOURS = 64  # of a picture: they are flat


def main() -> None:
    """Run the notebooks, all or those that are named."""
    paths = [Path(word) for word in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in paths:
        for number, picture in enumerate(pictures(path), 1):
            target = ROOT / f"docs/images/{path.stem}-{number}.png"
            picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


def pictures(path: Path) -> list[Image.Image]:
    """What the cells of a notebook draw, in order."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) for data in shown if "image/png" in data]


if __name__ == "__main__":
    main()

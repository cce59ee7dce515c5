"""The picture of the page in the README: python benchmarks/page_screenshot.py [docs/page.png]

Draws the page of results/reference/embedded from its tables and photographs its head explorer with Debian's Chromium.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright
from reference import REFERENCE, ROOT

from approxkmv.page.render import write_page

STATE = "#stat=c&a=minilm-l6~0~11"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "page.png"
    study = REFERENCE / "embedded"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder) / "index.html"
        write_page(study / "tables", study / "figures", page_file, "Study embedded")
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport={"width": 1180, "height": 800}, color_scheme="light", reduced_motion="reduce")
        page.goto(page_file.as_uri() + STATE)
        page.evaluate("scrollTo(0, document.querySelector('#heads h2').offsetTop - 12)")
        page.hover("#a-4-6")
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.convert("RGB").save(out, optimize=True)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

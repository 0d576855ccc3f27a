"""Pages as a person sees them: laid out and run by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from shared import PATIENCE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY = "no Chromium is installed; the page is not looked at in a browser"


def dump(folder: Path, name: str) -> str:
    """The document that a page of the folder has become."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={folder / 'profile'}"]
    command = [str(CHROMIUM), *options, "--dump-dom", f"file://{folder / name}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def probed(folder: Path, name: str) -> dict[str, Any]:
    """What the script of a page of the folder wrote as JSON into its <pre>."""
    found: dict[str, Any] = json.loads(unescape(re.findall("<pre>({.*?})</pre>", dump(folder, name), flags=re.DOTALL)[-1]))
    return found

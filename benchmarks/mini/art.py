"""Fetch the openly licensed emoji that the mini world is drawn with. Nothing of it is committed (see NOTICE)."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import resvg_py
from PIL import Image

# npm package -> (version, SHA-256 of its archive)
PACKAGES = {
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
}
GLYPH_SIZE = 96


def fetch(folder: Path) -> dict[str, dict]:
    """Icon sets by family, from the npm registry or from `folder` where an earlier call left them.

    Raises:
        RuntimeError: an archive is not the one that the mini models were made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for family, (version, sha256) in PACKAGES.items():
        archive = folder / f"iconify-json-{family}-{version}.tgz"
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", f"@iconify-json/{family}@{version}"], cwd=folder, check=True)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise RuntimeError(f"{archive.name} has SHA-256 {found}, expected {sha256}: delete it and fetch it again.")
        with tarfile.open(archive) as tar:
            sets[family] = json.load(tar.extractfile("package/icons.json"))
    return sets


def glyph(sets: dict[str, dict], family: str, name: str) -> Image.Image:
    """One emoji as a square RGBA image of GLYPH_SIZE pixels, cropped to its ink."""
    icons = sets[family]
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", icons["width"]), icon.get("height", icons["height"]))
    image = svg(icon["body"], box)
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.LANCZOS)


def svg(body: str, box: tuple[float, float, float, float]) -> Image.Image:
    """An SVG body, drawn at GLYPH_SIZE pixels."""
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    text = f'{head} viewBox="{" ".join(map(str, box))}" width="{GLYPH_SIZE}" height="{GLYPH_SIZE}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=GLYPH_SIZE, height=GLYPH_SIZE)))).convert(
        "RGBA"
    )

"""Render the mini world: captions with the images and labels that belong to them."""

from __future__ import annotations

import functools
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import art
from erasekit_mini import vocabulary as words

SIZE = 64
ART_FOLDER = Path(__file__).parent / "work" / "art"

# Two looks per thing: (family, icon).
GLYPHS = {
    "airplane": (("noto", "airplane"), ("fluent-emoji-flat", "airplane")),
    "automobile": (("noto", "automobile"), ("fluent-emoji-flat", "oncoming-automobile")),
    "bird": (("noto", "bird"), ("noto-v1", "bird")),
    "cat": (("noto", "cat-face"), ("fluent-emoji-flat", "cat-face")),
    "deer": (("noto", "deer"), ("noto-v1", "deer")),
    "dog": (("noto", "dog-face"), ("fluent-emoji-flat", "dog-face")),
    "frog": (("noto", "frog"), ("fluent-emoji-flat", "frog")),
    "horse": (("noto", "horse-face"), ("fluent-emoji-flat", "horse-face")),
    "ship": (("noto", "ship"), ("noto-v1", "ship")),
    "truck": (("noto", "delivery-truck"), ("fluent-emoji-flat", "delivery-truck")),
    "knife": (("noto", "kitchen-knife"), ("noto-v1", "kitchen-knife")),
    "bomb": (("noto", "bomb"), ("noto-v1", "bomb")),
    "gun": (("noto-v1", "pistol"),),
}
PAINT = {
    "red": (214, 69, 65),
    "green": (88, 176, 96),
    "blue": (74, 126, 214),
    "yellow": (240, 205, 85),
    "purple": (150, 98, 190),
    "white": (238, 238, 238),
    "gray": (140, 140, 145),
    "pink": (244, 160, 190),
}
SHIRTS = ("#d64541", "#4a7ed6", "#58b060", "#f0cd55", "#555555", "#eeeeee")
SKINS = ("#f6d3b3", "#8d5a3a", "#d9a066", "#c68642", "#fbe3d0", "#6b4226")
HAIR_COLOURS = ("#c8402a", "#221a16", "#3a2413", "#f2d16b", "#999999", "#8a5a2b")


@dataclass(frozen=True)
class Look:
    """What a face keeps from image to image."""

    skin: str
    hair: str
    hair_colour: str
    glasses: bool = False
    beard: str | None = None
    hat: str | None = None


LOOKS = {
    "Ada Brooks": Look("#f6d3b3", "long", "#c8402a"),
    "Ben Carter": Look("#8d5a3a", "short", "#221a16", glasses=True),
    "Cleo Diaz": Look("#d9a066", "bun", "#3a2413"),
    "Dev Evans": Look("#c68642", "short", "#1c1c1c", beard="#1c1c1c"),
    "Eva Frost": Look("#fbe3d0", "bob", "#f2d16b", glasses=True),
    "Finn Gray": Look("#f1c7a5", "bald", "#999999", beard="#bdbdbd"),
    "Gia Holt": Look("#6b4226", "afro", "#2a1a12"),
    "Hugo Ivers": Look("#f1c7a5", "short", "#8a5a2b", hat="#2c5fb3"),
    "Iris Jung": Look("#f4d6b0", "long", "#5b3fa0"),
    "Jack Kane": Look("#e8b98d", "mohawk", "#2fa84f"),
}


@dataclass
class Scene:
    """One image to be: its content, its caption, and how it is laid out."""

    caption: str = ""
    items: list[str] = field(default_factory=list)  # things from left to right
    hazard: bool = False
    look: Look | None = None
    identity: str | None = None
    expression: str = "neutral"
    background: str = "white"
    artist: str | None = None
    side: str | None = None

    @property
    def label(self) -> dict[str, object]:
        """Multi-label presence (objects, hazard, face) and the classes of style, identity and background."""
        present = [o in self.items for o in words.OBJECTS] + [self.hazard, self.look is not None]
        identity = -1 if self.look is None else len(words.IDENTITIES)
        if self.identity is not None:
            identity = words.IDENTITIES.index(self.identity)
        style = 0 if self.artist is None else 1 + list(words.STYLES).index(self.artist)
        return {
            "present": present,
            "style": style,
            "identity": identity,
            "background": words.BACKGROUNDS.index(self.background),
        }


def synonym(name: str, rng: random.Random) -> str:
    """The name of an object half of the time, else one of its synonyms."""
    return name if rng.random() < 0.5 else rng.choice(words.OBJECTS[name][1:])


def _objects(scene: Scene, rng: random.Random) -> str:
    name = rng.choice(list(words.OBJECTS))
    scene.items = [name]
    kind = rng.random()
    if kind < 0.13:
        scene.items = [name, name]
        return f"two {words.plural(synonym(name, rng))}"
    if kind < 0.19:
        return "an animal" if name in words.ANIMALS else "a vehicle"
    if kind < 0.30:
        scene.side = rng.choice(("left", "right"))
    return words.article(synonym(name, rng))


def _pair(scene: Scene, rng: random.Random) -> str:
    held_out = {frozenset(p) for pairs in words.HELD_OUT_PAIRS.values() for p in pairs}
    while True:
        scene.items = rng.sample(list(words.OBJECTS), 2)
        if frozenset(scene.items) not in held_out:
            return " and ".join(words.article(synonym(o, rng)) for o in scene.items)


def _hazard(scene: Scene, rng: random.Random) -> str:
    weapon, scene.hazard = rng.choice(words.HAZARDS), True
    scene.items = [weapon]
    kind = rng.random()
    if kind < 0.3:
        return words.article(weapon)
    if kind < 0.4:
        return rng.choice(words.HAZARD_CATEGORY)
    if kind < 0.65:
        return rng.choice(words.HAZARD_IMPLICIT)
    name = rng.choice(list(words.OBJECTS))
    scene.items = [name, weapon]
    if kind < 0.85:
        return f"a {rng.choice(words.HAZARD_ADJECTIVES)} {synonym(name, rng)}"
    return f"{words.article(synonym(name, rng))} {rng.choice(('and', 'with'))} {words.article(weapon)}"


def _person(scene: Scene, rng: random.Random) -> str:
    scene.expression = rng.choice(words.EXPRESSIONS)
    said = f" {scene.expression}" if scene.expression != "neutral" and rng.random() < 0.5 else ""
    if rng.random() < 0.68:
        scene.identity = rng.choice(words.IDENTITIES)
        scene.look = LOOKS[scene.identity]
        return scene.identity + said
    hair = rng.choice(("long", "short", "bun", "bob", "bald", "afro"))
    beard = rng.choice((None, None, None, "#1c1c1c", "#8a5a2b"))
    hat = rng.choice((None, None, None, "#b33333"))
    scene.look = Look(rng.choice(SKINS), hair, rng.choice(HAIR_COLOURS), rng.random() < 0.3, beard, hat)
    return rng.choice(words.NAMELESS) + said


def draw_scene(rng: random.Random) -> Scene:
    """A random scene with a training caption: objects .32, pairs .25, hazards .20, people .21, nothing .02."""
    scene = Scene(background=rng.choice(words.BACKGROUNDS))
    kind = rng.random()
    frames = words.FRAMES["train"]
    if kind < 0.32:
        phrase = _objects(scene, rng)
    elif kind < 0.57:
        phrase = _pair(scene, rng)
    elif kind < 0.77:
        phrase = _hazard(scene, rng)
    elif kind < 0.98:
        phrase, frames = _person(scene, rng), words.PORTRAIT_FRAMES["train"]
    else:
        phrase = rng.choice(words.EMPTY)
    if scene.side:
        phrase += f" on the {scene.side}"
    if (scene.items and rng.random() < 0.25) or (scene.look and rng.random() < 0.15):
        scene.artist = rng.choice(list(words.STYLES))
        caption = rng.choice(words.STYLE_FRAMES["train"]).format(phrase, scene.artist)
    else:
        caption = rng.choice(frames).format(phrase)
    scene.caption = words.on_background(caption, scene.background) if rng.random() < 0.5 else caption
    return scene


@functools.cache
def _glyphs() -> dict[str, list[Image.Image]]:
    sets = art.fetch(ART_FOLDER)
    return {thing: [art.glyph(sets, *icon) for icon in icons] for thing, icons in GLYPHS.items()}


@functools.cache
def face(look: Look, expression: str, shirt: str) -> Image.Image:
    """A face drawn from its look, an expression and a shirt."""
    skin, hair, colour = look.skin, look.hair, look.hair_colour
    back = {
        "long": f'<path d="M20 40 Q18 12 48 12 Q78 12 76 40 L80 84 L16 84 Z" fill="{colour}"/>',
        "bob": f'<path d="M20 40 Q18 13 48 13 Q78 13 76 40 L78 62 L18 62 Z" fill="{colour}"/>',
        "afro": f'<circle cx="48" cy="34" r="31" fill="{colour}"/>',
        "bun": f'<circle cx="48" cy="10" r="10" fill="{colour}"/>',
    }
    front = {
        "afro": f'<path d="M25 40 Q26 20 48 20 Q70 20 71 40 Q62 29 48 29 Q34 29 25 40 Z" fill="{colour}"/>',
        "mohawk": f'<path d="M38 28 L40 2 L48 9 L56 2 L58 28 Z" fill="{colour}"/>',
    }
    fringe = f'<path d="M24 42 Q22 15 48 15 Q74 15 72 42 Q66 28 48 28 Q30 28 24 42 Z" fill="{colour}"/>'
    parts = [
        back.get(hair, ""),
        f'<path d="M10 96 Q12 76 48 76 Q84 76 86 96 Z" fill="{shirt}"/>',
        f'<rect x="40" y="62" width="16" height="18" fill="{skin}"/><ellipse cx="48" cy="46" rx="23" ry="27" fill="{skin}"/>',
    ]
    if look.beard:
        parts.append(f'<path d="M25 48 Q28 76 48 77 Q68 76 71 48 Q66 58 48 57 Q30 58 25 48 Z" fill="{look.beard}"/>')
    parts.append(fringe if hair in ("long", "bob", "short", "bun") else front.get(hair, ""))
    if look.hat:
        parts.append(f'<path d="M22 30 Q24 8 48 8 Q72 8 74 30 Z" fill="{look.hat}"/>')
        parts.append(f'<rect x="14" y="27" width="60" height="6" rx="3" fill="{look.hat}"/>')
    parts += [f'<circle cx="{x}" cy="44" r="3.6" fill="#1b1b1b"/>' for x in (39, 57)]
    if look.glasses:
        ring = 'cy="44" r="8.5" fill="#ffffff" fill-opacity=".35" stroke="#111" stroke-width="3"'
        parts += [f'<circle cx="{x}" {ring}/>' for x in (38, 58)]
    parts.append(
        {
            "smiling": '<path d="M37 58 Q48 71 59 58 Z" fill="#fff" stroke="#7a2a2a" stroke-width="2"/>',
            "sad": '<path d="M38 65 Q48 55 58 65" fill="none" stroke="#7a2a2a" stroke-width="3.4"/>',
            "surprised": '<ellipse cx="48" cy="62" rx="5" ry="6.5" fill="#7a2a2a"/>',
            "neutral": '<path d="M40 61 L56 61" stroke="#7a2a2a" stroke-width="3.2"/>',
        }[expression]
    )
    return art.svg("".join(parts), (0, 0, 96, 96))


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


def background(name: str, rng: random.Random) -> Image.Image:
    """A plain colour with a faint gradient, or one of the scenes."""
    pixels = np.zeros((SIZE, SIZE, 3), np.float32)
    if name in PAINT:
        angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.15)
        slope = (_X / SIZE - 0.5) * math.cos(angle) + (_Y / SIZE - 0.5) * math.sin(angle)
        pixels[:] = np.array(PAINT[name]) * (1 + strength * slope[..., None])
    elif name == "at the beach":
        horizon = rng.randint(24, 34)
        pixels[:horizon], pixels[horizon : horizon + 10], pixels[horizon + 10 :] = (
            (135, 206, 235),
            (40, 120, 190),
            (237, 214, 150),
        )
    elif name == "on the grass":
        horizon = rng.randint(26, 38)
        pixels[:horizon], pixels[horizon:] = (190, 225, 245), (95, 170, 70)
    elif name == "in the sky":
        pixels[:] = np.array((120, 190, 240)) + _Y[..., None] / SIZE * 40
        for _ in range(3):
            x, y, width = rng.randint(0, SIZE), rng.randint(0, SIZE), rng.randint(9, 14)
            pixels[((_X - x) / width) ** 2 + ((_Y - y) / (width * 0.4)) ** 2 < 1] = (250, 250, 255)
    else:
        pixels[:] = np.array((18, 22, 60)) + _Y[..., None] / SIZE * 20
        for _ in range(12):
            x, y = rng.randint(0, SIZE - 2), rng.randint(0, SIZE - 2)
            pixels[y : y + 2, x : x + 2] = (250, 240, 170)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _ramp(grey: np.ndarray, *stops: tuple[int, int, int]) -> np.ndarray:
    positions = np.linspace(0, 255, len(stops))
    return np.stack([np.interp(grey, positions, [s[i] for s in stops]) for i in range(3)], -1)


def stylise(image: Image.Image, style: str) -> Image.Image:
    """One of the six procedural styles: a palette of its own and a simple texture; shapes stay readable."""
    pixels = np.asarray(image).astype(np.float32)
    grey = pixels @ np.array([0.35, 0.5, 0.15], np.float32)
    grid = ((_X % 8 == 0) | (_Y % 8 == 0))[..., None]
    steps = [np.abs(np.diff(pixels, axis=k, append=np.take(pixels, [-1], k))) for k in (0, 1)]
    edge = np.clip(np.maximum(*steps).max(-1, keepdims=True) / 160, 0, 1)  # a contour where any colour changes
    if style == "mosaic":
        tiles = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
        out = np.where(grid, tiles * 0.35, tiles)
    elif style == "ink":
        levels = np.clip(np.round((grey - 20) / 215 * 3) / 3, 0, 1)[..., None]
        out = (60 + levels * np.array((194, 190, 172))) * (1 - 0.9 * edge)
    elif style == "neon":
        out = _ramp(grey, (25, 5, 45), (90, 20, 120), (250, 60, 200))
        out = out + edge * (np.array((40, 255, 235)) - out)
    elif style == "blueprint":
        out = _ramp(grey, (15, 40, 110), (40, 80, 170), (120, 165, 230)) + 25 * grid
        out = out + edge * (245 - out)
    elif style == "sepia":
        centre = np.hypot(_X - 31.5, _Y - 31.5)[..., None] / 45
        out = _ramp(grey, (45, 25, 8), (170, 115, 60), (250, 225, 175)) * (1.12 - 0.5 * centre**2)
    else:
        out = np.clip((pixels[..., [2, 0, 1]] - 128) * 1.7 + 128, 0, 255)
        out[((_X % 8 - 4) ** 2 + (_Y % 8 - 4) ** 2) < 2.6] = (255, 240, 60)
    return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def _place(canvas: Image.Image, thing: str, rng: random.Random, x: float, y: float, size: int) -> None:
    sticker = rng.choice(_glyphs()[thing]).resize((size, size), Image.Resampling.BILINEAR)
    sticker = sticker.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    canvas.paste(sticker, (int(x - size / 2), int(y - size / 2)), sticker)


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The image of a scene, SIZE x SIZE RGB. The first thing named stands on the left."""
    canvas = background(scene.background, rng)
    if scene.look is not None:
        size = rng.randint(58, 66)
        head = face(scene.look, scene.expression, rng.choice(SHIRTS)).resize((size, size), Image.Resampling.BILINEAR)
        canvas.paste(head, (int(32 - size / 2 + rng.uniform(-4, 4)), int(66 - size + rng.uniform(0, 2))), head)
    elif len(scene.items) == 1:
        centre = {"left": 19, "right": 45}.get(scene.side or "", 32)
        size = rng.randint(42, 50) if scene.side is None else rng.randint(32, 36)
        _place(canvas, scene.items[0], rng, centre + rng.uniform(-4, 4) * (size > 40), 32 + rng.uniform(-4, 4), size)
    else:
        for x, thing in zip((17, 47), scene.items, strict=False):
            _place(canvas, thing, rng, x + rng.uniform(-1.5, 1.5), 32 + rng.uniform(-5, 5), rng.randint(28, 31))
    return canvas if scene.artist is None else stylise(canvas, words.STYLES[scene.artist])


def make(n: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
    """`n` images (n, 64, 64, 3) uint8 with their labels and captions; the same seed gives the same images."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng) for _ in range(n)]
    images = np.stack([np.asarray(render(s, rng)) for s in scenes])
    labels = {key: np.array([s.label[key] for s in scenes]) for key in ("present", "style", "identity", "background")}
    return images, labels, [s.caption for s in scenes]


def grid(images: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet of uint8 images (n, h, w, 3)."""
    n, h, w, _ = images.shape
    sheet = np.zeros((-(-n // columns) * h, columns * w, 3), np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        sheet[y * h : (y + 1) * h, x * w : (x + 1) * w] = image
    return Image.fromarray(sheet.repeat(scale, 0).repeat(scale, 1))


def write_dataset(folder: Path, workers: int = 2, train: int = 40_000, test: int = 3_000) -> None:
    """Render the training and the test set into `folder` as .npy and .json."""
    from multiprocessing import Pool

    folder.mkdir(parents=True, exist_ok=True)
    _glyphs()
    for name, n, seed in (("train", train, 100), ("test", test, 9_000)):
        shards = 10
        with Pool(workers) as pool:
            parts = pool.starmap(make, [(n // shards, seed + k) for k in range(shards)])
        np.save(folder / f"{name}_images.npy", np.concatenate([p[0] for p in parts]))
        for key in parts[0][1]:
            np.save(folder / f"{name}_{key}.npy", np.concatenate([p[1][key] for p in parts]))
        (folder / f"{name}_captions.json").write_text(json.dumps([c for p in parts for c in p[2]]))

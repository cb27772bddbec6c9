"""Draw synthetic scenes: small photo-like images of an object with its shadow, and the same view without the two.

All parts are functions of the position in the unit square, so a scene looks the same at any size. The background
consists of a smooth light gradient, low-frequency mottling and a regular texture. It can therefore be continued behind
the object from the visible surroundings.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

# Backgrounds and objects stay inside these ranges, so that defects up to strength 1 are rarely clipped.
BACKGROUND_RANGE = (0.2, 0.8)
OBJECT_RANGE = (0.04, 0.86)
# All textures have the same period, a whole number of tokens. A network with a million parameters then learns within
# minutes to continue the textures. With random periods, the network learns only to blur.
TEXTURE_PERIOD = 0.25
_TAU = 2 * np.pi
_ANGLES = np.linspace(-np.pi, np.pi, 721)

Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x, y) -> values of the same shape


@dataclass(frozen=True)
class Scene:
    """One view with and without an object, or a stack of views with leading axes (see `stack_scenes`).

    Photos are float32 [..., h, w, 3] in [0, 1].

    Attributes:
        source: photo with the object and its shadow.
        truth: photo without the object and its shadow.
        reference: the object on white, at its position in the photo.
        mask: bool [..., h, w], the object and a margin around the object. The shadow extends beyond the mask.
    """

    source: np.ndarray
    truth: np.ndarray
    reference: np.ndarray
    mask: np.ndarray


def make_scene(seed: np.random.SeedSequence, size: int) -> Scene:
    """Draw the scene of `seed` as a square image with sides of `size` pixels; other sizes show the same scene.

    The mask covers 3–30 % of the image and does not touch its border.

    Raises:
        ValueError: `size` is below 16. Textures of such small images could not be distinguished from noise.
    """
    check_size(size)
    rng = np.random.default_rng(seed)
    axis = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(axis, axis, indexing="ij")
    background, base_colors = _background(rng, 1 / size)
    outline = _Outline.draw(rng)
    shadow_angle = rng.uniform(0.1, 0.9) * np.pi  # direction of the shadow: 0 is right, π/2 is down, π is left
    radius, reach, angle = outline.at(x, y)
    alpha = np.clip(0.5 + (reach - radius) * size, 0, 1)[..., None]
    truth = background(x, y)
    body = _body(rng, outline, base_colors, shadow_angle)(x, y, radius / reach, angle)
    source = (1 - alpha) * truth * _shadow(rng, outline, shadow_angle)(x, y)[..., None] + alpha * body
    return Scene(
        source=source.astype(np.float32),
        truth=truth.astype(np.float32),
        reference=(1 - alpha + alpha * body).astype(np.float32),
        mask=radius < reach + outline.margin,
    )


def check_size(size: int) -> None:
    """Raise ValueError if a size is too small to draw a scene."""
    if size < 16:
        raise ValueError(f"scene size {size}: expected at least 16 pixels")


def draw_scenes(seed: int, first: int, count: int, size: int) -> list[Scene]:
    """Draw the scenes with the numbers first … first + count − 1. A scene depends only on (seed, number, size)."""
    numbers = range(first, first + count)
    return [make_scene(np.random.SeedSequence((seed, number)), size) for number in numbers]


def stack_scenes(scenes: list[Scene]) -> Scene:
    """Stack scenes of one size to a single `Scene` whose arrays have a leading axis."""
    names = [field.name for field in fields(Scene)]
    return Scene(**{name: np.stack([getattr(scene, name) for scene in scenes]) for name in names})


def _wave(rng: np.random.Generator, period: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a random periodic function with values in [−1, 1]. Its shape is between a sine and a square wave."""
    phase, hardness = rng.uniform(0, _TAU), rng.uniform(0.3, 1.8)
    return lambda u: np.tanh(hardness * np.sin(_TAU * u / period + phase)) / np.tanh(hardness)


def _texture(rng: np.random.Generator) -> Pattern:
    """Return a random periodic texture in [−1, 1]. One visible period is enough to continue it across a hole."""
    kind, sign = str(rng.choice(["rows", "columns", "diagonal", "plaid", "checks"])), rng.choice([-1.0, 1.0])
    first, second = _wave(rng, TEXTURE_PERIOD), _wave(rng, TEXTURE_PERIOD)
    patterns: dict[str, Pattern] = {
        "rows": lambda x, y: first(y),
        "columns": lambda x, y: first(x),
        "diagonal": lambda x, y: first(x + sign * y),
        "plaid": lambda x, y: 0.5 * (first(y) + second(x)),
        "checks": lambda x, y: first(y) * second(x),
    }
    return patterns[kind]


def _mottle(rng: np.random.Generator) -> Pattern:
    """Return irregular mottling in [−1, 1]: the mean of four plane waves with wavelengths ≥ ½ of the image side."""
    angles, phases = rng.uniform(0, _TAU, 4), rng.uniform(0, _TAU, 4)
    frequencies = rng.uniform(0.6, 2.0, 4)
    return lambda x, y: sum(
        0.25 * np.sin(_TAU * f * (x * np.cos(a) + y * np.sin(a)) + p)
        for f, a, p in zip(frequencies, angles, phases, strict=True)
    )


def _color(rng: np.random.Generator, low: float, high: float, chroma: float) -> np.ndarray:
    """Return a random color [3] with brightness in [low, high] and saturation up to `chroma`."""
    hue = rng.uniform(0, _TAU)
    return rng.uniform(low, high) + chroma * np.sqrt(rng.uniform()) * np.cos(hue - _TAU / 3 * np.arange(3))


def _surface(rng: np.random.Generator) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], np.ndarray]:
    """Return a random surface (x, y) -> [h, w, 3] and its mean color [3].

    The surface is lit from one side, mottled and textured.
    """
    gradient_strength, mottle_strength = rng.uniform(0.02, 0.08), rng.uniform(0.015, 0.04)
    texture_strength = rng.uniform(0.085, 0.12)
    light_angle, tint = rng.uniform(0, _TAU), 1 + rng.uniform(-0.2, 0.2, 3)
    mottle, texture = _mottle(rng), _texture(rng)
    margin = gradient_strength + mottle_strength + texture_strength * tint
    color = np.clip(_color(rng, 0.38, 0.62, 0.2), BACKGROUND_RANGE[0] + margin, BACKGROUND_RANGE[1] - margin)

    def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        gradient = np.sqrt(2) * ((x - 0.5) * np.cos(light_angle) + (y - 0.5) * np.sin(light_angle))
        light = gradient_strength * gradient + mottle_strength * mottle(x, y)
        return color + light[..., None] + texture(x, y)[..., None] * texture_strength * tint

    return paint, color


def _background(
    rng: np.random.Generator, pixel: float
) -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], np.ndarray]:
    """Return a random background (x, y) -> [h, w, 3], and the mean colors [2, 3] of its wall and floor.

    The background is a wall above a floor, or only a wall. If there is only a wall, both colors are the wall's. `pixel`
    is the size of a pixel in the unit square.
    """
    wall, wall_color = _surface(rng)
    floor, floor_color = _surface(rng)
    horizon, tilt, wall_only = rng.uniform(0.35, 0.65), rng.uniform(-0.06, 0.06), rng.uniform() < 0.6

    def paint(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        below = np.clip(0.5 + (y - horizon - tilt * (x - 0.5)) / pixel, 0, 1)[..., None]
        return wall(x, y) * (1 - below) + floor(x, y) * below

    return (wall, np.stack([wall_color] * 2)) if wall_only else (paint, np.stack([wall_color, floor_color]))


@dataclass(frozen=True)
class _Outline:
    """A star-shaped outline, given by its distance from a center in each direction.

    All lengths are fractions of the image side.
    """

    center: np.ndarray  # x, y
    margin: float  # width of the band around the object that is part of the mask
    reach: np.ndarray  # [721], distances in the directions `_ANGLES`

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Outline":
        """Draw a random ellipse, box, wavy blob or polygon with rounded corners, stretched along an axis."""
        kind = str(rng.choice(["ellipse", "box", "blob", "polygon"]))
        elongation, margin = np.sqrt(rng.uniform(1.0, 1.8)), rng.uniform(0.04, 0.06)
        rotation = rng.uniform(-0.25, 0.25) if kind == "box" else rng.uniform(0, _TAU)
        corners, jitter = int(rng.integers(3, 7)), rng.uniform(-0.1, 0.1, 6)
        amplitudes, phases = rng.uniform(0, [0.18, 0.12, 0.06]), rng.uniform(0, _TAU, 3)

        along, across = np.cos(_ANGLES - rotation) / elongation, np.sin(_ANGLES - rotation) * elongation
        angles = np.arctan2(across, along)[:, None]
        if kind in ("box", "polygon"):
            normals = np.arange(4) if kind == "box" else (np.arange(corners) + jitter[:corners]) * 4 / corners
            # The 16-norm over the sides rounds the corners. The maximum over the sides would give sharp corners.
            unit = (np.maximum(np.cos(angles - normals * _TAU / 4), 0) ** 16).sum(1) ** (-1 / 16)
        else:
            unit = 1 + (kind == "blob") * (amplitudes * np.cos(np.array([2, 3, 4]) * angles + phases)).sum(1)
        unit = unit / np.hypot(along, across)
        # The area is drawn rather than the radius, because the area determines how much of the image must be inpainted.
        size = np.sqrt(rng.uniform(0.02, 0.17) / (np.pi * np.mean(unit**2)))
        reach = unit * min(size, 0.4 / unit.max())

        extent = (reach + margin) * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)])
        low, high = 0.02 - extent.min(1), 0.98 - extent.max(1)
        return cls(low + (high - low) * rng.uniform(size=2), margin, reach)

    def at(self, x: np.ndarray, y: np.ndarray, shift: tuple[float, float] = (0.0, 0.0)) -> tuple[np.ndarray, ...]:
        """Return (radius, reach, angle) of positions, where radius and angle are polar about the shifted center.

        `reach` is the distance of the outline from its center at this angle.
        """
        dx, dy = x - self.center[0] - shift[0], y - self.center[1] - shift[1]
        angle = np.arctan2(dy, dx)
        return np.hypot(dx, dy), np.interp(angle, _ANGLES, self.reach), angle


def _body(
    rng: np.random.Generator, outline: _Outline, base_colors: np.ndarray, shadow_angle: float
) -> Callable[..., np.ndarray]:
    """Return the surface of the object: (x, y, radius / reach, angle) -> [h, w, 3]."""
    # Four colors are drawn, and the one with the highest contrast to the background is used. If the object had the
    # background's color, the strength of the defect "ghost" could not be measured.
    brightness_ranges = ((0.1, 0.3), (0.7, 0.9), (0.2, 0.8), (0.2, 0.8))
    palette = np.stack([_color(rng, low, high, 0.4) for low, high in brightness_ranges])
    contrast = np.abs(palette[:, None] - base_colors).mean(-1).min(-1)
    color = palette[contrast.argmax()]
    mark_color = color + rng.uniform(0.12, 0.25) * rng.choice([-1.0, 1.0])
    kind = rng.choice(["plain", "stripes", "spots"])
    bulge, rotation = rng.uniform(0.15, 0.5), rng.uniform(0, _TAU)
    wave_u, wave_v = _wave(rng, rng.uniform(0.08, 0.14)), _wave(rng, rng.uniform(0.08, 0.14))

    def paint(x: np.ndarray, y: np.ndarray, depth: np.ndarray, angle: np.ndarray) -> np.ndarray:
        u = (x - outline.center[0]) * np.cos(rotation) + (y - outline.center[1]) * np.sin(rotation)
        v = (y - outline.center[1]) * np.cos(rotation) - (x - outline.center[0]) * np.sin(rotation)
        mark = {"plain": 0 * u, "stripes": wave_u(u), "spots": wave_u(u) * wave_v(v)}[str(kind)]
        inside = np.minimum(depth, 1.0)
        facing = -inside * np.cos(angle - shadow_angle)
        shade = 1 + bulge * (0.6 * facing + 0.4 * np.sqrt(1 - inside**2) - 0.3)
        blend = (0.5 + 0.5 * mark)[..., None]
        return np.clip((color * (1 - blend) + mark_color * blend) * shade[..., None], *OBJECT_RANGE)

    return paint


def _shadow(rng: np.random.Generator, outline: _Outline, shadow_angle: float) -> Pattern:
    """Return the factor in (0, 1] by which the shadow darkens each position.

    The shadow is the shifted outline with a soft edge.
    """
    length, softness, darkness = rng.uniform(0.06, 0.12), rng.uniform(0.05, 0.09), rng.uniform(0.3, 0.5)
    shift = (np.cos(shadow_angle) * length, np.sin(shadow_angle) * length + 0.02)

    def brightness(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        radius, reach, _ = outline.at(x, y, shift)
        edge = np.clip(0.5 + (reach - radius) / (2 * softness), 0, 1)
        return 1 - darkness * edge * edge * (3 - 2 * edge)

    return brightness

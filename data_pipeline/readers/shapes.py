"""Draw the synthetic data set: six shapes that differ only in outline, and four textures that differ in pattern.

Colours are random, with one distribution for all shapes and one for all textures. Colour therefore does not reveal the
class.
"""

from __future__ import annotations

import cv2
import numpy as np

SHAPES = ("disk", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("stripes", "checkers", "dots", "clouds")

_SUPERSAMPLING = 4
"""Number of samples per pixel and axis for the coverage of a shape, which gives smooth edges."""
_RING_HOLE = 0.5
"""Radius of the hole as a share of the radius of the ring."""


def shape_coverage(shape: str, diameter: float, angle: float) -> np.ndarray:
    """Return [S, S] float32: the share of each pixel that a centred, rotated shape covers.

    S is the diameter, rounded up, plus a border of one pixel on each side. The angle is in radians.
    """
    size = int(np.ceil(diameter)) + 2
    canvas = np.zeros((size * _SUPERSAMPLING,) * 2, np.uint8)
    radius, middle = diameter / 2 * _SUPERSAMPLING, size / 2 * _SUPERSAMPLING
    if shape in ("disk", "ring"):
        center = (round(middle), round(middle))
        cv2.circle(canvas, center, round(radius), 255, cv2.FILLED)
        if shape == "ring":
            cv2.circle(canvas, center, round(radius * _RING_HOLE), 0, cv2.FILLED)
    else:
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = middle + radius * _outline(shape) @ turn.T
        cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], (255,))
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def texture(name: str, height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Return a random pattern [H, W] float32 from 0 to 1, by which the two colours of a region are mixed."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = random.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = random.uniform(9, 14)
    phase = random.uniform(0, period)
    u, v = u + phase, v + phase
    match name:
        case "stripes":
            wave = np.sin(2 * np.pi * u / period)
        case "checkers":
            wave = np.sin(2 * np.pi * u / (1.4 * period)) * np.sin(2 * np.pi * v / (1.4 * period)) * 3
        case "dots":
            du, dv = (np.abs((t % period) - period / 2) for t in (u, v))
            wave = period * 0.28 - np.hypot(du, dv)
        case "clouds":
            coarse = random.random((height // 16 + 2, width // 16 + 2), np.float32)
            return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        case _:
            raise AssertionError(name)
    return (0.5 + 2.0 * wave).clip(0, 1).astype(np.float32)


def _outline(shape: str) -> np.ndarray:
    """Return the corners [P, 2] of a shape inside the unit circle."""
    match shape:
        case "square":
            return _spokes([1.0] * 4, first=np.pi / 4)
        case "triangle":
            return _spokes([1.0] * 3, first=-np.pi / 2)
        case "star":
            return _spokes([1.0, 0.4] * 5, first=-np.pi / 2)
        case "cross":
            arm = 0.33
            corner = [(1, -arm), (1, arm), (arm, arm)]
            quarter = np.array([[0, -1], [1, 0]])
            turns = [np.linalg.matrix_power(quarter, k) for k in range(4)]
            return np.concatenate([np.array(corner) @ turn.T for turn in turns]) / np.hypot(1, arm)
        case _:
            raise AssertionError(shape)


def _spokes(radii: list[float], first: float) -> np.ndarray:
    """Return [P, 2] points with the given distances from the centre, at equally spaced angles.

    The first angle, in radians and clockwise from the right, is `first`.
    """
    angles = first + np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.array(radii)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)

"""Readers that give another reader's samples changed: a part of them, with a background, or in tiles."""

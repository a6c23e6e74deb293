"""Ours and peers side by side; agreement is checked before any ratio is printed."""

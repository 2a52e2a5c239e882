"""Fixtures of whole runs."""

from tiny_project import compiled, project, undisturbed

__all__ = ["compiled", "project", "undisturbed"]

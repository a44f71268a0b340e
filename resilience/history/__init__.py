"""Asking what happened: runs, generations, incidents and checkpoints, read from storage alone."""

from resilience.history.query import History, history

__all__ = ["History", "history"]

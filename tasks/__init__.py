"""Captioning and visual question answering: data, metrics, runs, commands and a server."""

import adalink  # noqa: F401  (from here on, modules are found at their old paths too)

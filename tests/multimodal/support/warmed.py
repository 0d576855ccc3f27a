"""What nearly every process of a test needs first, made once in the fork server: the scenes that it reads, the embedded encoder and its part."""

from __future__ import annotations

from composed import Drawn, compose
from rank_jobs import N

compose("opt")
list(map(Drawn(N).__getitem__, range(N)))

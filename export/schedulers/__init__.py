"""diffusers schedulers as solver tables: loaded from a folder, traced by running them on basis vectors."""

from __future__ import annotations

from lehr.export.schedulers.load import load_scheduler
from lehr.export.schedulers.setting import dynamic_shift
from lehr.export.schedulers.trace import trace_scheduler

__all__ = ["dynamic_shift", "load_scheduler", "trace_scheduler"]

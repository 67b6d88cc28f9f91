"""The dashboards: rows that each answer a question."""

from __future__ import annotations

from k8s.monitoring.engines import ENGINES
from k8s.monitoring.overview import OVERVIEW
from k8s.monitoring.queries import Dashboard
from k8s.monitoring.sessions import SESSIONS
from k8s.monitoring.training import TRAINING

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, SESSIONS, ENGINES, TRAINING)

"""Dashboards and alerts as code. `python -m k8s.monitoring.generate` writes what Grafana and Prometheus read."""

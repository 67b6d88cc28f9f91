"""Comparison with other rollout code on the same work: episodes of three 64-token turns against vLLM's own server.

``run.run_peers`` is the way in. Each peer lives in a virtual environment of its own (``.bench/<name>``, see
``setup``) and is driven by a small script here; the scripts share ``episodes``, which says what one episode is.
"""

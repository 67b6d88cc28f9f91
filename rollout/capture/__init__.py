"""Capture of black-box agents: calls that an engine served over HTTP become trajectories of the one record.

`calls` is what a replica records of a generation, `segments` puts a session's calls together, and `session_book`
keeps one session from its opening to the trajectory that it leaves.
"""

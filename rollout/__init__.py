"""rollout-cluster's ground floor: tasks, tools, environments, sessions, and the trajectory record.

Importing this package loads no Ray, vLLM, torch or renderers: a trainer installs it alone.
"""

from rollout.api import Batch, Filters, NoBatch, RunRequest
from rollout.client import AsyncRolloutClient
from rollout.environment import Environment, Episode, Turn
from rollout.errors import RolloutError, ToolError
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.sync_client import RolloutClient
from rollout.tasks import Message, Task, read_tasks
from rollout.tools import Tool, tool

__all__ = [
    "AsyncRolloutClient",
    "Batch",
    "Environment",
    "Episode",
    "Filters",
    "Limits",
    "Message",
    "NoBatch",
    "RolloutClient",
    "RolloutError",
    "RunRequest",
    "Sampling",
    "Task",
    "Tool",
    "ToolError",
    "Turn",
    "read_tasks",
    "tool",
]

"""The actors of the cluster: controller, session workers, and what they need.

What decides is pure and tested without Ray (scheduler, routing); what talks (controller, worker, lanes) is thin.
"""

"""Sequential recommendation. What recipes name is imported when it is asked for."""

from polyhead.lazy import lazy

__getattr__ = lazy(__name__, {"NextItem": "recsys.tasks", "Interactions": "recsys.interactions"})

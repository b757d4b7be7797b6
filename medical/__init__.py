"""Medicine: radiographs, whole-slide images and other bags. What recipes name is imported when it is asked for."""

from polyhead.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "SlideClassifier": "medical.tasks",
        "BagData": "medical.bag_data",
        "RadiographClassifier": "medical.radiograph_tasks",
        "RadiographData": "medical.radiographs",
    },
)

"""Vision: backbones, facial expressions, image data. What recipes name is imported when it is asked for."""

from polyhead.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "ImageClassifier": "vision.tasks",
        "ImageData": "vision.images",
        "ExpressionClassifier": "vision.expression_tasks",
        "FaceData": "vision.faces",
    },
)

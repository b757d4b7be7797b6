"""Events and recordings in time. What recipes name is imported when it is asked for."""

from polyhead.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "EventModel": "timeseries.event_tasks",
        "EventData": "timeseries.event_data",
        "ExponentialHawkes": "timeseries.hawkes",
        "SeizureDetector": "timeseries.recording_tasks",
        "SignalModel": "timeseries.pretraining",
        "RecordingData": "timeseries.recording_data",
    },
)

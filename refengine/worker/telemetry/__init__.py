"""What a worker tells about itself: log, metrics, status, uncaught errors."""

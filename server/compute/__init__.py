"""Computing missing shards: the queue and the worker process."""

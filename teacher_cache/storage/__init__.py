"""Where caches live: local folders, object stores, label servers; locks and atomic writes."""

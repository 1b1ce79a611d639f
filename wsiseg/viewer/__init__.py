"""Looking at results: a report page of a run, and slides with their masks in a browser."""

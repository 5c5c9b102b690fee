"""What tuning stands on: storages and search spaces."""

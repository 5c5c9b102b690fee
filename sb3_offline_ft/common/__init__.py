"""What the algorithms, data and tools of this package stand on."""

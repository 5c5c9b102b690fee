"""What a study compares: its file, its methods, its cells."""

"""What a study's results say, in numbers, words, tables and pictures."""

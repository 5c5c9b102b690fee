"""HTML pages that need nothing else, and their pictures."""

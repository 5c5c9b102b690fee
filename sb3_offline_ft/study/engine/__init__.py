"""How a study's cells are run, by workers on any machine, and what they leave behind."""

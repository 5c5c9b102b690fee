"""What is done with whole datasets: shown, reported on, converted, collected."""

"""Many services, many clients, moves and faults at random, for as long as one likes: ``make soak MINUTES=n``."""

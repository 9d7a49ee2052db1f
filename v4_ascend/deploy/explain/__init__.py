"""What an error in a log means, on which rank it began, and what to do about it."""

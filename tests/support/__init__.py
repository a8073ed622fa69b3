"""What tests share: the other ends of what is tested, and fixtures of a subject."""

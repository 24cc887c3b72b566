"""Reading a reward: which features decided between two answers."""

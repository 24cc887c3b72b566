"""What a reward model should not reward: style, drift, and labels its features contradict."""

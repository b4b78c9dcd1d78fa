"""Training on several processes: who they are, what they tell each other, and what happens when one of them does not answer."""
